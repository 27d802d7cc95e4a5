package consensus

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"log/slog"
	"net"
	"slices"
	"strconv"
	"strings"
	"time"

	"google.golang.org/grpc"
)

// Server is one member of the Raft configuration, or a candidate for it.
type Server struct {
	// ID is the replica's name, e.g. "c1".
	ID string
	// Addr is the host:port of its Raft listener.
	Addr string
}

// Config says how one replica runs. Zero values mean the default that the
// field names; Open fills them in.
type Config struct {
	// ID is this replica's name: unique in the cluster, the same after every
	// restart. Required; letters, digits, '.', '-' and '_' only.
	ID string
	// ClusterID names the cluster. A data folder or a peer of another cluster is
	// refused. Required.
	ClusterID string
	// DataDir is the folder of the log, the votes and the snapshots. It is
	// created when missing and belongs to one process at a time. Required.
	DataDir string

	// LogStore says how the log is kept: LogStoreBolt or LogStoreWAL. The same for
	// the life of a data folder. Default LogStoreBolt.
	LogStore string

	// BindAddress is the host:port to listen on for Raft. Default ":7444".
	BindAddress string
	// AdvertiseAddress is the host:port that other replicas dial. Default: the
	// address the listener got, which must not be unspecified (0.0.0.0).
	AdvertiseAddress string
	// Listener, if not nil, is used instead of opening BindAddress. Close
	// closes it.
	Listener net.Listener
	// TLS holds this replica's certificate (Certificates or GetCertificate and
	// GetClientCertificate) and the cluster's CA (RootCAs; ClientCAs defaults to
	// the same). Both ends always present a certificate. Required.
	TLS *tls.Config
	// VerifyPeer decides on a peer's certificate, already verified against the
	// CA, and the replica name that the peer claims. Default: organisation
	// "timonel:controllers" and common name "timonel:controller:<id>".
	VerifyPeer func(cert *x509.Certificate, id string) error

	// PeerConn gives a connection to another replica's cluster port, where its
	// Register was called. The connection stays the caller's, which may share
	// and reuse it. Required when the cluster has more than one replica.
	PeerConn func(ctx context.Context, id string) (grpc.ClientConnInterface, error)
	// Peers returns the replicas that are known to be there, this one included
	// or not, with the Raft address each has now: usually what gossip sees. It
	// is called often and must return at once. Default: none.
	Peers func() []Server
	// BootstrapExpect is how many replicas found the cluster: 1, 3 or 5. A
	// replica without data waits until it sees that many, all without data, and
	// starts the log with them; it joins the existing cluster instead when any
	// peer has data. 0: never found a cluster, only join. All replicas need the
	// same value. Default 0.
	BootstrapExpect int

	// HeartbeatTimeout is how long a follower waits without contact before it
	// stands for election; the leader sends ten times as often. A leader whose
	// process died is noticed by its closed connections, long before. Default
	// 1 s.
	HeartbeatTimeout time.Duration
	// ElectionTimeout is how long a candidate waits for votes before it tries
	// again. At least HeartbeatTimeout. Default 1 s.
	ElectionTimeout time.Duration
	// LeaderLeaseTimeout is how long a leader stays one without contact to a
	// majority. At most HeartbeatTimeout. Default 1 s.
	LeaderLeaseTimeout time.Duration
	// CommitTimeout is how often an idle leader sends its commit index. It does
	// not delay commits, which are announced at once. Default 50 ms.
	CommitTimeout time.Duration
	// TouchTimeout is how long a replica without contact to a leader, or a leader
	// without contact to a majority, goes on serving from its state: see InTouch. It
	// should outlast an election: a leader that is gone is noticed after
	// HeartbeatTimeout, and one vote may fail. At least HeartbeatTimeout. Default
	// HeartbeatTimeout and twice ElectionTimeout.
	TouchTimeout time.Duration
	// ElectionStagger is by how much followers that saw the leader's process die
	// wait for one another, in the order of their names. Default 150 ms.
	ElectionStagger time.Duration
	// ProposeTimeout bounds Apply and ReadBarrier when their context has no
	// earlier deadline, waiting for a leader included. Default 10 s.
	ProposeTimeout time.Duration
	// TransportTimeout bounds one Raft message and its answer; that of a
	// snapshot grows with its size. Default 5 s.
	TransportTimeout time.Duration
	// DialTimeout bounds connecting to a peer, TLS included. Default 1 s.
	DialTimeout time.Duration

	// MaxAppendEntries is how many log entries share one append, and so one
	// fsync and one message. 1 to 1024. Default 512.
	MaxAppendEntries int
	// MaxAppendBytes is how many bytes of entries share one message to a follower; one
	// entry may be larger. Default 4 MiB.
	MaxAppendBytes int64
	// MaxCommandBytes is the longest command that Apply takes. The default fits
	// into gRPC's default limit of 4 MiB for a message. Default 3.5 MiB.
	MaxCommandBytes int
	// LogCacheBytes is how much of the newest entries stays in memory, for followers
	// and for the state machine. Default 32 MiB.
	LogCacheBytes int64
	// QueueBytes is from how many bytes on that a leader has appended and that are not
	// on its disk yet it appends no more until they are: see Replica.Held. Default 64 MiB.
	QueueBytes int64
	// ProposalBytes is how many bytes of commands may be on their way to the log of a
	// leader, from Apply until they are applied: a fifth of it for the callers of each
	// replica. Who comes beyond that waits, small commands for small ones only. Default
	// 40 MiB.
	ProposalBytes int64
	// ApplyBytes is how many bytes of committed entries are in memory for a state machine
	// that is behind; the rest is read again when it comes to them. Default 16 MiB.
	ApplyBytes int64
	// SnapshotInterval is how often to look whether a snapshot is due; each
	// time is drawn between this and its double. Default 60 s.
	SnapshotInterval time.Duration
	// SnapshotThreshold is after how many new entries one is due. Default 10000.
	SnapshotThreshold uint64
	// SnapshotBytes is after how many bytes of new entries one is due, however few they
	// are, if they are as many as the last snapshot has. Default 256 MiB.
	SnapshotBytes int64
	// TrailingLogs is how many entries stay in the log after a snapshot, for
	// followers that were away shortly. Default 10000.
	TrailingLogs uint64
	// TrailingBytes is how many bytes these take at most. Default 128 MiB.
	TrailingBytes int64
	// SnapshotRetain is how many snapshots to keep. Default 2.
	SnapshotRetain int

	// SlowFsync is the fsync time measured at start above which the disk is
	// called slow in Status and in the log. Default 10 ms.
	SlowFsync time.Duration
	// DiskStallTimeout is how long one write to the log may take before this
	// replica gives up leadership. Default 2 s.
	DiskStallTimeout time.Duration

	// UpkeepInterval is how often the leader looks after the members (promotes
	// who caught up, corrects addresses), and a replica without data looks for
	// its cluster. Default 300 ms.
	UpkeepInterval time.Duration

	// StabilizationTime is how long a non-voter has to be caught up before the
	// leader makes it a voter. Default 2 s.
	StabilizationTime time.Duration
	// DeadMemberCleanupAfter is how long a member that Peers does not know and
	// that no heartbeat reaches stays one when others have taken its place: see
	// cleanUp. Default 0: for ever.
	DeadMemberCleanupAfter time.Duration

	// FingerprintInterval is how often the leader compares the replicas' states,
	// if the FSM is a Fingerprinter and has changed. Default 10 s; negative:
	// never.
	FingerprintInterval time.Duration

	// Admit, if not nil, is asked on the leader for each command, forwarded ones
	// included, before it is proposed. It returns what to call when it is known what
	// became of it, or an error, with which Apply then fails ([ErrRefused]). It must
	// return at once. Default: every command passes.
	Admit func(command []byte) (settled func(), err error)

	// Version of the program, told to whoever lists the members.
	Version string
	// NewestVersion is the newest cluster version that this program can run under, 1
	// to 2. Default 2, the newest this package knows. Less is for tests of upgrades.
	NewestVersion int
	// ClusterVersion returns the cluster version, which the state machine keeps: the
	// entries that this replica writes are of it, and no replica that runs under less
	// is let in. It must return at once. Default: always 1.
	ClusterVersion func() int

	// Logger gets this replica's and Raft's messages. Default slog.Default().
	Logger *slog.Logger

	// Parts, if not nil, takes the place of the network and the disk, in a
	// simulation (see test/sim): DataDir is only a name then, and BindAddress,
	// Listener, TLS and LogStore are not used.
	Parts *Parts
}

const defaultQueueBytes = 64 << 20

// withDefaults returns the config with its zero fields filled in.
func (c Config) withDefaults() Config {
	def := func(d *time.Duration, v time.Duration) {
		if *d == 0 {
			*d = v
		}
	}
	def(&c.HeartbeatTimeout, time.Second)
	def(&c.ElectionTimeout, max(time.Second, c.HeartbeatTimeout))
	def(&c.LeaderLeaseTimeout, min(time.Second, c.HeartbeatTimeout))
	def(&c.TouchTimeout, c.HeartbeatTimeout+2*c.ElectionTimeout)
	def(&c.CommitTimeout, 50*time.Millisecond)
	def(&c.ElectionStagger, 150*time.Millisecond)
	def(&c.ProposeTimeout, 10*time.Second)
	def(&c.TransportTimeout, 5*time.Second)
	def(&c.DialTimeout, time.Second)
	def(&c.SnapshotInterval, time.Minute)
	def(&c.SlowFsync, 10*time.Millisecond)
	def(&c.DiskStallTimeout, 2*time.Second)
	def(&c.FingerprintInterval, 10*time.Second)
	def(&c.UpkeepInterval, 300*time.Millisecond)
	def(&c.StabilizationTime, 2*time.Second)
	if c.BindAddress == "" {
		c.BindAddress = ":7444"
	}
	if c.LogStore == "" {
		c.LogStore = LogStoreBolt
	}
	if c.MaxAppendEntries == 0 {
		c.MaxAppendEntries = 512
	}
	if c.MaxAppendBytes == 0 {
		c.MaxAppendBytes = 4 << 20
	}
	if c.MaxCommandBytes == 0 {
		c.MaxCommandBytes = 7 << 19
	}
	if c.LogCacheBytes == 0 {
		c.LogCacheBytes = 32 << 20
	}
	if c.QueueBytes == 0 {
		c.QueueBytes = defaultQueueBytes
	}
	if c.ProposalBytes == 0 {
		c.ProposalBytes = 40 << 20
	}
	if c.ApplyBytes == 0 {
		c.ApplyBytes = 16 << 20
	}
	if c.SnapshotBytes == 0 {
		c.SnapshotBytes = 256 << 20
	}
	if c.TrailingBytes == 0 {
		c.TrailingBytes = 128 << 20
	}
	if c.SnapshotThreshold == 0 {
		c.SnapshotThreshold = 10000
	}
	if c.TrailingLogs == 0 {
		c.TrailingLogs = 10000
	}
	if c.SnapshotRetain == 0 {
		c.SnapshotRetain = 2
	}
	if c.Logger == nil {
		c.Logger = slog.Default()
	}
	if c.NewestVersion == 0 {
		c.NewestVersion = entryVersion
	}
	if c.ClusterVersion == nil {
		c.ClusterVersion = func() int { return 1 }
	}
	if c.VerifyPeer == nil {
		c.VerifyPeer = VerifyController
	}
	if c.Peers == nil {
		c.Peers = func() []Server { return nil }
	}
	if c.PeerConn == nil {
		c.PeerConn = func(context.Context, string) (grpc.ClientConnInterface, error) {
			return nil, fmt.Errorf("PeerConn is not configured")
		}
	}
	return c
}

// Validate returns an error that names the first field with a value that
// cannot work. Zero values that have a default are valid.
func (c Config) Validate() error {
	c = c.withDefaults()
	bad := func(field, format string, args ...any) error {
		return fmt.Errorf("consensus config: %s: %s", field, fmt.Sprintf(format, args...))
	}
	switch {
	case c.ID == "":
		return bad("ID", "a replica needs a name")
	case len(c.ID) > 253 || strings.ContainsFunc(c.ID, notNameRune):
		return bad("ID", "%q: up to 253 letters, digits, '.', '-' and '_' only", c.ID)
	case c.ClusterID == "" || len(c.ClusterID) > 253:
		return bad("ClusterID", "1 to 253 bytes, %d given", len(c.ClusterID))
	case c.DataDir == "":
		return bad("DataDir", "a folder for the log is needed")
	case c.LogStore != LogStoreBolt && c.LogStore != LogStoreWAL:
		return bad("LogStore", "%q: must be %s or %s", c.LogStore, LogStoreBolt, LogStoreWAL)
	case c.Parts != nil: // no network of ours
	case c.TLS == nil:
		return bad("TLS", "replicas only talk over mutual TLS: certificate and CA are needed")
	case c.TLS.RootCAs == nil:
		return bad("TLS", "RootCAs must hold the cluster's CA")
	case len(c.TLS.Certificates) == 0 && (c.TLS.GetCertificate == nil || c.TLS.GetClientCertificate == nil):
		return bad("TLS", "no certificate: set Certificates, or GetCertificate and GetClientCertificate")
	}
	switch {
	case !slices.Contains([]int{0, 1, 3, 5}, c.BootstrapExpect):
		return bad("BootstrapExpect", "%d: must be 0 (join only), 1, 3 or 5", c.BootstrapExpect)
	case c.HeartbeatTimeout < 10*time.Millisecond:
		return bad("HeartbeatTimeout", "%v: at least 10ms", c.HeartbeatTimeout)
	case c.ElectionTimeout < c.HeartbeatTimeout:
		return bad("ElectionTimeout", "%v: at least HeartbeatTimeout (%v)", c.ElectionTimeout, c.HeartbeatTimeout)
	case c.LeaderLeaseTimeout < 10*time.Millisecond || c.LeaderLeaseTimeout > c.HeartbeatTimeout:
		return bad("LeaderLeaseTimeout", "%v: 10ms to HeartbeatTimeout (%v)", c.LeaderLeaseTimeout, c.HeartbeatTimeout)
	case c.NewestVersion < 1 || c.NewestVersion > entryVersion:
		return bad("NewestVersion", "%d: 1 to %d", c.NewestVersion, entryVersion)
	case c.TouchTimeout < c.HeartbeatTimeout:
		return bad("TouchTimeout", "%v: at least HeartbeatTimeout (%v)", c.TouchTimeout, c.HeartbeatTimeout)
	case c.CommitTimeout < time.Millisecond:
		return bad("CommitTimeout", "%v: at least 1ms", c.CommitTimeout)
	case c.MaxAppendEntries < 1 || c.MaxAppendEntries > 1024:
		return bad("MaxAppendEntries", "%d: 1 to 1024", c.MaxAppendEntries)
	case c.MaxAppendBytes < 1:
		return bad("MaxAppendBytes", "%d: must be positive", c.MaxAppendBytes)
	case c.MaxCommandBytes < 1:
		return bad("MaxCommandBytes", "%d: must be positive", c.MaxCommandBytes)
	case c.LogCacheBytes < 0:
		return bad("LogCacheBytes", "%d: must not be negative", c.LogCacheBytes)
	case c.QueueBytes < 0:
		return bad("QueueBytes", "%d: must not be negative", c.QueueBytes)
	case c.ProposalBytes < 1:
		return bad("ProposalBytes", "%d: must be positive", c.ProposalBytes)
	case c.ApplyBytes < 1:
		return bad("ApplyBytes", "%d: must be positive", c.ApplyBytes)
	case c.SnapshotBytes < 1:
		return bad("SnapshotBytes", "%d: must be positive", c.SnapshotBytes)
	case c.TrailingBytes < 1:
		return bad("TrailingBytes", "%d: must be positive", c.TrailingBytes)
	case c.SnapshotInterval < 5*time.Millisecond:
		return bad("SnapshotInterval", "%v: at least 5ms", c.SnapshotInterval)
	case c.SnapshotRetain < 1:
		return bad("SnapshotRetain", "%d: at least 1", c.SnapshotRetain)
	}
	for field, d := range map[string]time.Duration{
		"ElectionStagger": c.ElectionStagger, "ProposeTimeout": c.ProposeTimeout,
		"TransportTimeout": c.TransportTimeout, "DialTimeout": c.DialTimeout,
		"SlowFsync": c.SlowFsync, "DiskStallTimeout": c.DiskStallTimeout,
		"UpkeepInterval": c.UpkeepInterval, "StabilizationTime": c.StabilizationTime,
		"DeadMemberCleanupAfter": c.DeadMemberCleanupAfter,
	} {
		if d < 0 {
			return bad(field, "%v: must not be negative", d)
		}
	}
	if c.Listener == nil {
		if err := checkHostPort(c.BindAddress, true); err != nil {
			return bad("BindAddress", "%v", err)
		}
	}
	if c.AdvertiseAddress != "" {
		if err := checkHostPort(c.AdvertiseAddress, false); err != nil {
			return bad("AdvertiseAddress", "%v", err)
		}
	}
	return nil
}

func notNameRune(r rune) bool {
	return !('a' <= r && r <= 'z' || 'A' <= r && r <= 'Z' || '0' <= r && r <= '9' || strings.ContainsRune(".-_", r))
}

// checkHostPort checks an address to listen on (any true) or to be dialled.
func checkHostPort(addr string, any bool) error {
	host, port, err := net.SplitHostPort(addr)
	if err != nil {
		return fmt.Errorf("%q is not host:port", addr)
	}
	if n, err := strconv.ParseUint(port, 10, 16); err != nil || (n == 0 && !any) {
		return fmt.Errorf("%q: the port must be a number from 1 to 65535", addr)
	}
	if any {
		return nil
	}
	if ip := net.ParseIP(host); host == "" || (ip != nil && ip.IsUnspecified()) {
		return fmt.Errorf("%q: other replicas cannot dial an unspecified host", addr)
	}
	return nil
}

// VerifyController is the default of Config.VerifyPeer: the certificate's
// organisation must be "timonel:controllers" and its common name
// "timonel:controller:<id>".
func VerifyController(cert *x509.Certificate, id string) error {
	if !slices.Contains(cert.Subject.Organization, "timonel:controllers") {
		return fmt.Errorf("certificate %q is not a controller's (organisation timonel:controllers)", cert.Subject)
	}
	if want := "timonel:controller:" + id; cert.Subject.CommonName != want {
		return fmt.Errorf("certificate of %q presented by a replica that calls itself %q", cert.Subject.CommonName, id)
	}
	return nil
}
