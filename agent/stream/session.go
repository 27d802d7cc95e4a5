package stream

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"google.golang.org/grpc"
	authenticationv1 "k8s.io/api/authentication/v1"
	certificatesv1 "k8s.io/api/certificates/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"timonel/agent/desired"
	pb "timonel/proto/timonel/v1"
)

// ErrDisconnected is returned for a request while no controller is connected.
var ErrDisconnected = errors.New("no controller is connected")

// session is one stream from Hello to its end.
type session struct {
	client     *Client
	agents     pb.AgentsClient
	address    string
	controller string

	mu      sync.Mutex
	nextID  uint64
	replies map[uint64]chan *pb.Reply
	calls   sync.WaitGroup // Network
	tunnels sync.WaitGroup // may outlive the session
	// carrier has the tunnels, over a connection of their own: what is waited for here
	// does not wait behind them.
	carrier pb.AgentsClient
}

func (s *session) run(ctx context.Context) (connected bool, err error) {
	cfg := &s.client.cfg
	// The stream outlives ctx for the moment that a goodbye takes.
	streamCtx, cancel := context.WithCancel(context.WithoutCancel(ctx))
	defer cancel()
	welcome := time.AfterFunc(cfg.DialTimeout, cancel)
	defer welcome.Stop()
	stopEarly := context.AfterFunc(ctx, cancel)
	defer stopEarly()

	stream, err := s.agents.Connect(streamCtx)
	if err != nil {
		return false, err
	}
	hello, err := s.hello()
	if err != nil {
		return false, err
	}
	if err := stream.Send(hello); err != nil {
		if _, recvErr := stream.Recv(); recvErr != nil { // says why
			err = recvErr
		}
		return false, err
	}
	first, err := stream.Recv()
	if err != nil {
		if !welcome.Stop() && ctx.Err() == nil {
			err = fmt.Errorf("no answer within %s", cfg.DialTimeout)
		}
		return false, err
	}
	w := first.GetWelcome()
	if w == nil {
		return false, fmt.Errorf("controller %s began with %T instead of a welcome", s.address, first.Message)
	}
	if !welcome.Stop() || !stopEarly() {
		return false, context.Cause(streamCtx)
	}
	s.controller = w.Controller
	s.replies = map[uint64]chan *pb.Reply{}
	cfg.Desired.Begin(w.Epoch, w.Full)
	s.client.setSession(s)
	s.client.log.Info("connected", "controller", w.Controller, "address", s.address, "full", w.Full)
	defer s.close()

	if cfg.Network != nil {
		s.calls.Go(func() { cfg.Network(streamCtx, s.agents) })
	}
	sent := make(chan error, 1)
	go func() {
		sent <- s.send(ctx, stream)
		cancel()
	}()
	err = s.receive(ctx, stream)
	cancel()
	if sendErr := <-sent; err == nil {
		err = sendErr
	}
	return true, err
}

func (s *session) hello() (*pb.AgentMessage, error) {
	cfg := &s.client.cfg
	node := s.client.out.hello()
	raw, err := node.Marshal()
	if err != nil {
		return nil, fmt.Errorf("encode the node: %w", err)
	}
	epoch, _ := cfg.Desired.Position()
	var keys []string
	if cfg.GossipKeyIDs != nil {
		keys = cfg.GossipKeyIDs()
	}
	return &pb.AgentMessage{Message: &pb.AgentMessage_Hello{Hello: &pb.Hello{
		NodeName: cfg.NodeName, Instance: s.client.instance, Version: cfg.Version, Node: raw, Epoch: epoch, Have: cfg.Desired.Have(),
		GossipKeys: keys, Network: cfg.Network != nil, TrustBundles: true, PodCertificates: true,
		Kinds: []string{desired.KindRuntimeClass, desired.KindDriver, desired.KindAttachment},
	}}}, nil
}

// close ends the requests of this session. Its tunnels go on while the connection holds: a
// controller that is out of touch with the others ends the session, and need not end a
// user's shell.
func (s *session) close() {
	s.client.setSession(nil)
	s.mu.Lock()
	for _, ch := range s.replies {
		close(ch)
	}
	s.replies = nil
	s.mu.Unlock()
	s.calls.Wait()
}

// send sends what the outbox holds until the stream or ctx ends. With ctx, it
// says goodbye and waits a moment for the controller to end the stream.
func (s *session) send(ctx context.Context, stream grpc.BidiStreamingClient[pb.AgentMessage, pb.ControllerMessage]) error {
	out := s.client.out
	for {
		for _, m := range out.take() {
			if err := stream.Send(m); err != nil {
				return err
			}
		}
		select {
		case <-out.wake:
		case <-stream.Context().Done():
			return nil
		case <-ctx.Done():
			for _, m := range out.take() {
				_ = stream.Send(m)
			}
			_ = stream.Send(&pb.AgentMessage{Message: &pb.AgentMessage_Goodbye{Goodbye: &pb.Goodbye{Reason: "the agent is being stopped"}}})
			_ = stream.CloseSend()
			select {
			case <-stream.Context().Done():
			case <-time.After(500 * time.Millisecond):
			}
			return nil
		}
	}
}

// receive takes messages until the stream ends. Tunnels end with ctx.
func (s *session) receive(ctx context.Context, stream grpc.BidiStreamingClient[pb.AgentMessage, pb.ControllerMessage]) error {
	cfg, store := &s.client.cfg, s.client.cfg.Desired
	for {
		m, err := stream.Recv()
		if err != nil {
			return err
		}
		switch m := m.Message.(type) {
		case *pb.ControllerMessage_PodSet:
			err = store.SetPod(m.PodSet.Pod, m.PodSet.Revision, m.PodSet.Policies)
		case *pb.ControllerMessage_PodRemove:
			store.RemovePod(types.UID(m.PodRemove.Uid), m.PodRemove.Revision)
		case *pb.ControllerMessage_ObjectSet:
			err = store.SetObject(m.ObjectSet.Kind, m.ObjectSet.Object, m.ObjectSet.Revision)
		case *pb.ControllerMessage_ObjectRemove:
			o := m.ObjectRemove
			store.RemoveObject(o.Kind, o.Namespace, o.Name, o.Revision)
		case *pb.ControllerMessage_Synced:
			store.Synced(m.Synced.Revision)
		case *pb.ControllerMessage_TunnelOpen:
			s.tunnels.Go(func() { s.tunnel(ctx, m.TunnelOpen.Id, m.TunnelOpen.Target) })
		case *pb.ControllerMessage_Reply:
			s.reply(m.Reply)
		case *pb.ControllerMessage_Cluster:
			s.client.setControllers(m.Cluster.Controllers)
			if cfg.Cluster != nil {
				cfg.Cluster(m.Cluster)
			}
		case *pb.ControllerMessage_GossipKeys:
			err = s.keepGossipKeys(m.GossipKeys.Keys)
		case *pb.ControllerMessage_NodeSet:
			node := &corev1.Node{}
			if err = node.Unmarshal(m.NodeSet.Node); err == nil && cfg.Node != nil {
				cfg.Node(node)
			}
		default:
			s.client.log.Warn("unknown message from the controller; is it newer than this agent?", "type", fmt.Sprintf("%T", m))
		}
		if err != nil {
			s.client.log.Error("message from the controller", "controller", s.controller, "error", err)
		}
	}
}

// keepGossipKeys answers when the keys are kept. If they cannot be, the controllers go
// on without this agent after a while, and tell it again when it connects.
func (s *session) keepGossipKeys(keys [][]byte) error {
	cfg := &s.client.cfg
	if cfg.GossipKeys == nil || cfg.GossipKeyIDs == nil {
		return nil
	}
	if err := cfg.GossipKeys(keys); err != nil {
		return fmt.Errorf("keys of gossip: %w", err)
	}
	s.client.out.setKept(cfg.GossipKeyIDs())
	return nil
}

func (s *session) reply(r *pb.Reply) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if ch := s.replies[r.Id]; ch != nil {
		ch <- r // buffered
		delete(s.replies, r.Id)
	}
}

// request sends one request and waits for its reply, the end of the session, or
// ctx.
func (s *session) request(ctx context.Context, r *pb.Request) (*pb.Reply, error) {
	ch := make(chan *pb.Reply, 1)
	s.mu.Lock()
	if s.replies == nil {
		s.mu.Unlock()
		return nil, ErrDisconnected
	}
	s.nextID++
	r.Id = s.nextID
	s.replies[r.Id] = ch
	s.mu.Unlock()
	s.client.out.addRequest(r)
	select {
	case reply, ok := <-ch:
		if !ok {
			return nil, ErrDisconnected
		}
		return reply, nil
	case <-ctx.Done():
		s.mu.Lock()
		delete(s.replies, r.Id)
		s.mu.Unlock()
		return nil, context.Cause(ctx)
	}
}

// Token asks for a service account token as this node. It fails with
// ErrDisconnected while no controller is connected, and with the API's own
// error when that refuses.
func (c *Client) Token(ctx context.Context, namespace, serviceAccount string, tr *authenticationv1.TokenRequest) (*authenticationv1.TokenRequest, error) {
	raw, err := tr.Marshal()
	if err != nil {
		return nil, fmt.Errorf("encode a token request: %w", err)
	}
	body, err := c.ask(ctx, &pb.Request{Request: &pb.Request_Token{Token: &pb.TokenRequest{
		Namespace: namespace, ServiceAccount: serviceAccount, TokenRequest: raw,
	}}})
	if err != nil {
		return nil, err
	}
	out := &authenticationv1.TokenRequest{}
	if err := out.Unmarshal(body); err != nil {
		return nil, fmt.Errorf("decode the answer to a token request: %w", err)
	}
	return out, nil
}

// PodCertificate has a PodCertificateRequest made as this node, unless there is one of
// that name. It fails as Token does.
func (c *Client) PodCertificate(ctx context.Context, r *certificatesv1.PodCertificateRequest) error {
	raw, err := r.Marshal()
	if err != nil {
		return fmt.Errorf("encode a PodCertificateRequest: %w", err)
	}
	_, err = c.ask(ctx, &pb.Request{Request: &pb.Request_PodCertificate{PodCertificate: &pb.PodCertificate{Request: raw}}})
	return err
}

// ClaimGrown says that the node's part of a claim's volume has so many bytes now.
func (c *Client) ClaimGrown(ctx context.Context, claim *corev1.PersistentVolumeClaim, volume string, bytes int64) error {
	_, err := c.ask(ctx, &pb.Request{Request: &pb.Request_ClaimGrown{ClaimGrown: &pb.ClaimGrown{
		Namespace: claim.Namespace, Name: claim.Name, Uid: string(claim.UID), Volume: volume, Bytes: bytes,
	}}})
	return err
}

// ask asks the controller for something and returns what it answers, or the API's error.
func (c *Client) ask(ctx context.Context, r *pb.Request) ([]byte, error) {
	c.mu.Lock()
	s := c.session
	c.mu.Unlock()
	if s == nil {
		return nil, ErrDisconnected
	}
	reply, err := s.request(ctx, r)
	if err != nil {
		return nil, err
	}
	if len(reply.Status) > 0 {
		st := metav1.Status{}
		if err := st.Unmarshal(reply.Status); err != nil {
			return nil, fmt.Errorf("decode why the controller refuses: %w", err)
		}
		return nil, &apierrors.StatusError{ErrStatus: st}
	}
	return reply.Body, nil
}

// Certify asks for a new certificate of this node, over the connection there is. It
// fails with ErrDisconnected while no controller is connected.
func (c *Client) Certify(ctx context.Context, r *pb.JoinRequest) (*pb.JoinResponse, error) {
	c.mu.Lock()
	s := c.session
	c.mu.Unlock()
	if s == nil {
		return nil, ErrDisconnected
	}
	return s.agents.Join(ctx, r)
}
