package gossip

import (
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"net/netip"
	"strconv"
	"time"

	"github.com/hashicorp/memberlist"
)

// Roles of a member.
const (
	RoleController = "controller"
	RoleAgent      = "agent"
)

// DefaultPort is where a pool listens, UDP and TCP.
const DefaultPort = 7946

// Config says how to take part in a pool.
type Config struct {
	Name      string            // unique in the pool
	Role      string            // RoleController or RoleAgent
	ClusterID string            // members with another one are refused
	Keys      [][]byte          // AES-256, 32 bytes each: the first seals, any opens; the same for all but while they change
	BindAddr  string            // IP address to listen on; "0.0.0.0" when empty
	Port      int               // UDP and TCP, to listen on and to advertise; 0 lets the system choose
	Join      []string          // host:port of members to call; tried again until they are there
	Tags      map[string]string // what others see of this member; with the rest at most 512 bytes
	Logger    *slog.Logger      // slog.Default() when nil

	// AdvertiseAddr is the IP address that others reach this member at.
	// Default: BindAddr, or a private address of this machine.
	AdvertiseAddr string

	// Watch makes this member ping the others itself, so that it sees Suspect.
	// Default by role: controllers watch, agents do not.
	Watch *bool

	// Admit says why a name may not be in the pool as a role, at an address. Whom it
	// refuses is not counted, not remembered and not told of. It is asked about each
	// thing that is said of a member, with locks held: it must be quick and call
	// nothing of the pool. Nil: whoever has a key may.
	Admit func(name, role string, addr netip.AddrPort) error
	// Seeds are further addresses to call, as Join, as they are now. Nil: none.
	Seeds func() []string
	// MaxMembers bounds the members, the dead included. Default 8192.
	MaxMembers int
	// MaxReceiveBytes bounds what is held of messages on connections that others
	// opened. Default 32 MiB, and no less than one message of MaxMembers takes.
	MaxReceiveBytes int

	Timings Timings // the zero value means DefaultTimings

	transport memberlist.NodeAwareTransport // tests cut it
}

// Timings are how fast a pool notices. Faster costs packets, and false alarms
// on machines that are short of CPU.
type Timings struct {
	ProbeInterval  time.Duration // each member probes one other this often; 500 ms
	ProbeTimeout   time.Duration // a ping not answered for this long has failed; 250 ms
	SuspicionMult  int           // dead after suspicion of ProbeInterval × this × log10(members); 3
	GossipInterval time.Duration // news is passed on this often; 100 ms
	PushPull       time.Duration // two members compare all they know this often; 15 s
	RejoinInterval time.Duration // lost members and seeds are called again this often; 2 s
	StreamTimeout  time.Duration // for connections between members; 2 s
	KeepDead       time.Duration // a dead member is remembered and called for this long; 24 h
}

// DefaultTimings tell of a dead member within about 1 s (Suspect) and 4 s (Dead)
// in a small cluster.
func DefaultTimings() Timings {
	return Timings{
		ProbeInterval:  500 * time.Millisecond,
		ProbeTimeout:   250 * time.Millisecond,
		SuspicionMult:  3,
		GossipInterval: 100 * time.Millisecond,
		PushPull:       15 * time.Second,
		RejoinInterval: 2 * time.Second,
		StreamTimeout:  2 * time.Second,
		KeepDead:       24 * time.Hour,
	}
}

// Validate returns an error that names the first field that cannot be used.
func (c *Config) Validate() error {
	switch {
	case c.Name == "":
		return errors.New("gossip config: Name is empty")
	case c.Role != RoleController && c.Role != RoleAgent:
		return fmt.Errorf("gossip config: Role is %q instead of %q or %q", c.Role, RoleController, RoleAgent)
	case c.ClusterID == "":
		return errors.New("gossip config: ClusterID is empty")
	case checkKeys(c.Keys) != nil:
		return fmt.Errorf("gossip config: Keys: %w", checkKeys(c.Keys))
	case c.MaxMembers < 0:
		return fmt.Errorf("gossip config: MaxMembers is %d", c.MaxMembers)
	case c.MaxReceiveBytes < 0:
		return fmt.Errorf("gossip config: MaxReceiveBytes is %d", c.MaxReceiveBytes)
	case c.BindAddr != "" && net.ParseIP(c.BindAddr) == nil:
		return fmt.Errorf("gossip config: BindAddr %q is not an IP address", c.BindAddr)
	case c.AdvertiseAddr != "" && net.ParseIP(c.AdvertiseAddr) == nil:
		return fmt.Errorf("gossip config: AdvertiseAddr %q is not an IP address", c.AdvertiseAddr)
	case c.Port < 0 || c.Port > 65535:
		return fmt.Errorf("gossip config: Port %d is not between 0 and 65535", c.Port)
	}
	for i, seed := range c.Join {
		host, port, err := net.SplitHostPort(seed)
		if err != nil || host == "" {
			return fmt.Errorf("gossip config: Join[%d] %q is not host:port", i, seed)
		}
		if n, err := strconv.Atoi(port); err != nil || n < 1 || n > 65535 {
			return fmt.Errorf("gossip config: Join[%d] %q: port %q is not between 1 and 65535", i, seed, port)
		}
	}
	t := &c.Timings
	if *t != (Timings{}) {
		for _, d := range []struct {
			name  string
			value time.Duration
		}{
			{"ProbeInterval", t.ProbeInterval}, {"ProbeTimeout", t.ProbeTimeout}, {"GossipInterval", t.GossipInterval},
			{"PushPull", t.PushPull}, {"RejoinInterval", t.RejoinInterval}, {"StreamTimeout", t.StreamTimeout}, {"KeepDead", t.KeepDead},
		} {
			if d.value <= 0 {
				return fmt.Errorf("gossip config: Timings.%s is %s, it must be above 0", d.name, d.value)
			}
		}
		if t.SuspicionMult < 1 {
			return fmt.Errorf("gossip config: Timings.SuspicionMult is %d, it must be at least 1", t.SuspicionMult)
		}
		if t.ProbeTimeout >= t.ProbeInterval {
			return fmt.Errorf("gossip config: Timings.ProbeTimeout %s is not below ProbeInterval %s", t.ProbeTimeout, t.ProbeInterval)
		}
	}
	_, err := meta{Role: c.Role, Cluster: c.ClusterID, Tags: c.Tags}.encode()
	return err
}

func (c *Config) withDefaults() Config {
	out := *c
	if out.Timings == (Timings{}) {
		out.Timings = DefaultTimings()
	}
	if out.BindAddr == "" {
		out.BindAddr = "0.0.0.0"
	}
	if out.MaxMembers == 0 {
		out.MaxMembers = 8192
	}
	if out.MaxReceiveBytes == 0 {
		out.MaxReceiveBytes = 32 << 20
	}
	out.MaxReceiveBytes = max(out.MaxReceiveBytes, 3*out.maxState())
	if out.Logger == nil {
		out.Logger = slog.Default()
	}
	if out.Watch == nil {
		watch := out.Role == RoleController
		out.Watch = &watch
	}
	out.Tags = maps.Clone(c.Tags)
	return out
}

// memberlist returns the config of the library, with the transport that is open on
// the port.
func (c *Config) memberlist(p *Pool, transport memberlist.Transport, port int) *memberlist.Config {
	m := memberlist.DefaultLANConfig()
	m.Name = c.Name
	m.BindAddr, m.BindPort = c.BindAddr, port
	m.AdvertiseAddr, m.AdvertisePort = c.AdvertiseAddr, port
	if m.AdvertiseAddr == "" && c.BindAddr != "0.0.0.0" && c.BindAddr != "::" {
		m.AdvertiseAddr = c.BindAddr
	}
	m.Transport = transport // which seals
	m.UDPBufferSize -= sealSize
	m.ProbeInterval, m.ProbeTimeout = c.Timings.ProbeInterval, c.Timings.ProbeTimeout
	m.SuspicionMult, m.SuspicionMaxTimeoutMult = c.Timings.SuspicionMult, 2
	// Each message that is compressed takes a writer of 100 KB, pings too: two MB a second.
	m.EnableCompression = false
	m.GossipInterval, m.PushPullInterval = c.Timings.GossipInterval, c.Timings.PushPull
	m.TCPTimeout = c.Timings.StreamTimeout
	// A member that finds itself slow doubts itself at most this much, so that
	// detection stays a matter of seconds.
	m.AwarenessMaxMultiplier = 3
	// A machine that came back with another address may have its name again
	// once the old one is dead.
	m.DeadNodeReclaimTime = time.Millisecond
	m.Logger = newBridge(c.Logger, p)
	m.Delegate, m.Events, m.Conflict = delegate{p}, delegate{p}, delegate{p}
	m.Merge, m.Alive, m.Ping = delegate{p}, delegate{p}, delegate{p}
	return m
}
