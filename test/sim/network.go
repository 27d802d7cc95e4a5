package sim

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"strings"
	"sync"
	"time"

	"github.com/hashicorp/raft"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
)

var (
	errLost    = errors.New("simulated network: no answer")
	errRefused = errors.New("simulated network: connection refused")
)

// weather is how bad the network is.
type weather struct {
	loss    float64       // of the messages are lost
	slow    float64       // take longer, and are overtaken
	latency time.Duration // at most, of a usual message
	delay   time.Duration // at most, of a slow one
}

// network carries messages between the lives of replicas.
type network struct {
	mu      sync.Mutex
	random  *rand.Rand
	weather weather
	blocked map[[2]string]bool          // from, to
	late    map[[2]string]time.Duration // from, to: by how much longer it takes
	ends    map[string]*end
}

func newNetwork(seed uint64, w weather) *network {
	return &network{random: rand.New(rand.NewPCG(seed, 1)), weather: w, blocked: map[[2]string]bool{}, late: map[[2]string]time.Duration{}, ends: map[string]*end{}}
}

// leg draws what happens to one message.
func (n *network) leg(from, to string) (delay time.Duration, lost, overtaken bool) {
	n.mu.Lock()
	defer n.mu.Unlock()
	delay = 100*time.Microsecond + time.Duration(n.random.Int64N(int64(n.weather.latency)))
	if n.random.Float64() < n.weather.slow {
		delay, overtaken = time.Duration(n.random.Int64N(int64(n.weather.delay))), true
	}
	way := [2]string{from, to}
	return delay + n.late[way], n.blocked[way] || n.random.Float64() < n.weather.loss, overtaken
}

// block cuts or mends the way from one replica to another.
func (n *network) block(from, to string, on bool) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.blocked[[2]string{from, to}] = on
}

// delay makes all that one replica sends to another come later, answers too; 0 mends
// that. What is on its way already is not changed.
func (n *network) delay(from, to string, by time.Duration) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.late[[2]string{from, to}] = by
}

// calm mends everything.
func (n *network) calm() {
	n.mu.Lock()
	defer n.mu.Unlock()
	clear(n.blocked)
	clear(n.late)
	n.weather.loss, n.weather.slow = 0, 0
}

func (n *network) find(name string) *end {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.ends[name]
}

// attach connects a new life of a replica.
func (n *network) attach(name string) *end {
	e := &end{name: name, network: n, consumer: make(chan raft.RPC), services: map[string]method{}, streams: map[string]func(grpc.ServerStream) error{}}
	e.ctx, e.cancel = context.WithCancel(context.Background())
	n.mu.Lock()
	defer n.mu.Unlock()
	n.ends[name] = e
	return e
}

// end is one life of a replica as the network sees it. It implements
// consensus.Wire and grpc.ServiceRegistrar.
type end struct {
	name     string
	network  *network
	consumer chan raft.RPC
	ctx      context.Context // ends when it is cut off for good
	cancel   context.CancelFunc

	mu        sync.Mutex
	heartbeat func(raft.RPC)
	services  map[string]method
	streams   map[string]func(grpc.ServerStream) error
}

// cut takes the life off the network: its process is dead.
func (e *end) cut() {
	e.cancel()
	e.network.mu.Lock()
	defer e.network.mu.Unlock()
	if e.network.ends[e.name] == e {
		delete(e.network.ends, e.name)
	}
}

// patience is how long a lost message is waited for, at most. An answer that is only
// late is waited for longer, as by Raft's own transport, for whatever it is still worth.
const patience = 700 * time.Millisecond

// turn orders the messages of one connection.
type turn struct{ mine, next chan struct{} }

// call sends one message of Raft and waits for its answer. With a turn, it is not
// delivered before the message sent before it, unless it is overtaken.
func (e *end) call(to string, command any, reader io.Reader, order *turn) (any, error) {
	late := make(chan struct{})
	deadline := time.AfterFunc(patience, func() { close(late) })
	defer deadline.Stop()
	delay, lost, overtaken := e.network.leg(e.name, to)
	arrive := func() bool { // false: too late
		t := time.NewTimer(delay)
		defer t.Stop()
		select {
		case <-t.C:
		case <-e.ctx.Done():
			return false
		}
		if order == nil || overtaken {
			return true
		}
		select {
		case <-order.mine:
			return true
		case <-e.ctx.Done():
			return false
		case <-late:
			return false
		}
	}()
	if order != nil {
		defer func() {
			select {
			case <-order.next:
			default:
				close(order.next)
			}
		}()
	}
	wait := func() error {
		select {
		case <-late:
			return errLost
		case <-e.ctx.Done():
			return raft.ErrTransportShutdown
		}
	}
	if lost || !arrive {
		return nil, wait()
	}
	peer := e.network.find(to)
	if peer == nil || e.ctx.Err() != nil {
		return nil, errRefused
	}
	answers := make(chan raft.RPCResponse, 1)
	rpc := raft.RPC{Command: command, Reader: reader, RespChan: answers}
	if !peer.fast(rpc) {
		select {
		case peer.consumer <- rpc:
		case <-peer.ctx.Done():
			return nil, errRefused
		case <-e.ctx.Done():
			return nil, raft.ErrTransportShutdown
		case <-late:
			return nil, errLost
		}
	}
	if order != nil {
		close(order.next)
	}
	select {
	case a := <-answers:
		if peer.ctx.Err() != nil {
			return nil, errRefused
		}
		delay, lost, _ := e.network.leg(to, e.name)
		if lost {
			return nil, wait()
		}
		t := time.NewTimer(delay)
		defer t.Stop()
		select {
		case <-t.C:
			return a.Response, a.Error
		case <-e.ctx.Done():
			return nil, raft.ErrTransportShutdown
		}
	case <-peer.ctx.Done():
		return nil, errRefused
	case <-e.ctx.Done():
		return nil, raft.ErrTransportShutdown
	case <-late:
		return nil, errLost
	}
}

// fast gives Raft a heartbeat past its queue, as the network transport does.
func (e *end) fast(rpc raft.RPC) bool {
	a, ok := rpc.Command.(*raft.AppendEntriesRequest)
	if !ok || a.Term == 0 || a.PrevLogEntry != 0 || a.PrevLogTerm != 0 || len(a.Entries) != 0 || a.LeaderCommitIndex != 0 {
		return false
	}
	e.mu.Lock()
	f := e.heartbeat
	e.mu.Unlock()
	if f == nil {
		return false
	}
	go f(rpc) // in the peer's process: it may end there, and not the caller
	return true
}

// Consumer implements raft.Transport.
func (e *end) Consumer() <-chan raft.RPC { return e.consumer }

// LocalAddr implements raft.Transport.
func (e *end) LocalAddr() raft.ServerAddress { return raft.ServerAddress(address(e.name)) }

// EncodePeer implements raft.Transport.
func (e *end) EncodePeer(_ raft.ServerID, a raft.ServerAddress) []byte { return []byte(a) }

// DecodePeer implements raft.Transport.
func (e *end) DecodePeer(b []byte) raft.ServerAddress { return raft.ServerAddress(b) }

// SetHeartbeatHandler implements raft.Transport.
func (e *end) SetHeartbeatHandler(f func(raft.RPC)) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.heartbeat = f
}

// Close implements raft.WithClose.
func (e *end) Close() error { e.cut(); return nil }

// CloseStreams implements consensus.Wire.
func (e *end) CloseStreams() {}

// AppendEntries implements raft.Transport.
func (e *end) AppendEntries(id raft.ServerID, _ raft.ServerAddress, args *raft.AppendEntriesRequest, resp *raft.AppendEntriesResponse) error {
	return exchange(e, id, copyEntries(args), nil, resp)
}

// RequestVote implements raft.Transport.
func (e *end) RequestVote(id raft.ServerID, _ raft.ServerAddress, args *raft.RequestVoteRequest, resp *raft.RequestVoteResponse) error {
	return exchange(e, id, args, nil, resp)
}

// RequestPreVote implements raft.WithPreVote.
func (e *end) RequestPreVote(id raft.ServerID, _ raft.ServerAddress, args *raft.RequestPreVoteRequest, resp *raft.RequestPreVoteResponse) error {
	return exchange(e, id, args, nil, resp)
}

// TimeoutNow implements raft.Transport.
func (e *end) TimeoutNow(id raft.ServerID, _ raft.ServerAddress, args *raft.TimeoutNowRequest, resp *raft.TimeoutNowResponse) error {
	return exchange(e, id, args, nil, resp)
}

// InstallSnapshot implements raft.Transport. The connection may break midway.
func (e *end) InstallSnapshot(id raft.ServerID, _ raft.ServerAddress, args *raft.InstallSnapshotRequest, resp *raft.InstallSnapshotResponse, data io.Reader) error {
	b, err := io.ReadAll(data)
	if err != nil {
		return err
	}
	var reader io.Reader = bytes.NewReader(b)
	if _, broken, _ := e.network.leg(e.name, string(id)); broken && len(b) > 0 {
		reader = io.MultiReader(bytes.NewReader(b[:len(b)/2]), brokenReader{})
	}
	return exchange(e, id, args, reader, resp)
}

type brokenReader struct{}

func (brokenReader) Read([]byte) (int, error) { return 0, io.ErrUnexpectedEOF }

// exchange sends a message and stores the answer.
func exchange[Q, A any](e *end, to raft.ServerID, args *Q, reader io.Reader, resp *A) error {
	request := *args
	a, err := e.call(string(to), &request, reader, nil)
	if err != nil {
		return err
	}
	*resp = *a.(*A)
	return nil
}

// copyEntries copies what two replicas must not share.
func copyEntries(args *raft.AppendEntriesRequest) *raft.AppendEntriesRequest {
	c := *args
	c.Entries = make([]*raft.Log, len(args.Entries))
	for i, l := range args.Entries {
		entry := *l
		c.Entries[i] = &entry
	}
	return &c
}

// AppendEntriesPipeline implements raft.Transport.
func (e *end) AppendEntriesPipeline(id raft.ServerID, _ raft.ServerAddress) (raft.AppendPipeline, error) {
	if e.network.find(string(id)) == nil {
		return nil, errRefused
	}
	p := &pipeline{e: e, to: string(id), done: make(chan raft.AppendFuture), slots: make(chan struct{}, underWay), sent: make(chan struct{}), answered: make(chan struct{})}
	close(p.sent)
	close(p.answered)
	p.ctx, p.cancel = context.WithCancel(e.ctx)
	return p, nil
}

// underWay is how many messages of a pipeline are, as with Raft's own transport: a
// sender waits for answers to be taken.
const underWay = raft.DefaultMaxRPCsInFlight

// pipeline has several messages under way at once and answers in their order.
type pipeline struct {
	e      *end
	to     string
	done   chan raft.AppendFuture
	slots  chan struct{}
	ctx    context.Context
	cancel context.CancelFunc

	sent, answered chan struct{} // closed when the message before was delivered, was answered
}

// AppendEntries implements raft.AppendPipeline.
func (p *pipeline) AppendEntries(args *raft.AppendEntriesRequest, resp *raft.AppendEntriesResponse) (raft.AppendFuture, error) {
	select {
	case p.slots <- struct{}{}:
	case <-p.ctx.Done():
		return nil, raft.ErrPipelineShutdown
	}
	f := &appendFuture{start: time.Now(), args: args, resp: resp, done: make(chan struct{})}
	order := &turn{mine: p.sent, next: make(chan struct{})}
	before, mine := p.answered, make(chan struct{})
	p.sent, p.answered = order.next, mine
	request := copyEntries(args)
	go func() {
		defer func() { <-p.slots; close(mine) }()
		a, err := p.e.call(p.to, request, nil, order)
		if f.err = err; err == nil {
			*resp = *a.(*raft.AppendEntriesResponse)
		}
		close(f.done)
		select {
		case <-before:
		case <-p.ctx.Done():
			return
		}
		select {
		case p.done <- f:
		case <-p.ctx.Done():
		}
	}()
	return f, nil
}

// Consumer implements raft.AppendPipeline.
func (p *pipeline) Consumer() <-chan raft.AppendFuture { return p.done }

// Close implements raft.AppendPipeline.
func (p *pipeline) Close() error { p.cancel(); return nil }

type appendFuture struct {
	start time.Time
	args  *raft.AppendEntriesRequest
	resp  *raft.AppendEntriesResponse
	done  chan struct{}
	err   error
}

func (f *appendFuture) Error() error                          { <-f.done; return f.err }
func (f *appendFuture) Start() time.Time                      { return f.start }
func (f *appendFuture) Request() *raft.AppendEntriesRequest   { return f.args }
func (f *appendFuture) Response() *raft.AppendEntriesResponse { <-f.done; return f.resp }

// method calls one method of a service.
type method func(ctx context.Context, decode func(any) error) (any, error)

// RegisterService implements grpc.ServiceRegistrar.
func (e *end) RegisterService(d *grpc.ServiceDesc, service any) {
	e.mu.Lock()
	defer e.mu.Unlock()
	for _, m := range d.Methods {
		e.services["/"+d.ServiceName+"/"+m.MethodName] = func(ctx context.Context, decode func(any) error) (any, error) {
			return m.Handler(service, ctx, decode, nil)
		}
	}
	for _, m := range d.Streams {
		e.streams["/"+d.ServiceName+"/"+m.StreamName] = func(s grpc.ServerStream) error { return m.Handler(service, s) }
	}
}

// conn calls another replica's services.
type conn struct {
	from *end
	to   string
}

// Invoke implements grpc.ClientConnInterface.
func (c *conn) Invoke(ctx context.Context, name string, args, reply any, _ ...grpc.CallOption) error {
	broken := func(err error) error {
		t := time.NewTimer(patience)
		defer t.Stop()
		if errors.Is(err, errLost) {
			select {
			case <-t.C:
			case <-ctx.Done():
			}
		}
		if ctx.Err() != nil {
			return status.FromContextError(ctx.Err()).Err()
		}
		return status.Error(codes.Unavailable, err.Error())
	}
	pause := func(d time.Duration) bool {
		t := time.NewTimer(d)
		defer t.Stop()
		select {
		case <-t.C:
			return true
		case <-ctx.Done():
		case <-c.from.ctx.Done():
		}
		return false
	}
	delay, lost, _ := c.from.network.leg(c.from.name, c.to)
	if lost {
		return broken(errLost)
	}
	if !pause(delay) {
		return broken(errRefused)
	}
	peer := c.from.network.find(c.to)
	if peer == nil || c.from.ctx.Err() != nil {
		return broken(errRefused)
	}
	peer.mu.Lock()
	call := peer.services[name]
	peer.mu.Unlock()
	if call == nil {
		return status.Errorf(codes.Unimplemented, "no method %s", name)
	}
	request := proto.Clone(args.(proto.Message))
	// The server's context ends with the call, and knows nothing else of the
	// caller's.
	serverContext, cancel := context.WithCancel(context.Background())
	defer cancel()
	type answer struct {
		reply any
		err   error
	}
	answers := make(chan answer, 1)
	go func() {
		reply, err := call(serverContext, func(to any) error {
			proto.Merge(to.(proto.Message), request)
			return nil
		})
		answers <- answer{reply, err}
	}()
	select {
	case a := <-answers:
		delay, lost, _ := c.from.network.leg(c.to, c.from.name)
		switch {
		case peer.ctx.Err() != nil:
			return broken(errRefused)
		case lost:
			return broken(errLost)
		case !pause(delay):
			return broken(errRefused)
		case a.err != nil:
			return a.err
		}
		proto.Merge(reply.(proto.Message), proto.Clone(a.reply.(proto.Message)))
		return nil
	case <-peer.ctx.Done():
		return broken(errRefused)
	case <-c.from.ctx.Done():
		return broken(errRefused)
	case <-ctx.Done():
		return broken(errLost)
	}
}

func address(name string) string { return fmt.Sprintf("%s:7444", strings.ToLower(name)) }
