package dispatch

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"sync"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"timonel/gossip"
	pb "timonel/proto/timonel/v1"
)

// targetKubelet is the agent's kubelet API, the only target there is.
const targetKubelet = "kubelet"

// openedKey is in the header of Peers.Dial's answer once the agent is reached.
const openedKey = "timonel-opened"

// tunnels are those that agents were asked for and have not dialed back yet.
type tunnels struct {
	mu      sync.Mutex
	waiting map[string]pendingTunnel
}

type pendingTunnel struct {
	node string
	conn chan *streamConn // capacity 1
}

func newTunnels() *tunnels { return &tunnels{waiting: make(map[string]pendingTunnel)} }

func (t *tunnels) expect(node string) (string, chan *streamConn) {
	var raw [16]byte
	rand.Read(raw[:]) // never fails
	id, conn := hex.EncodeToString(raw[:]), make(chan *streamConn, 1)
	t.mu.Lock()
	defer t.mu.Unlock()
	t.waiting[id] = pendingTunnel{node, conn}
	return id, conn
}

// take returns the tunnel that node was asked for under id, once.
func (t *tunnels) take(id, node string) (chan *streamConn, bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	p, ok := t.waiting[id]
	if !ok || p.node != node {
		return nil, false
	}
	delete(t.waiting, id)
	return p.conn, true
}

// waits reports that node was asked for the tunnel.
func (t *tunnels) waits(id, node string) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	p, ok := t.waiting[id]
	return ok && p.node == node
}

func (t *tunnels) drop(id string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	delete(t.waiting, id)
}

// errNotHere means that a node's agent has no stream to this controller.
var errNotHere = errors.New("not connected to this controller")

// dialHere opens a connection to a node whose stream is here.
func (d *Dispatcher) dialHere(ctx context.Context, node string) (*streamConn, error) {
	s := d.hub.session(node)
	if s == nil {
		return nil, fmt.Errorf("node %s: %w", node, errNotHere)
	}
	ctx, cancel := context.WithTimeout(ctx, tunnelTimeout)
	defer cancel()
	id, conn := d.tunnels.expect(node)
	if err := s.tell(&pb.ControllerMessage{Message: &pb.ControllerMessage_TunnelOpen{TunnelOpen: &pb.TunnelOpen{Id: id, Target: targetKubelet}}}); err != nil {
		d.tunnels.drop(id)
		return nil, err
	}
	select {
	case c := <-conn:
		return c, nil
	case <-s.ended:
	case <-ctx.Done():
	}
	d.tunnels.drop(id)
	select {
	case c := <-conn: // it came at the last moment
		return c, nil
	default:
	}
	select {
	case <-s.ended:
		// It may be on another controller already.
		return nil, fmt.Errorf("node %s: its stream ended while a connection to it was opened: %w", node, errNotHere)
	default:
		return nil, fmt.Errorf("node %s: its agent did not open the connection that it was asked for: %w", node, ctx.Err())
	}
}

// Tunnel is an agent that dials back.
func (d *Dispatcher) Tunnel(stream grpc.BidiStreamingServer[pb.Chunk, pb.Chunk]) error {
	ctx, _, done, err := d.serve(stream.Context())
	if err != nil {
		return status.Error(codes.Unavailable, err.Error())
	}
	defer done()
	id, err := caller(ctx)
	if err != nil {
		return err
	}
	waiting, ok := d.tunnels.take(header(ctx, pb.TunnelIDKey), id.Name)
	if !ok {
		return status.Errorf(codes.NotFound, "node %s was not asked for this tunnel, or nobody waits for it any more", id.Name)
	}
	conn := newStreamConn(stream, "node "+id.Name)
	waiting <- conn
	select {
	case <-conn.closed:
	case <-ctx.Done():
		conn.Close()
	}
	conn.flush()
	return nil
}

// DialKubelet connects to the kubelet API of a node, through its stream here or
// through the controller that has it. It outlives that stream while agent and controller
// reach each other; a Read that fails with another error than io.EOF says that they do not.
// ctx is for the opening alone.
func (d *Dispatcher) DialKubelet(ctx context.Context, node string) (net.Conn, error) {
	conn, err := d.dialHere(ctx, node)
	if err == nil {
		return conn, nil
	}
	if !errors.Is(err, errNotHere) {
		return nil, err
	}
	return d.dialPeers(ctx, node)
}

// dialPeers asks all other controllers at once and takes the first that has the
// node.
func (d *Dispatcher) dialPeers(ctx context.Context, node string) (net.Conn, error) {
	peers := d.peers()
	type result struct {
		peer string
		conn *streamConn
		err  error
	}
	results := make(chan result, len(peers))
	ctx, cancel := context.WithTimeout(ctx, peerTimeout+tunnelTimeout)
	defer cancel()
	for _, peer := range peers {
		go func() {
			conn, err := d.dialPeer(ctx, peer, node)
			results <- result{peer, conn, err}
		}()
	}
	var failed []string
	for i := range peers {
		r := <-results
		if r.err == nil {
			go func() { // a second one that has it can only have a stream that is ending
				for range len(peers) - i - 1 {
					if late := <-results; late.err == nil {
						late.conn.Close()
					}
				}
			}()
			return r.conn, nil
		}
		if status.Code(r.err) != codes.NotFound {
			failed = append(failed, fmt.Sprintf("%s: %s", r.peer, status.Convert(r.err).Message()))
		}
	}
	if len(failed) > 0 {
		return nil, fmt.Errorf("node %s is not connected to any controller that answers (%s)", node, strings.Join(failed, "; "))
	}
	return nil, fmt.Errorf("node %s is not connected to any controller", node)
}

// peers are the other controllers that gossip does not hold for gone.
func (d *Dispatcher) peers() []string {
	var out []string
	for _, m := range d.config.Gossip.Members() {
		if m.Role == gossip.RoleController && m.Name != d.config.Name && (m.State == gossip.Alive || m.State == gossip.Suspect) {
			out = append(out, m.Name)
		}
	}
	return out
}

func (d *Dispatcher) dialPeer(ctx context.Context, peer, node string) (*streamConn, error) {
	cc, err := d.config.TunnelConn(ctx, peer)
	if err != nil {
		return nil, err
	}
	// The stream outlives ctx once it is open.
	life, end := context.WithCancel(metadata.AppendToOutgoingContext(context.WithoutCancel(ctx), pb.TunnelNodeKey, node))
	stop := context.AfterFunc(ctx, end)
	stream, err := pb.NewPeersClient(cc).Dial(life)
	if err != nil {
		end()
		return nil, err
	}
	head, err := stream.Header()
	if err == nil && len(head.Get(openedKey)) == 0 {
		if _, err = stream.Recv(); err == nil {
			err = errors.New("the controller sent data before it had reached the node")
		}
	}
	if err != nil || !stop() {
		end()
		if err == nil {
			err = ctx.Err()
		}
		return nil, err
	}
	conn := newStreamConn(stream, "node "+node+" through "+peer)
	go func() { // ends with the connection
		<-conn.closed
		conn.flush()
		_ = stream.CloseSend()
		conn.drain() // ending the stream at once would drop what was written last
		end()
	}()
	return conn, nil
}

// Dial is another controller that wants to reach a node whose stream is here.
func (d *Dispatcher) Dial(stream grpc.BidiStreamingServer[pb.Chunk, pb.Chunk]) error {
	ctx, _, done, err := d.serve(stream.Context())
	if err != nil {
		return status.Error(codes.Unavailable, err.Error())
	}
	defer done()
	far, err := d.dialHere(ctx, header(ctx, pb.TunnelNodeKey))
	if errors.Is(err, errNotHere) {
		return status.Error(codes.NotFound, err.Error())
	}
	if err != nil {
		return status.Error(codes.Unavailable, err.Error())
	}
	defer far.Close()
	if err := stream.SendHeader(metadata.Pairs(openedKey, "yes")); err != nil {
		return err
	}
	near := newStreamConn(stream, "another controller")
	defer near.Close()
	stop := context.AfterFunc(ctx, func() { near.Close(); far.Close() })
	defer stop()
	var pipes sync.WaitGroup
	var broke error // how the connection to the node did
	pipes.Go(func() { _ = pipe(far, near) })
	pipes.Go(func() { broke = pipe(near, far) })
	pipes.Wait()
	near.Close()
	near.flush()
	if broke != nil {
		return status.Error(codes.Unavailable, status.Convert(broke).Message())
	}
	return nil
}

// pipe copies until from ends and passes the end on. An error ends both; it is returned.
func pipe(to, from *streamConn) error {
	if _, err := io.Copy(to, from); err != nil {
		to.Close()
		from.Close()
		return err
	}
	_ = to.CloseWrite()
	return nil
}

func header(ctx context.Context, key string) string {
	md, _ := metadata.FromIncomingContext(ctx)
	if v := md.Get(key); len(v) > 0 {
		return v[0]
	}
	return ""
}
