package dispatch

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"maps"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"timonel/pki"
	pb "timonel/proto/timonel/v1"
	"timonel/trust"
)

// A node's certificate may be on two machines: a disk was cloned, or stolen. One of
// their agents is served, and it is the one that was first, for as long as it has a
// stream to any controller:
//
//   - Each process of an agent draws an instance at its start. The state has that of
//     the process that is served ([trust.Registry.Admit]); a stream of another ends,
//     on whichever controller it is. So never two are served.
//   - Before a process takes the place of another, the controllers are asked whether
//     one of them serves that. An agent that was restarted finds that none does.
//   - Of one process, the newest stream to a controller counts.
//
// Agents of before there were instances say none. Each of their streams counts as a
// process of its own, and as nobody can tell one that moves from a second one, the
// newest of them is served, whichever controller it is to. It does not take the place
// of an agent that says its instance.

const (
	instanceMax = 64
	// namelessPrefix begins the instances that controllers give to streams that have
	// none. No agent may say one.
	namelessPrefix = "stream:"
)

// instanceOf is the process that a Hello comes from.
func instanceOf(hello *pb.Hello) (string, error) {
	switch instance := hello.GetInstance(); {
	case instance == "":
		return namelessPrefix + rand.Text(), nil
	case len(instance) > instanceMax:
		return "", status.Errorf(codes.InvalidArgument, "Hello of node %s: its instance has more than %d bytes", hello.GetNodeName(), instanceMax)
	case strings.HasPrefix(instance, namelessPrefix):
		return "", status.Errorf(codes.InvalidArgument, "Hello of node %s: an instance that begins with %q is a controller's to give", hello.GetNodeName(), namelessPrefix)
	default:
		return instance, nil
	}
}

func nameless(instance string) bool { return strings.HasPrefix(instance, namelessPrefix) }

var errSuperseded = status.Error(codes.FailedPrecondition, "another process with this node's certificate took over: if that was not to be, `timonel node revoke` the node, and join again under another name")

// claim makes a session the one of its node in the cluster, or says why not.
func (s *session) claim(ctx context.Context, expires time.Time, key string) error {
	d := s.d
	ctx, cancel := context.WithTimeout(ctx, barrierTimeout)
	defer cancel()
	if err := d.config.Trust.CheckNode(s.node, key); err != nil {
		return refusal(err)
	}
	if d.config.Trust.Instance(s.node) != s.instance {
		if wait, ok := d.starts.take(s.node); !ok {
			return status.Errorf(codes.ResourceExhausted, "agents of node %s start too often: try again in %s", s.node, wait.Round(time.Second))
		}
		if by, held := d.heldElsewhere(ctx, s.node, s.instance); held {
			s.log.Warn("refused a second agent with the certificate of a node that is connected", "to", by)
			return status.Errorf(codes.FailedPrecondition, "another agent with the certificate of node %s is connected to controller %s: stop one of them, or `timonel node revoke` the node if its key was stolen", s.node, by)
		}
	}
	err := d.config.Trust.Admit(ctx, trust.Admission{Node: s.node, Key: key, Expires: expires, Instance: s.instance})
	if err != nil {
		return refusal(err)
	}
	return nil
}

// Processes of one node that start: some at once, then one every three seconds, as
// each is recorded in the log.
const (
	startBurst = 10
	startEvery = 3 * time.Second
	// startsMax is from how many nodes on those are forgotten that may start a burst.
	startsMax = 1024
)

// starts counts processes of agents that start.
type starts struct {
	now func() time.Time

	mu    sync.Mutex
	nodes map[string]*bucket
}

func newStarts(now func() time.Time) *starts { return &starts{now: now, nodes: map[string]*bucket{}} }

// take says whether another process of a node may start, and if not, when.
func (s *starts) take(node string) (wait time.Duration, ok bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	now := s.now()
	b := s.nodes[node]
	if b == nil {
		if len(s.nodes) >= startsMax {
			maps.DeleteFunc(s.nodes, func(_ string, b *bucket) bool { return !b.full.After(now) })
		}
		b = &bucket{every: startEvery, burst: startBurst}
		s.nodes[node] = b
	}
	if b.take(now) {
		return 0, true
	}
	return b.wait(now), false
}

// heldElsewhere asks all controllers, this one included, whether they serve another
// process of a node. One that does not answer in time does not count: should it
// serve one, that stream ends when it hears from the log who was admitted.
func (d *Dispatcher) heldElsewhere(ctx context.Context, node, instance string) (controller string, held bool) {
	if d.hub.holds(node, instance) {
		return d.config.Name, true
	}
	ctx, cancel := context.WithTimeout(ctx, claimTimeout)
	defer cancel()
	peers := d.peers()
	answers := make(chan string, len(peers))
	for _, peer := range peers {
		go func() {
			answer := ""
			if cc, err := d.config.PeerConn(ctx, peer); err == nil {
				r, err := pb.NewPeersClient(cc).Claim(ctx, &pb.ClaimRequest{NodeName: node, Instance: instance})
				if err == nil && r.GetHeld() {
					answer = peer
				}
			}
			answers <- answer
		}()
	}
	for range peers {
		if peer := <-answers; peer != "" {
			return peer, true
		}
	}
	return "", false
}

// Claim is another controller that is about to serve a process of a node.
func (d *Dispatcher) Claim(_ context.Context, r *pb.ClaimRequest) (*pb.ClaimResponse, error) {
	return &pb.ClaimResponse{Held: d.hub.holds(r.GetNodeName(), r.GetInstance())}, nil
}

// holds says whether another process of a node is served here, whose place that of
// instance must not take.
func (h *hub) holds(node, instance string) bool {
	s := h.session(node)
	return s != nil && s.instance != instance && !(nameless(s.instance) && nameless(instance))
}

// watchTrust ends what the replicated state does not let go on.
func (d *Dispatcher) watchTrust(ctx context.Context) error {
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error { return d.guard.Run(ctx) })
	group.Go(func() error { return d.config.Trust.Follow(ctx, d.hub.admitted) })
	err := group.Wait()
	if errors.Is(err, context.Canceled) {
		return nil
	}
	return err
}

// admitted ends the sessions of processes that are not their nodes' any more, and has
// the others told of new keys.
func (h *hub) admitted(c trust.Changes) {
	if c.Reset || c.Gossip {
		h.updateKeys()
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if c.Reset {
		for _, s := range h.sessions {
			h.checkAdmitted(s)
		}
		return
	}
	for _, node := range c.Nodes {
		if s := h.sessions[node]; s != nil {
			h.checkAdmitted(s)
		}
	}
}

func (h *hub) checkAdmitted(s *session) {
	if h.d.config.Trust.Instance(s.node) != s.instance {
		s.cancel(errSuperseded)
	}
}

// peerLeaf is the certificate's end and key of a node that was authorized.
func peerLeaf(ctx context.Context) (expires time.Time, key string, err error) {
	cert, err := pki.PeerCertificate(ctx)
	if err != nil {
		return time.Time{}, "", err
	}
	if cert == nil {
		return time.Time{}, "", fmt.Errorf("the caller has no certificate")
	}
	return cert.NotAfter, trust.KeyOf(cert), nil
}
