package stream

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"slices"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/status"
	corev1 "k8s.io/api/core/v1"
	storagev1 "k8s.io/api/storage/v1"
	"k8s.io/apimachinery/pkg/util/uuid"

	"timonel/agent/desired"
	pb "timonel/proto/timonel/v1"
)

// Config describes one agent's stream.
type Config struct {
	NodeName string
	Version  string
	// TLS authenticates the node to controllers and controllers to the node.
	TLS *tls.Config
	// Controllers are host:port of the cluster ports known at start; the list
	// follows what controllers say.
	Controllers []string
	// Desired receives what the controllers want.
	Desired *desired.Store
	// Tunnel serves one tunneled connection and owns it.
	Tunnel func(target string, conn net.Conn)
	// Cluster hears where controllers and other nodes are.
	Cluster func(*pb.Cluster)
	// Node hears what the API says of this node: labels, taints, allocatable.
	Node func(*corev1.Node)
	// Network takes what the controller says of the cluster's network, over the same
	// connection, until ctx ends. Nil: this agent does not ask.
	Network func(ctx context.Context, agents pb.AgentsClient)
	// GossipKeys keeps the keys of gossip that a controller tells; GossipKeyIDs names
	// those that are kept. Nil: there are none to keep.
	GossipKeys   func(keys [][]byte) error
	GossipKeyIDs func() []string
	// DialTimeout bounds the attempt on one controller, up to its Welcome.
	// Default 2 s.
	DialTimeout time.Duration
	Logger      *slog.Logger
}

// Client keeps a stream to some controller. Its methods are safe for
// concurrent use and do not wait for the network, but for Token.
type Client struct {
	cfg Config
	log *slog.Logger
	out *outbox
	// instance names this process to the controllers, which serve one of a node.
	instance string

	mu          sync.Mutex
	controllers []string
	session     *session        // nil while disconnected
	since       time.Time       // when session was set or lost
	tried       map[string]bool // in this round

	ends sync.WaitGroup // of sessions whose tunnels go on
}

// New returns a client that is not connected yet.
func New(cfg Config) *Client {
	if cfg.DialTimeout == 0 {
		cfg.DialTimeout = 2 * time.Second
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.Default()
	}
	return &Client{
		cfg: cfg, log: cfg.Logger.With("component", "stream"), out: newOutbox(), instance: string(uuid.NewUUID()),
		controllers: slices.Clone(cfg.Controllers), since: time.Now(), tried: map[string]bool{},
	}
}

// Connected says whether a controller is connected, and since when that is so.
func (c *Client) Connected() (controller string, since time.Time, ok bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.session == nil {
		return "", c.since, false
	}
	return c.session.controller, c.since, true
}

// Run keeps a stream open until ctx ends; it then says goodbye, so that the
// controllers know that the silence is planned.
func (c *Client) Run(ctx context.Context) error {
	defer c.ends.Wait()
	failures := 0
	lastError := ""
	for ctx.Err() == nil {
		addr := c.pick()
		if addr == "" {
			return errors.New("no controller is known: give --controllers host:port,…")
		}
		connected, err := c.connect(ctx, addr)
		if ctx.Err() != nil {
			return nil
		}
		if connected {
			failures, lastError = 0, ""
			c.mu.Lock()
			c.tried = map[string]bool{addr: true}
			c.mu.Unlock()
			c.log.Warn("the stream to the controller broke; trying another", "address", addr, "error", short(err))
		} else {
			failures++
			if text := short(err); text != lastError {
				c.log.Warn("cannot connect to the controller", "address", addr, "error", text)
				lastError = text
			}
		}
		pause(ctx, c.delay(failures))
	}
	return nil
}

// delay is nothing for the first round over all controllers, then grows.
func (c *Client) delay(failures int) time.Duration {
	n := c.known()
	jitter := time.Duration(rand.Int64N(int64(50 * time.Millisecond)))
	if failures < n {
		return jitter
	}
	round := min(failures/max(n, 1), 5)
	return time.Duration(round)*200*time.Millisecond + 2*jitter
}

// pick chooses the controller to try: each that was last heard of once, in random
// order, then those that were given at the start, then anew. So one that is in touch is
// found in one round, and one that was cut off and knows of itself alone cannot keep an
// agent.
func (c *Client) pick() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	untried := func(addrs []string) []string {
		return slices.DeleteFunc(slices.Clone(addrs), func(a string) bool { return c.tried[a] })
	}
	left := untried(c.controllers)
	if len(left) == 0 {
		left = untried(c.cfg.Controllers)
	}
	if len(left) == 0 {
		if left = c.controllers; len(left) == 0 {
			return ""
		}
		c.tried = map[string]bool{}
	}
	addr := left[rand.IntN(len(left))]
	c.tried[addr] = true
	return addr
}

// known is how many controllers there are to try.
func (c *Client) known() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	all := slices.Concat(c.controllers, c.cfg.Controllers)
	slices.Sort(all)
	return len(slices.Compact(all))
}

// maxTold bounds the controllers that a controller tells of.
const maxTold = 64

// setControllers takes the list that a controller sent. Those that the agent was given
// at its start are tried too, whoever sends what: see pick.
func (c *Client) setControllers(addrs []string) {
	var next []string
	for _, addr := range addrs[:min(len(addrs), maxTold)] {
		if _, _, err := net.SplitHostPort(addr); err == nil && !slices.Contains(next, addr) {
			next = append(next, addr)
		}
	}
	if len(next) == 0 {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.controllers = next
}

func (c *Client) setSession(s *session) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.session, c.since = s, time.Now()
}

// connect runs one stream to its end. connected says whether the controller
// had said Welcome.
func (c *Client) connect(ctx context.Context, addr string) (connected bool, err error) {
	conn, err := c.dial(addr, pb.DialOptions())
	if err != nil {
		return false, err
	}
	carrier, err := c.dial(addr, pb.TunnelDialOptions())
	if err != nil {
		conn.Close()
		return false, err
	}
	s := &session{client: c, address: addr, agents: pb.NewAgentsClient(conn), carrier: pb.NewAgentsClient(carrier)}
	defer c.ends.Go(func() {
		conn.Close()
		s.tunnels.Wait()
		carrier.Close()
	})
	return s.run(ctx)
}

func (c *Client) dial(addr string, options []grpc.DialOption) (*grpc.ClientConn, error) {
	conn, err := grpc.NewClient("passthrough:///"+addr,
		append(options, grpc.WithTransportCredentials(credentials.NewTLS(c.cfg.TLS)))...)
	if err != nil {
		return nil, fmt.Errorf("controller %s: %w", addr, err)
	}
	return conn, nil
}

// SetNode queues the node's new labels or status.
func (c *Client) SetNode(node *corev1.Node) { c.out.setNode(node) }

// SetUsage queues what the node takes now, an encoded Usage.
func (c *Client) SetUsage(raw []byte) { c.out.setUsage(&pb.UsageReport{Usage: raw}) }

// SetCSINode queues which CSI drivers the node has, and those that it had since the agent
// started. It is said again to each controller that is connected to.
func (c *Client) SetCSINode(node *storagev1.CSINode, gone []string) {
	raw, err := node.Marshal()
	if err == nil && len(raw) > pb.MaxCSINode {
		err = fmt.Errorf("it has %d bytes, controllers take %d", len(raw), pb.MaxCSINode)
	}
	if err != nil {
		c.log.Error("which CSI drivers there are is not said", "error", err)
		return
	}
	c.out.setCSINode(&pb.CSINodeReport{CsiNode: raw, Gone: gone})
}

// SetPodStatus queues a pod's new status. The newest status of every pod is
// sent again to each controller that is connected to.
func (c *Client) SetPodStatus(pod *corev1.Pod, status *corev1.PodStatus) {
	if err := c.out.setStatus(pod, status); err != nil {
		c.log.Error("a pod's status is not sent", "pod", pod.Namespace+"/"+pod.Name, "uid", pod.UID, "error", err)
	}
}

// PodTerminated queues the news that nothing of a deleted pod runs any more. It
// is repeated to each controller until the pod is removed.
func (c *Client) PodTerminated(pod *corev1.Pod) { c.out.setTerminated(pod) }

// ForgetPod drops what is kept of a pod that was removed.
func (c *Client) ForgetPod(pod *corev1.Pod) { c.out.forget(pod.UID) }

// Event queues an event. While no controller is reachable the oldest are
// dropped.
func (c *Client) Event(e *corev1.Event) { c.out.addEvent(e) }

func pause(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
	case <-t.C:
	}
}

// short is an error's message without gRPC's prefix.
func short(err error) string {
	if err == nil {
		return "the controller closed it"
	}
	if s, ok := status.FromError(err); ok {
		return s.Message()
	}
	return err.Error()
}
