package dispatch

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/health"
	healthv1 "google.golang.org/grpc/health/grpc_health_v1"
	"k8s.io/client-go/rest"

	"timonel/dispatch/network"
	"timonel/gossip"
	"timonel/network/feed/wire"
	"timonel/pki"
	pb "timonel/proto/timonel/v1"
	"timonel/state"
	"timonel/state/objects"
	"timonel/trust"
)

// Gossip is what of the gossip pool is needed. [gossip.Pool] has it.
type Gossip interface {
	Members() []gossip.Member
	Subscribe(ctx context.Context) <-chan gossip.Event
	Probe(ctx context.Context, name string) (time.Duration, error)
	ProbeAddr(ctx context.Context, name, addr string) (time.Duration, error)
}

var _ Gossip = (*gossip.Pool)(nil)

// Config says what a Dispatcher works with. All fields are required unless they
// have a default.
type Config struct {
	Name      string // this controller's
	ClusterID string
	Store     *state.Store
	Objects   *objects.Cache // of the same store, running
	// Barrier returns when this replica has applied all that was committed when
	// it was called.
	Barrier func(ctx context.Context) error
	// InTouch says whether Store is what the cluster has, but for a moment. lost is
	// closed when it is not any more: agents' streams end then, so that they go elsewhere.
	InTouch func() (lost <-chan struct{}, err error)
	// API is the API in memory as user system:node:NAME of group system:nodes. It
	// is called after Run was.
	API    func(node string) *rest.Config
	Bundle *pki.Bundle
	// Trust says who is who, of the same state.
	Trust  *trust.Registry
	Gossip Gossip
	// PeerConn connects to another controller's cluster port. The connection is
	// shared and not closed here.
	PeerConn func(ctx context.Context, name string) (grpc.ClientConnInterface, error)
	// Controllers lists the cluster ports (host:port) of the controllers that are
	// alive, this one included.
	Controllers func() []string
	// Status is what `timonel status` shows of this controller; Agents is filled
	// in here.
	Status func(ctx context.Context) *pb.StatusResponse
	// Keys is what this controller knows of its own keys of gossip. Default: nothing.
	Keys Keys
	// Network says what of the Nodes' addresses and pod ranges other nodes are told.
	Network Network
	// TunnelConn gives a connection to another controller that carries tunnels, with
	// [pb.TunnelDialOptions]. Default: PeerConn.
	TunnelConn func(ctx context.Context, name string) (grpc.ClientConnInterface, error)
	// UsageBytes bounds what agents here said that their nodes take, in bytes. What is
	// above that is not kept, and those nodes have no metrics here. Default 64 MiB.
	UsageBytes int64
	// ReportBytes bounds what all agents here said and is not written yet. Beyond it,
	// and beyond 4 MiB of one agent, agents wait. Default 64 MiB.
	ReportBytes int64
	// NetworkBytes bounds what every node is told of Services, slices and nodes; a fourth of
	// it is one namespace's at most. Default [wire.MaxBytes], which is also the most.
	NetworkBytes int64
	// NodeLifetime is how long nodes' certificates are valid. Default
	// [pki.NodeLifetime].
	NodeLifetime time.Duration
	// Logger defaults to slog.Default().
	Logger *slog.Logger
}

// Validate returns an error that names the first field that is missing.
func (c *Config) Validate() error {
	for _, f := range []struct {
		name    string
		missing bool
	}{
		{"Name", c.Name == ""}, {"ClusterID", c.ClusterID == ""}, {"Store", c.Store == nil}, {"Objects", c.Objects == nil},
		{"Barrier", c.Barrier == nil}, {"InTouch", c.InTouch == nil}, {"API", c.API == nil}, {"Bundle", c.Bundle == nil}, {"Trust", c.Trust == nil}, {"Gossip", c.Gossip == nil},
		{"PeerConn", c.PeerConn == nil}, {"Controllers", c.Controllers == nil}, {"Status", c.Status == nil},
	} {
		if f.missing {
			return fmt.Errorf("dispatch config: %s is missing", f.name)
		}
	}
	return nil
}

// Times that are the same for all.
const (
	barrierTimeout = 1500 * time.Millisecond // an agent waits 2 s for its Welcome before it tries another controller
	networkTimeout = 10 * time.Second        // for a controller to have read all Services
	claimTimeout   = 700 * time.Millisecond  // for another controller to say whether it serves the same node
	tunnelTimeout  = 10 * time.Second        // for an agent to dial back
	peerTimeout    = 3 * time.Second         // for another controller to open a tunnel
	heartbeat      = 500 * time.Millisecond  // of Peers.Sessions when there is nothing to say
	peerSilence    = 2 * time.Second         // after which a Peers.Sessions stream is given up
	clusterDelay   = 200 * time.Millisecond  // in which changes of routes are merged
	progressEvery  = 4096                    // revisions after which an agent is told that nothing concerned it
)

// Dispatcher serves the agents that dialed this controller, and the other
// controllers' questions about them.
type Dispatcher struct {
	pb.UnimplementedAgentsServer
	pb.UnimplementedPeersServer

	config  Config
	log     *slog.Logger
	hub     *hub
	tunnels *tunnels
	room    *room // for what agents report
	joins   *attempts
	starts  *starts
	guard   *trust.Guard
	network *network.Feed

	usageBytes atomic.Int64 // of what agents said that their nodes take

	running atomic.Pointer[context.Context] // Run's; nil before
	active  sync.WaitGroup                  // calls that hold on to what Run ends
	mu      sync.Mutex                      // guards the step from serving to ended
	ended   bool
}

var errEnded = errors.New("this controller is stopping")

// New returns a dispatcher that serves nothing until Run is called.
func New(c Config) (*Dispatcher, error) {
	if err := c.Validate(); err != nil {
		return nil, err
	}
	if c.TunnelConn == nil {
		c.TunnelConn = c.PeerConn
	}
	if c.UsageBytes <= 0 {
		c.UsageBytes = defaultUsage
	}
	if c.ReportBytes <= 0 {
		c.ReportBytes = defaultReports
	}
	if c.NetworkBytes <= 0 || c.NetworkBytes > wire.MaxBytes {
		c.NetworkBytes = wire.MaxBytes
	}
	if c.NodeLifetime == 0 {
		c.NodeLifetime = pki.NodeLifetime
	}
	if c.Logger == nil {
		c.Logger = slog.Default()
	}
	d := &Dispatcher{
		config: c, log: c.Logger.With("room", "dispatch"),
		tunnels: newTunnels(),
		room:    newRoom(c.ReportBytes),
		joins:   newAttempts(time.Now),
		starts:  newStarts(time.Now),
		guard:   trust.NewGuard(c.Trust),
	}
	d.network = network.New(network.Config{ClusterID: c.ClusterID, Objects: c.Objects, Checks: c.Network, Bytes: c.NetworkBytes, Logger: d.log})
	d.hub = newHub(d)
	return d, nil
}

// UsageBytes is how much is kept of what agents said that their nodes take.
func (d *Dispatcher) UsageBytes() int64 { return d.usageBytes.Load() }

// ReportBytes is how many bytes of what agents said wait to be written.
func (d *Dispatcher) ReportBytes() int64 { return d.room.bytes() }

// NetworkFigures are those of what nodes are told of the network.
func (d *Dispatcher) NetworkFigures() network.Figures { return d.network.Figures() }

// Register adds the services Agents, Peers and Health, which says that the port
// answers, to a server made with [Dispatcher.NewPort].
func (d *Dispatcher) Register(r grpc.ServiceRegistrar) {
	healthv1.RegisterHealthServer(r, health.NewServer())
	pb.RegisterAgentsServer(r, d)
	pb.RegisterPeersServer(r, d)
}

// Run follows the objects and serves until ctx ends, whose error it returns
// after all streams have ended.
func (d *Dispatcher) Run(ctx context.Context) error {
	ctx, cancel := context.WithCancelCause(ctx)
	d.running.Store(&ctx)
	var wait sync.WaitGroup
	wait.Go(func() {
		if err := d.watchTrust(ctx); err != nil && ctx.Err() == nil {
			cancel(err)
		}
	})
	wait.Go(func() { _ = d.network.Run(ctx) }) // ends with ctx alone
	err := d.hub.run(ctx)
	d.mu.Lock()
	d.ended = true
	d.mu.Unlock()
	cancel(errEnded)
	wait.Wait()
	d.active.Wait()
	return err
}

// serve ties a call to Run: the returned context is the call's and ends with
// Run. done must be called when the call ends.
func (d *Dispatcher) serve(call context.Context) (ctx context.Context, cancel context.CancelCauseFunc, done func(), err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	running := d.running.Load()
	if running == nil {
		return nil, nil, nil, errors.New("this controller is starting")
	}
	if d.ended || (*running).Err() != nil {
		return nil, nil, nil, errEnded
	}
	ctx, cancel = context.WithCancelCause(call)
	stop := context.AfterFunc(*running, func() { cancel(errEnded) })
	d.active.Add(1)
	return ctx, cancel, func() { stop(); cancel(nil); d.active.Done() }, nil
}
