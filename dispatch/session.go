package dispatch

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"
	coreclient "k8s.io/client-go/kubernetes/typed/core/v1"

	"timonel/pki"
	pb "timonel/proto/timonel/v1"
)

// session is one agent's stream here, from Hello to its end.
type session struct {
	d    *Dispatcher
	node string
	// instance names the agent's process.
	instance string
	log      *slog.Logger
	stream   grpc.BidiStreamingServer[pb.AgentMessage, pb.ControllerMessage]
	cancel   context.CancelCauseFunc
	client   coreclient.CoreV1Interface
	writer   *writer
	ended    <-chan struct{}
	network  bool     // the agent calls Network
	bundles  bool     // the agent knows ClusterTrustBundles
	certs    bool     // the agent knows PodCertificateRequests
	kinds    []string // that the agent knows besides

	wake    chan struct{}              // what the agent should have may have changed
	refs    map[objKey]struct{}        // hub.mu guards it
	removed bool                       // from the hub; hub.mu guards it
	goodbye atomic.Bool                // the agent announced its end
	control chan *pb.ControllerMessage // replies and tunnels

	// What the agent has. Only the goroutine that sends uses it.
	pods    map[podKey]int64 // revisions; 0: of some content that is not known
	objects map[objKey]int64 // likewise
	synced  int64            // of the last Synced on this stream
	full    bool             // a full list follows, as Welcome says
	first   bool             // nothing was synced on this stream yet
	cluster *pb.Cluster
	keys    *nodesKeys // the last that it was told, or had by itself
	// sentNode is the last NodeSet.
	sentNode []byte

	// kept are the names of the keys of gossip that the agent has on its disk; nil of
	// one that knows of no more than one key.
	kept atomic.Pointer[[]string]

	usage   usage   // what the agent said last that its node takes
	reports reports // what the agent said and is to be written
}

// podKey names one pod: an agent may for a moment have two of one name.
type podKey struct {
	namespace, name string
	uid             types.UID
}

// errLost ends a stream so that the agent opens another elsewhere.
var errLost = errors.New("this controller is out of touch with the others")

// controlQueue bounds replies and tunnel requests that wait for a slow agent.
const controlQueue = 256

// Connect serves an agent's stream.
func (d *Dispatcher) Connect(stream grpc.BidiStreamingServer[pb.AgentMessage, pb.ControllerMessage]) error {
	ctx, cancel, done, err := d.serve(stream.Context())
	if err != nil {
		return status.Error(codes.Unavailable, err.Error())
	}
	defer done()
	first, err := stream.Recv()
	if err != nil {
		return err
	}
	lost, err := d.config.InTouch()
	if err != nil {
		return status.Error(codes.Unavailable, err.Error())
	}
	hello := first.GetHello()
	if hello == nil {
		return status.Errorf(codes.InvalidArgument, "the stream began with %T instead of a Hello", first.GetMessage())
	}
	id, err := caller(ctx)
	if err != nil {
		return err
	}
	if id != (pki.Identity{Role: pki.RoleNode, Name: hello.GetNodeName()}) {
		return status.Errorf(codes.PermissionDenied, "the certificate is that of %s, the agent calls itself node %s", id, hello.GetNodeName())
	}
	instance, err := instanceOf(hello)
	if err != nil {
		return err
	}
	expires, key, err := peerLeaf(ctx)
	if err != nil {
		return status.Error(codes.Unauthenticated, err.Error())
	}
	node := &corev1.Node{}
	if err := node.Unmarshal(hello.GetNode()); err != nil {
		return status.Errorf(codes.InvalidArgument, "Hello of node %s: decode its Node: %v", id.Name, err)
	}
	if node.Name != id.Name {
		return status.Errorf(codes.InvalidArgument, "Hello of node %s: its Node is called %q", id.Name, node.Name)
	}
	client, err := coreclient.NewForConfig(d.config.API(id.Name))
	if err != nil {
		return status.Errorf(codes.Internal, "API client of node %s: %v", id.Name, err)
	}
	s := &session{
		d: d, node: id.Name, instance: instance, log: d.log.With("node", id.Name), stream: stream, cancel: cancel, client: client,
		ended: ctx.Done(), wake: make(chan struct{}, 1), control: make(chan *pb.ControllerMessage, controlQueue),
		first: true, network: hello.GetNetwork(), bundles: hello.GetTrustBundles(), certs: hello.GetPodCertificates(), kinds: hello.GetKinds(),
	}
	s.writer = newWriter(s.log)
	if err := s.setKept(hello.GetGossipKeys()); err != nil {
		return err
	}
	if err := s.catchUp(ctx, hello); err != nil {
		return err
	}
	if err := s.claim(ctx, expires, key); err != nil {
		return err
	}
	s.d.active.Go(func() {
		select {
		case <-lost:
			cancel(errLost)
		case <-ctx.Done():
		}
	})
	return s.run(ctx, hello, node)
}

// catchUp waits until this replica is not behind the cluster, so that an agent
// never goes back in time, and decides what the agent has already.
func (s *session) catchUp(ctx context.Context, hello *pb.Hello) error {
	ctx, cancel := context.WithTimeout(ctx, barrierTimeout)
	defer cancel()
	if err := s.d.config.Barrier(ctx); err != nil {
		return status.Errorf(codes.Unavailable, "controller %s does not know whether it is up to date: %v", s.d.config.Name, err)
	}
	revision := s.d.config.Store.View().Revision()
	if err := s.d.config.Objects.WaitRevision(ctx, revision); err != nil {
		return status.Errorf(codes.Unavailable, "controller %s is still loading: %v", s.d.config.Name, err)
	}
	have := hello.GetHave()
	if hello.GetEpoch() == s.d.config.ClusterID && have.GetRevision() > revision {
		s.log.Warn("the agent has seen a later state than the cluster has, which lost some",
			"agent", have.GetRevision(), "cluster", revision)
	}
	s.full = hello.GetEpoch() != s.d.config.ClusterID || !usable(have)
	s.pods, s.objects = make(map[podKey]int64), make(map[objKey]int64)
	if !s.full {
		if err := s.compare(s.d.config.Objects.Snapshot(), have); err != nil {
			return status.Error(codes.Internal, err.Error())
		}
	}
	return nil
}

func (s *session) run(ctx context.Context, hello *pb.Hello, node *corev1.Node) error {
	start := time.Now()
	s.d.hub.add(s)
	s.log.Info("agent connected", "version", hello.GetVersion(), "full", s.full, "pods", len(s.pods), "objects", len(s.objects))
	var work sync.WaitGroup
	work.Go(func() { s.writer.run(ctx) })
	s.reportNode(node)
	// A Send or Recv that hangs ends when this function has returned; Run waits
	// for it.
	s.d.active.Go(func() { s.cancel(s.send(ctx)) })
	s.d.active.Go(func() { s.cancel(s.receive()) })
	<-ctx.Done()
	err := context.Cause(ctx)
	goodbye := s.goodbye.Load()
	s.d.hub.remove(s, goodbye)
	work.Wait()
	s.d.room.end(&s.reports.room)
	s.usage.set(nil, &s.d.usageBytes, 0)
	if goodbye || errors.Is(err, io.EOF) {
		s.log.Info("agent disconnected", "goodbye", goodbye, "after", time.Since(start).Round(time.Millisecond))
		return nil
	}
	s.log.Warn("agent's stream broke", "after", time.Since(start).Round(time.Millisecond), "err", err)
	if errors.Is(err, errReplaced) || errors.Is(err, errEnded) || errors.Is(err, errLost) {
		return status.Error(codes.Unavailable, err.Error())
	}
	return err
}

// receive takes what the agent says until the stream ends.
func (s *session) receive() error {
	var unknown sync.Once
	for {
		m, err := s.stream.Recv()
		if err != nil {
			return err
		}
		switch m := m.GetMessage().(type) {
		case *pb.AgentMessage_NodeStatus:
			node := &corev1.Node{}
			if err := node.Unmarshal(m.NodeStatus.GetNode()); err != nil {
				return status.Errorf(codes.InvalidArgument, "NodeStatus of %s: %v", s.node, err)
			}
			s.reportNode(node)
		case *pb.AgentMessage_PodStatus:
			if err := s.reportPod(m.PodStatus); errors.Is(err, errEnded) {
				return err
			} else if err != nil {
				return status.Error(codes.InvalidArgument, err.Error())
			}
		case *pb.AgentMessage_PodTerminated:
			s.reportTerminated(m.PodTerminated)
		case *pb.AgentMessage_Event:
			event := &corev1.Event{}
			if err := event.Unmarshal(m.Event.GetEvent()); err != nil {
				return status.Errorf(codes.InvalidArgument, "Event of %s: %v", s.node, err)
			}
			if err := s.reportEvent(event, len(m.Event.GetEvent())); err != nil {
				return err
			}
		case *pb.AgentMessage_Request:
			if err := s.request(m.Request, proto.Size(m.Request)); err != nil {
				return err
			}
		case *pb.AgentMessage_GossipKeysKept:
			if err := s.setKept(m.GossipKeysKept.GetIds()); err != nil {
				return err
			}
		case *pb.AgentMessage_Usage:
			s.reportUsage(m.Usage)
		case *pb.AgentMessage_CsiNode:
			if err := s.reportCSINode(m.CsiNode); err != nil {
				return status.Error(codes.InvalidArgument, err.Error())
			}
		case *pb.AgentMessage_Goodbye:
			s.goodbye.Store(true)
		default:
			unknown.Do(func() {
				s.log.Warn("unknown message of an agent; it may be newer than this controller", "type", fmt.Sprintf("%T", m))
			})
		}
	}
}

// tell queues a message besides the desired state. An agent that reads none of
// them for long is given up.
func (s *session) tell(m *pb.ControllerMessage) error {
	select {
	case s.control <- m:
		return nil
	default:
		err := fmt.Errorf("node %s does not read what it is sent", s.node)
		s.cancel(status.Error(codes.ResourceExhausted, err.Error()))
		return err
	}
}
