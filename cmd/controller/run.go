package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"runtime/debug"
	"time"

	"golang.org/x/sync/errgroup"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apiserver/pkg/authentication/user"
	"k8s.io/client-go/rest"

	"timonel/apiserver"
	"timonel/backup"
	"timonel/consensus"
	"timonel/dispatch"
	"timonel/internal/ports"
	"timonel/internal/replicated"
	"timonel/pki"
	"timonel/state"
	"timonel/state/objects"
	"timonel/state/storage"
	"timonel/trust"
)

// leaveTimeout is how long a controller that stops waits for gossip to tell the
// others.
const leaveTimeout = time.Second

// controller is what run wires together.
type controller struct {
	config
	log       *slog.Logger
	bundle    *pki.Bundle
	shares    shares
	store     *state.Store
	quota     *state.Quota
	directory *directory
	keys      *keyrings
	peers     *peers
	tunnels   *peers // apart, for they are many and may stand still
	replica   *consensus.Replica
	backend   backend
	trust     *trust.Registry
	cache     *objects.Cache
	decoded   *storage.Caches
	api       *apiserver.Server
	agents    *dispatch.Dispatcher
	tracker   *dispatch.Tracker
	// certificates are this controller's own.
	certificates *certificates
	// newest is the newest cluster version that this program runs under.
	newest         int
	clusterVersion clusterVersion
	limits         portLimits
	listeners      []*ports.Listener
	apiListener    *ports.Listener
	port           *dispatch.Port
	// scheduler takes scheduled snapshots on the leader; nil if none are wanted.
	scheduler *backup.Scheduler
}

// run serves until ctx ends, or until a part of the controller fails.
func run(ctx context.Context, c config, log *slog.Logger) (err error) {
	k := &controller{config: c, log: log.With("controller", c.name)}
	if k.bundle, err = pki.LoadBundle(c.bundleDir); err != nil {
		return err
	}
	ips, names, err := c.servingNames()
	if err != nil {
		return err
	}
	identity, err := k.bundle.Controller(c.name, ips, names)
	if err != nil {
		return err
	}

	if k.newest, err = newestClusterVersion(); err != nil {
		return err
	}
	if k.shares, err = c.memoryShares(); err != nil {
		return err
	}
	if os.Getenv("GOMEMLIMIT") == "" {
		debug.SetMemoryLimit(k.shares.memory / 10 * 9)
	}
	folder, err := c.historyFolder()
	if err != nil {
		return err
	}
	k.store = state.New(state.Options{HistoryAge: c.historyAge, HistoryChanges: c.historyRevisions, HistoryBytes: k.shares.history,
		HistoryFolder: folder, NewestVersion: k.newest})
	k.store.Tick(time.Now())
	k.quota = state.NewQuota(k.store, k.shares.state, objects.Deleting)
	k.decoded = storage.NewCaches(k.shares.objects)
	k.cache = objects.NewCache(k.store, objects.WithLogger(log))

	k.limits = limitsOfPorts(k.shares.connections)
	clusterListener, err := k.listen(c.clusterPort, ports.Limits{Name: "cluster-port", Connections: k.limits.cluster})
	if err != nil {
		return err
	}
	defer clusterListener.Close()
	if err := k.openGossip(ctx, identity); err != nil {
		return err
	}
	defer k.directory.close()
	defer k.peers.close()
	defer k.tunnels.close()

	if k.replica, err = k.openReplica(ctx, identity); err != nil {
		return err
	}
	defer k.replica.Close()
	members := k.replica.Members
	k.directory.log.Store(&members)
	k.backend = backend{store: k.store, replica: k.replica}
	k.trust = trust.New(trust.Config{State: k.backend, Reserved: k.reservedName, Vault: k.bundle})
	k.keys.registry, k.keys.replica = k.trust, k.replica
	if k.scheduler, err = k.newScheduler(); err != nil {
		return err
	}

	k.certificates = newCertificates(identity, k.bundle, filepath.Join(c.dataDir, "pki"), k.log)
	files, err := k.certificates.write()
	if err != nil {
		return err
	}
	if k.agents, k.tracker, err = k.newDispatch(); err != nil {
		return err
	}
	if k.apiListener, err = k.listen(k.apiPort, ports.Limits{Name: "api-port", Connections: k.limits.api, Authenticates: true}); err != nil {
		return err
	}
	defer k.apiListener.Close()
	// Peers must be able to call before there is a leader: they bootstrap so.
	k.port = k.agents.NewPort(identity.ClusterServerTLS())
	k.port.Register(k.replica.Register)
	k.port.Register(k.agents.Register)

	// Everything below ends when ctx does or when one of them fails.
	group, ctx := errgroup.WithContext(ctx)
	exitUnlessEnding(ctx)
	group.Go(func() error { return k.port.Serve(clusterListener) })
	group.Go(func() error {
		<-ctx.Done()
		k.stepDown()
		k.port.Stop()
		return nil
	})
	group.Go(func() error {
		select {
		case <-k.replica.Failed():
			return k.replica.Err()
		case <-ctx.Done():
			return nil
		}
	})
	group.Go(func() error { return ended(k.cache.Run(ctx)) })
	group.Go(func() error { return ended(tendMemory(ctx, k.trim)) })
	group.Go(func() error { return ended(k.watchPorts(ctx)) })
	group.Go(func() error { return ended(tick(ctx, k.store)) })
	group.Go(func() error { return ended(k.certificates.run(ctx)) })
	group.Go(func() error { return ended(k.keys.follow(ctx)) })
	group.Go(func() error { return ended(k.askForKeys(ctx, identity)) })
	group.Go(func() error { return k.serve(ctx, group, files) })
	err = group.Wait()
	if leaveErr := k.directory.leave(leaveTimeout); leaveErr != nil {
		log.Debug("left without telling the others", "error", leaveErr)
	}
	return err
}

// serve starts what needs the log: the API, the agents' streams, and leading.
func (k *controller) serve(ctx context.Context, group *errgroup.Group, files pki.Files) error {
	api, err := apiserver.New(ctx, k.apiConfig(files))
	if err != nil {
		return err
	}
	k.api = api
	k.registerMetrics()
	group.Go(func() error { return api.Run(ctx) })
	group.Go(func() error { return ended(k.agents.Run(ctx)) })
	group.Go(func() error { return ended(k.lead(ctx)) })
	return nil
}

func (k *controller) apiConfig(files pki.Files) apiserver.Config {
	return apiserver.Config{
		Name:             k.name,
		BindAddress:      net.ParseIP(k.bindIP),
		AdvertiseAddress: net.ParseIP(k.advertiseIP),
		Port:             k.apiPort,
		Listener:         k.apiListener,
		Certificates:     files,
		Backend:          k.backend,
		Trust:            k.trust,
		Caches:           k.decoded,
		WatchBytes:       k.shares.watches,
		BodyBytes:        k.shares.bodies,
		TunnelBytes:      k.shares.tunnels,
		AnswerBytes:      k.shares.answers,
		ServiceCIDRs:     k.services(),
		DNSAddresses:     k.dnsAddresses(),
		DialKubelet:      k.agents.DialKubelet,
		Usage:            k.nodesUsage,
		NodeAddress:      k.agents.CheckNodeAddress,
		PodAddress:       k.agents.CheckPodAddress,
		Controllers:      k.directory.controllerIPs,
		IsLeader:         k.isLeader,
		Health: map[string]func(context.Context) error{
			"raft-leader": func(context.Context) error {
				// Not during an election, which costs nobody their connections.
				_, err := k.replica.InTouch()
				return err
			},
			"etcd":   k.readsFollow,
			"disk":   func(context.Context) error { return k.replica.DiskErr() },
			"member": func(context.Context) error { return k.replica.MemberErr() },
			"accept": func(context.Context) error { return k.acceptErr() },
		},
		Paths:                        k.paths(),
		Warnings:                     map[string]func() string{"state-size": k.stateWarning},
		ReadyOnly:                    []string{"raft-leader", "disk", "member", "accept"},
		EnableAdmission:              k.enableAdmission,
		DisableAdmission:             k.disableAdmission,
		AdmissionConfig:              k.admissionConfig,
		UnreachableTolerationSeconds: int64(k.unreachableToleration / time.Second),
	}
}

// followTimeout is how far what clients read may be behind the state.
const followTimeout = 5 * time.Second

// readsFollow is the check that upstream calls etcd, and monitors look for: whether the
// storage works. Here it is in this process, and what may fail is that the objects that
// clients read follow it.
func (k *controller) readsFollow(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, followTimeout)
	defer cancel()
	revision := k.store.View().Revision()
	if err := k.cache.WaitRevision(ctx, revision); err != nil {
		return fmt.Errorf("objects are behind the state by more than %s, at revision %d: %w", followTimeout, revision, err)
	}
	return nil
}

// nodesUsage is what agents say that their nodes take, as the API server wants it.
func (k *controller) nodesUsage(ctx context.Context, nodes []string) map[string]apiserver.NodeUsage {
	out := map[string]apiserver.NodeUsage{}
	for node, u := range k.agents.NodesUsage(ctx, nodes) {
		n := apiserver.NodeUsage{
			When: u.When, Window: time.Duration(u.GetWindow()), CPU: u.GetCpu(), Memory: u.GetMemory(),
			Pods: make(map[types.UID][]apiserver.ContainerUsage, len(u.GetPods())),
		}
		for _, p := range u.GetPods() {
			for _, c := range p.GetContainers() {
				n.Pods[types.UID(p.GetUid())] = append(n.Pods[types.UID(p.GetUid())], apiserver.ContainerUsage{Name: c.GetName(), CPU: c.GetCpu(), Memory: c.GetMemory()})
			}
		}
		out[node] = n
	}
	return out
}

// stateWarning says in few words that the state is nearly full.
func (k *controller) stateWarning() string {
	switch s := k.quota.Status(); {
	case s.Full:
		return "the state is full, writes that make it larger are refused"
	case s.Near:
		return "the state is nearly full"
	}
	return ""
}

func (k *controller) isLeader() bool {
	id, _, ok := k.replica.Leader()
	return ok && id == k.name
}

// apiAs is the API in memory, as a user with groups.
func (k *controller) apiAs(name string, groups ...string) *rest.Config {
	return k.api.InProcess(&user.DefaultInfo{Name: name, Groups: append(groups, user.AllAuthenticated)})
}

// openGossip joins both pools. A controller that knows nothing of the cluster but the
// bundle asks the others first which keys these have now: with keys of before it would
// find none but others like itself, and found a second cluster with them.
func (k *controller) openGossip(ctx context.Context, identity *pki.Controller) error {
	if err := os.MkdirAll(k.dataDir, 0o700); err != nil {
		return fmt.Errorf("--data-dir: %w", err)
	}
	k.directory = &directory{cache: k.cache, config: &k.config}
	k.peers = newPeers(k.directory, identity.ClusterClientTLSTo, dispatch.DialOptions)
	k.tunnels = newPeers(k.directory, identity.ClusterClientTLSTo, dispatch.TunnelDialOptions)
	var kept bool
	var err error
	if k.keys, kept, err = newKeyrings(k.bundle, k.dataDir, k.log); err != nil {
		return err
	}
	if _, err := os.Stat(filepath.Join(k.dataDir, "raft")); !kept || errors.Is(err, fs.ErrNotExist) {
		k.keys.ask(ctx, k.keySources(identity))
	}
	if err := k.directory.open(k.bundle.ClusterID(), k.keys.secrets(pki.PoolNodes), k.keys.secrets(pki.PoolControllers), k.log); err != nil {
		return err
	}
	return k.keys.start(k.directory.setKeys)
}

// historyFolder is where what is not the newest of the history is at rest: in files
// without names, of which nothing is left when this process ends.
func (c *config) historyFolder() (string, error) {
	folder := filepath.Join(c.dataDir, "history")
	if err := os.RemoveAll(folder); err != nil { // a file that was not nameless yet
		return "", fmt.Errorf("--data-dir: %w", err)
	}
	if err := os.MkdirAll(folder, 0o700); err != nil {
		return "", fmt.Errorf("--data-dir: %w", err)
	}
	return folder, nil
}

func (k *controller) openReplica(ctx context.Context, identity *pki.Controller) (*consensus.Replica, error) {
	listener, err := k.listen(k.raftPort, ports.Limits{Name: "raft-port", Connections: k.limits.raft})
	if err != nil {
		return nil, err
	}
	replica, err := consensus.Open(ctx, consensus.Config{
		ID: k.name, ClusterID: k.bundle.ClusterID(), DataDir: filepath.Join(k.dataDir, "raft"), LogStore: k.logStore,
		Listener: listener, AdvertiseAddress: k.advertised(k.raftPort), TLS: identity.RaftTLS(),
		PeerConn: k.peers.conn, Peers: k.directory.raftServers,
		BootstrapExpect: k.bootstrapExpect, HeartbeatTimeout: k.heartbeatTimeout, ElectionTimeout: k.electionTimeout,
		LeaderLeaseTimeout: k.leaderLease, SnapshotThreshold: k.snapshotThreshold, TrailingLogs: k.trailingLogs,
		Admit:                  k.quota.Admit,
		DeadMemberCleanupAfter: k.deadMemberCleanupAfter, Version: version, Logger: k.log,
		LogCacheBytes: k.shares.logCache, QueueBytes: k.shares.queue, ProposalBytes: k.shares.proposals,
		NewestVersion: k.newest, ClusterVersion: func() int { return k.store.View().ClusterVersion() },
	}, replicated.Machine{Store: k.store})
	if err != nil {
		listener.Close()
	}
	return replica, err
}

// stepDown gives leadership away before this controller stops, so that writes
// hardly pause.
func (k *controller) stepDown() {
	if !k.isLeader() {
		return
	}
	if err := k.replica.TransferLeadership(""); err != nil && !errors.Is(err, consensus.ErrNotLeader) {
		k.log.Warn("leadership could not be handed over; the others will elect a leader", "error", err)
	}
}

// servingNames are the addresses and names that the API's certificate is valid for,
// and those that are made when it is renewed.
func (c config) servingNames() (ips []net.IP, names []string, err error) {
	first := net.IP(c.services()[0].Addr().Next().AsSlice()) // the kubernetes Service's own
	ips, names = []net.IP{net.ParseIP(c.advertiseIP), first}, []string{c.name}
	if c.clusterDomain != defaultConfig().clusterDomain { // which every certificate has
		names = append(names, "kubernetes.default.svc."+c.clusterDomain)
	}
	if bind := net.ParseIP(c.bindIP); !bind.IsUnspecified() && !bind.Equal(ips[0]) {
		ips = append(ips, bind)
	}
	for _, san := range c.tlsSAN {
		if ip := net.ParseIP(san); ip != nil {
			ips = append(ips, ip)
		} else {
			names = append(names, san)
		}
	}
	return ips, names, nil
}

// portError adds to an error of listening which flag to change.
func portError(flag string, err error) error {
	return fmt.Errorf("--%s: %w (another process has the port, or --bind-ip is not this machine's)", flag, err)
}

// tick tells the store what time it is, by a clock that nobody sets.
func tick(ctx context.Context, store *state.Store) error {
	start := time.Now()
	for pause(ctx, time.Second) {
		store.Tick(start.Add(time.Since(start)))
	}
	return ctx.Err()
}

// ended is nil for an error that only says that the context ended.
func ended(err error) error {
	if errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) {
		return nil
	}
	return err
}
