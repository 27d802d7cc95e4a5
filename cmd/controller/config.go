package main

import (
	"errors"
	"fmt"
	"net"
	"os"
	"regexp"
	"strings"
	"time"

	"github.com/spf13/pflag"
	"k8s.io/apimachinery/pkg/util/validation"

	"timonel/consensus"
	"timonel/internal/podrange"
	"timonel/reconcile/node"
	"timonel/reconcile/upstream/profiles"
	"timonel/sched"
)

// config is what the flags say. Durations are positive; ports are TCP (gossip's
// is UDP too).
type config struct {
	name            string
	dataDir         string
	bundleDir       string
	bindIP          string
	advertiseIP     string
	bootstrapExpect int
	join            []string
	tlsSAN          []string

	apiPort, clusterPort, raftPort, gossipPort, controllersGossipPort int

	clusterCIDR, serviceCIDR []string
	nodeBits4, nodeBits6     int
	podAddresses             string
	clusterDomain            string
	unreachableToleration    time.Duration
	evictions                node.HealthConfig // how fast lost nodes are evicted from, as the flags say

	enableAdmission, disableAdmission []string
	admissionConfig                   string
	schedulerConfig                   string
	placement                         sched.Config // what is in schedulerConfig

	heartbeatTimeout, electionTimeout, leaderLease time.Duration
	snapshotThreshold, trailingLogs                uint64
	historyAge                                     time.Duration
	memory, stateLimit                             string // quantities; "" is the default
	historyRevisions                               int
	logStore                                       string
	deadMemberCleanupAfter                         time.Duration

	backups backupConfig

	logLevel, logFormat string
}

func defaultConfig() config {
	return config{
		bootstrapExpect:       3,
		apiPort:               6443,
		clusterPort:           7443,
		raftPort:              7444,
		gossipPort:            7946,
		clusterCIDR:           []string{"10.244.0.0/16"},
		serviceCIDR:           []string{"10.96.0.0/16"},
		nodeBits4:             podrange.DefaultBits4,
		nodeBits6:             podrange.DefaultBits6,
		podAddresses:          podsOfNode,
		clusterDomain:         "cluster.local",
		unreachableToleration: 30 * time.Second,
		evictions:             node.HealthConfig{Share: 0.55, EvictionRate: 0.1, SecondaryEvictionRate: 0.01, LargeZone: 50},

		deadMemberCleanupAfter: 30 * time.Minute,
		historyAge:             5 * time.Minute,
		logStore:               consensus.LogStoreBolt,
		logLevel:               "info",
		logFormat:              "text",
	}
}

func (c *config) flags(f *pflag.FlagSet) {
	f.StringVar(&c.name, "name", c.name, "this controller's name, unique in the cluster and kept for life (default: the host's name)")
	f.StringVar(&c.dataDir, "data-dir", c.dataDir, "folder of the log, snapshots and certificates (required)")
	f.StringVar(&c.bundleDir, "bundle", c.bundleDir, "folder of the cluster's secrets, the same on every controller; made by 'timonel init' (required)")
	f.StringVar(&c.bindIP, "bind-ip", c.bindIP, "address to listen on (required)")
	f.StringVar(&c.advertiseIP, "advertise-ip", c.advertiseIP, "address that the others reach this controller by (default: --bind-ip)")
	f.IntVar(&c.bootstrapExpect, "bootstrap-expect", c.bootstrapExpect, "how many controllers form a new cluster: 1, 3 or 5")
	f.StringSliceVar(&c.join, "join", c.join, "gossip addresses (host:port, of their --gossip-port) of other controllers to find the cluster by")
	f.StringSliceVar(&c.tlsSAN, "tls-san", c.tlsSAN, "more addresses and names that clients reach the Kubernetes API by, such as a load balancer's, for the certificate that it is served with")
	f.IntVar(&c.apiPort, "api-port", c.apiPort, "port of the Kubernetes API")
	f.IntVar(&c.clusterPort, "cluster-port", c.clusterPort, "port of agents' streams and of calls between controllers")
	f.IntVar(&c.raftPort, "raft-port", c.raftPort, "port of Raft's own connections")
	f.IntVar(&c.gossipPort, "gossip-port", c.gossipPort, "port of the gossip with nodes, TCP and UDP")
	f.IntVar(&c.controllersGossipPort, "controllers-gossip-port", c.controllersGossipPort, "port of the gossip among controllers, TCP and UDP, the same on all that --join names (0: the next after --gossip-port)")
	f.Var((*networks)(&c.clusterCIDR), "cluster-cidr", "networks of the pods, IPv4, IPv6 or both; each node gets a part of one of each family, the first that has one left. Networks can be added at the end; the same on all controllers")
	f.IntVar(&c.nodeBits4, "node-cidr-mask-size-ipv4", c.nodeBits4, "prefix length of a node's part of an IPv4 network of --cluster-cidr; for the life of the cluster")
	f.IntVar(&c.nodeBits6, "node-cidr-mask-size-ipv6", c.nodeBits6, "the same, IPv6")
	f.StringVar(&c.podAddresses, "pod-addresses", c.podAddresses, "which addresses an agent may say that its pods have: node, those of its node's part of --cluster-cidr, or cluster, all of --cluster-cidr, where another pod network (the agents' --cni-conf-dir) gives them out; the same on all controllers")
	f.Var((*networks)(&c.serviceCIDR), "service-cidr", "network of the Services' addresses, or two of different families: the first is that of Services that do not say which they want, and of --advertise-ip")
	f.StringVar(&c.clusterDomain, "cluster-domain", c.clusterDomain, "domain of the cluster's DNS names; agents learn it from the controllers")
	f.StringSliceVar(&c.enableAdmission, "enable-admission-plugins", c.enableAdmission, "admission plugins to turn on beside Kubernetes' default ones, such as AlwaysPullImages; the same on all controllers")
	f.StringSliceVar(&c.disableAdmission, "disable-admission-plugins", c.disableAdmission, "admission plugins to turn off; NodeRestriction and NodeNetwork stay on")
	f.StringVar(&c.admissionConfig, "admission-control-config-file", c.admissionConfig, "file of kind AdmissionConfiguration, for plugins that have one, such as PodSecurity")
	f.StringVar(&c.schedulerConfig, "scheduler-config", c.schedulerConfig, "file of kind KubeSchedulerConfiguration (kubescheduler.config.k8s.io/v1), with the profiles by which pods are placed; the same on all controllers (default: one profile, default-scheduler)")
	f.DurationVar(&c.unreachableToleration, "unreachable-toleration", c.unreachableToleration, "how long pods stay bound to a node that is unreachable or not ready, where they do not say so themselves (Kubernetes: 5m)")
	f.Float64Var(&c.evictions.Share, "unhealthy-zone-threshold", c.evictions.Share, "share of a zone's nodes from which on their loss within 5 minutes (two at least) makes the zone unhealthy: it is the network, not the nodes")
	f.Float64Var(&c.evictions.Share, "lost-share", c.evictions.Share, "the former name of --unhealthy-zone-threshold")
	f.Float64Var(&c.evictions.EvictionRate, "node-eviction-rate", c.evictions.EvictionRate, "from how many lost nodes of a healthy zone pods are evicted in a second, the first at once (0: none)")
	f.Float64Var(&c.evictions.SecondaryEvictionRate, "secondary-node-eviction-rate", c.evictions.SecondaryEvictionRate, "the same in an unhealthy zone, if it is large; nothing is evicted in one that is not (0: none)")
	f.IntVar(&c.evictions.LargeZone, "large-cluster-size-threshold", c.evictions.LargeZone, "number of nodes above which a zone is large")
	f.DurationVar(&c.heartbeatTimeout, "heartbeat-timeout", c.heartbeatTimeout, "how long a follower waits to hear from the leader before it stands for election (0: the tuned default)")
	f.DurationVar(&c.electionTimeout, "election-timeout", c.electionTimeout, "how long a candidate waits for votes (0: the tuned default)")
	f.DurationVar(&c.leaderLease, "leader-lease", c.leaderLease, "how long a leader that hears of no majority goes on; at most --heartbeat-timeout (0: the tuned default)")
	f.Uint64Var(&c.snapshotThreshold, "snapshot-threshold", c.snapshotThreshold, "log entries after which a snapshot is taken (0: the tuned default)")
	f.Uint64Var(&c.trailingLogs, "trailing-logs", c.trailingLogs, "log entries kept behind a snapshot for slow followers (0: the tuned default)")
	f.StringVar(&c.logStore, "log-store", c.logStore, "how the log is kept on disk: boltdb (raft-boltdb with a journal before it) or wal (raft-wal); the same for the life of --data-dir")
	f.DurationVar(&c.deadMemberCleanupAfter, "dead-member-cleanup-after", c.deadMemberCleanupAfter, "how long a controller must be dead until the leader removes it from the members, if others have taken its place: at least --bootstrap-expect healthy ones (0: never)")
	f.DurationVar(&c.historyAge, "history-age", c.historyAge, "for how long after it was the newest a revision can be watched from, and lists be paged over at it, on each controller; may differ between controllers")
	f.IntVar(&c.historyRevisions, "history-revisions", c.historyRevisions, "the greatest number of revisions kept for that, whatever their age (0: no limit but that of memory); may differ between controllers")
	f.StringVar(&c.memory, "memory", c.memory, "how much memory this controller divides among its parts, such as 4Gi (default: the machine's, or what its cgroup allows)")
	f.StringVar(&c.stateLimit, "state-limit", c.stateLimit, "the greatest size of the cluster's state, such as 2Gi: beyond, writes that make it larger are refused with 507 and deletes pass; the leader's counts, so give all controllers the same (default: an eighth of --memory)")
	c.backups.flags(f)
	f.StringVar(&c.logLevel, "log-level", c.logLevel, "debug, info, warn or error")
	f.StringVar(&c.logFormat, "log-format", c.logFormat, "text or json")
}

var nameRE = regexp.MustCompile(`^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$`)

// complete fills what has a default from the machine.
func (c *config) complete() error {
	if c.name == "" {
		host, err := os.Hostname()
		if err != nil {
			return fmt.Errorf("--name: not given, and the host's name cannot be read: %w", err)
		}
		c.name = strings.ToLower(strings.SplitN(host, ".", 2)[0])
	}
	if c.advertiseIP == "" {
		c.advertiseIP = c.bindIP
	}
	if c.controllersGossipPort == 0 {
		c.controllersGossipPort = c.gossipPort + 1
	}
	// As a flag, 'timonel up' could not give it to programs of before there was one.
	c.tlsSAN = append(c.tlsSAN, strings.FieldsFunc(os.Getenv("TIMONEL_TLS_SAN"), func(r rune) bool { return r == ',' })...)
	return errors.Join(c.validate(), c.readScheduler())
}

// readScheduler reads the file that says how pods are placed.
func (c *config) readScheduler() error {
	c.placement = sched.DefaultConfig()
	if c.schedulerConfig == "" {
		return nil
	}
	content, err := os.ReadFile(c.schedulerConfig)
	if err != nil {
		return fmt.Errorf("--scheduler-config: %w", err)
	}
	if c.placement, err = profiles.Parse(content); err != nil {
		return fmt.Errorf("--scheduler-config: %s: %w", c.schedulerConfig, err)
	}
	return nil
}

// validate names the flag that is wrong and says what it takes.
func (c *config) validate() error {
	var errs []error
	bad := func(flag, format string, args ...any) {
		errs = append(errs, fmt.Errorf("--%s: %s", flag, fmt.Sprintf(format, args...)))
	}
	if !nameRE.MatchString(c.name) {
		bad("name", "%q is not a DNS label (lower-case letters, digits and '-', 63 at most)", c.name)
	}
	if c.dataDir == "" {
		bad("data-dir", "required: the folder for this controller's data")
	}
	if c.bundleDir == "" {
		bad("bundle", "required: the folder made by 'timonel init', copied to every controller")
	}
	if c.bindIP == "" {
		bad("bind-ip", "required: an address of this machine")
	} else if net.ParseIP(c.bindIP) == nil {
		bad("bind-ip", "%q is not an IP address", c.bindIP)
	}
	if ip := net.ParseIP(c.advertiseIP); c.advertiseIP != "" && (ip == nil || ip.IsUnspecified()) {
		bad("advertise-ip", "%q is not an address that others can reach", c.advertiseIP)
	}
	switch c.bootstrapExpect {
	case 1, 3, 5:
	default:
		bad("bootstrap-expect", "%d is not 1, 3 or 5", c.bootstrapExpect)
	}
	for _, seed := range c.join {
		if _, port, err := net.SplitHostPort(seed); err != nil || port == "" {
			bad("join", "%q is not host:port", seed)
		}
	}
	for _, san := range c.tlsSAN {
		if ip := net.ParseIP(san); ip == nil && len(validation.IsDNS1123Subdomain(strings.TrimPrefix(san, "*."))) > 0 || ip != nil && ip.IsUnspecified() {
			bad("tls-san", "%q is neither an address nor a DNS name", san)
		}
	}
	if c.logStore != consensus.LogStoreBolt && c.logStore != consensus.LogStoreWAL {
		bad("log-store", "%q is not boltdb or wal", c.logStore)
	}
	seen := map[int]string{}
	for _, p := range []struct {
		flag string
		port int
	}{{"api-port", c.apiPort}, {"cluster-port", c.clusterPort}, {"raft-port", c.raftPort}, {"gossip-port", c.gossipPort}, {"controllers-gossip-port", c.controllersGossipPort}} {
		if p.port < 1 || p.port > 65535 {
			bad(p.flag, "%d is not a port", p.port)
		} else if other, taken := seen[p.port]; taken {
			bad(p.flag, "%d is also --%s", p.port, other)
		}
		seen[p.port] = p.flag
	}
	c.validateNetworks(bad)
	if len(validation.IsDNS1123Subdomain(c.clusterDomain)) > 0 || len(c.clusterDomain) > 120 {
		bad("cluster-domain", "%q is not a DNS name such as cluster.local, of at most 120 characters", c.clusterDomain)
	}
	if c.unreachableToleration < time.Second {
		bad("unreachable-toleration", "%s is under a second", c.unreachableToleration)
	}
	if c.evictions.Share <= 0 || c.evictions.Share > 1 {
		bad("unhealthy-zone-threshold", "%g is not above 0 and at most 1", c.evictions.Share)
	}
	if c.evictions.EvictionRate < 0 {
		bad("node-eviction-rate", "%g is negative; 0 is none", c.evictions.EvictionRate)
	}
	if c.evictions.SecondaryEvictionRate < 0 {
		bad("secondary-node-eviction-rate", "%g is negative; 0 is none", c.evictions.SecondaryEvictionRate)
	}
	if c.evictions.LargeZone < 0 {
		bad("large-cluster-size-threshold", "%d is negative", c.evictions.LargeZone)
	}
	if c.deadMemberCleanupAfter != 0 && c.deadMemberCleanupAfter < 5*time.Second {
		bad("dead-member-cleanup-after", "%s is under 5s; 0 is never", c.deadMemberCleanupAfter)
	}
	if _, err := c.memoryShares(); err != nil {
		errs = append(errs, err)
	}
	if c.historyAge < 10*time.Second {
		bad("history-age", "%s is under 10s: clients that reconnect would have to list all again", c.historyAge)
	}
	if c.historyRevisions < 0 {
		bad("history-revisions", "%d is negative; 0 is no limit", c.historyRevisions)
	}
	c.backups.validate(bad)
	return errors.Join(errs...)
}

func (c *config) address(port int) string {
	return net.JoinHostPort(c.bindIP, fmt.Sprint(port))
}

func (c *config) advertised(port int) string {
	return net.JoinHostPort(c.advertiseIP, fmt.Sprint(port))
}
