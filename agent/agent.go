package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"
	runtimev1 "k8s.io/cri-api/pkg/apis/runtime/v1"

	"timonel/agent/admission"
	"timonel/agent/cgroup"
	"timonel/agent/containerd"
	"timonel/agent/csi"
	"timonel/agent/desired"
	"timonel/agent/eviction"
	"timonel/agent/hostile"
	"timonel/agent/imagegc"
	"timonel/agent/kubelet"
	"timonel/agent/logs"
	"timonel/agent/node"
	"timonel/agent/plugin"
	"timonel/agent/pod"
	"timonel/agent/podnet"
	"timonel/agent/stream"
	"timonel/agent/userns"
	"timonel/network/address"
	"timonel/network/feed"
	"timonel/network/hostport"
	"timonel/network/policy"
	"timonel/network/service"
	"timonel/network/tables"
	pb "timonel/proto/timonel/v1"
)

// pressureInterval is how often memory and disk are looked at.
const pressureInterval = 30 * time.Second

// Agent is one node's agent.
type Agent struct {
	cfg       Config
	log       *slog.Logger
	daemon    *containerd.Daemon // nil: somebody else's containerd
	runtime   *containerd.Runtime
	store     *desired.Store
	users     *userns.Users
	network   *podnet.Network
	feed      *feed.Client
	known     *feed.Store    // what the feed tells
	watcher   tables.Watcher // of all who write to nftables here
	services  *service.Proxy
	policies  *policy.Rules
	hostPorts *hostport.Ports // nil: another pod network's
	addresses *address.Announcer
	pods      *pod.Manager
	csi       *csi.Manager
	plugins   *plugin.Watcher
	stream    *stream.Client
	kubelet   *kubelet.Server
	images    *containerd.Importer
	imageGC   *imagegc.Collector
	logs      *logs.Logs
	evict     *eviction.Manager
	facts     node.Facts
	kernel    kernelFacts

	nodeChanged  chan struct{}
	namesChanged chan struct{}
	volumes      chan struct{} // some may be to delete
	synced       chan struct{}
	told         chan struct{} // a controller said something of the cluster
	joined       sync.Once

	mu         sync.Mutex
	node       *corev1.Node
	live       *corev1.Node // as the API has it; nil until a controller said so
	cluster    *pb.Cluster  // what was last said of it; nil: nothing
	capacity   corev1.ResourceList
	deleted    []types.UID // volumes of which nothing is left, in the order of node.Health
	networkBad string      // why the pod network does not work
	runtimeBad string      // why containerd does not
	can        runtimeCan  // as containerd says
	names      names       // as controllers say
}

// New checks the machine, starts or adopts containerd and reads the desired
// state. Nothing of it harms containers that run.
func New(ctx context.Context, cfg Config) (*Agent, error) {
	cfg.SetDefaults()
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	if os.Geteuid() != 0 {
		return nil, errors.New("the agent must run as root to run containers: start it with sudo or as a system service")
	}
	if err := cgroup.Check(); err != nil {
		return nil, err
	}
	if err := os.MkdirAll(cfg.DataDir, 0o711); err != nil {
		return nil, fmt.Errorf("make the data folder: %w", err)
	}
	if err := cfg.linkKubeletDir(); err != nil {
		return nil, err
	}
	a := &Agent{cfg: cfg, log: cfg.Logger, nodeChanged: make(chan struct{}, 1), namesChanged: make(chan struct{}, 1), volumes: make(chan struct{}, 1), synced: make(chan struct{}, 1), told: make(chan struct{}, 1)}
	var err error
	network := cfg.network()
	network.Keep, network.Event = podnet.HostsOf(a.controllers()...), a.networkEvent
	network.Watcher = &a.watcher
	if a.network, err = podnet.New(network); err != nil {
		return nil, err
	}
	a.known = feed.NewStore(cfg.Name)
	a.feed = feed.NewClient(feed.Config{Store: a.known, Path: cfg.dir("network.feed"), Logger: cfg.Logger})
	a.names = a.loadNames()
	if err := a.newServices(); err != nil {
		return nil, err
	}
	if err := a.newAddresses(); err != nil {
		return nil, err
	}
	if err := a.newPolicies(); err != nil {
		return nil, err
	}
	if err := a.newHostPorts(); err != nil {
		return nil, err
	}
	socket := cfg.ContainerdSocket
	if socket == "" {
		if a.daemon, err = containerd.NewDaemon(cfg.daemon()); err != nil {
			return nil, err
		}
		if err := a.daemon.Start(ctx); err != nil {
			return nil, err
		}
		socket = a.daemon.Socket()
	} else if err := containerd.Ping(ctx, socket); err != nil {
		return nil, fmt.Errorf("containerd does not answer at %s (--containerd): %w", socket, err)
	}
	if a.runtime, err = containerd.Dial(ctx, socket); err != nil {
		return nil, err
	}
	if a.daemon != nil { // another one's is configured by whoever runs it, registries too
		a.runtime.PullFrom(a.daemon.RegistryDir())
	}
	if err := a.importImages(ctx); err != nil {
		return nil, err
	}
	if a.store, err = desired.Open(cfg.dir("desired"), cfg.Logger); err != nil {
		return nil, err
	}
	if a.users, err = userns.Open(cfg.dir("userns")); err != nil {
		return nil, err
	}
	if err := a.describe(ctx); err != nil {
		return nil, err
	}
	a.logs, err = logs.New(logs.Config{
		Dir: cfg.dir("logs"), MaxSize: cfg.ContainerLogMaxSize, MaxFiles: cfg.ContainerLogMaxFiles, Runtime: a.runtime, Logger: cfg.Logger,
	})
	if err != nil {
		return nil, err
	}
	if err := pod.Policed(ctx, a.runtime, a.store.Pods(), a.links()); err != nil {
		return nil, fmt.Errorf("look which pods run: %w", err)
	}
	a.wire()
	a.evict.Look(ctx)
	return a, a.updateNode()
}

// importImages makes sure of the sandbox image, without which no pod starts, and says when
// it is nowhere. The folder's other images come in while the agent works (Run): pods that
// need one wait for it, and the Node does not.
func (a *Agent) importImages(ctx context.Context) error {
	// Without a folder, what was imported before is still known as such.
	a.images = containerd.NewImporter(a.runtime, a.cfg.ImagesDir, a.cfg.dir("imported.json"), a.log)
	if a.cfg.loadImages != nil {
		a.images.Load = a.cfg.loadImages(a.images.Load)
	}
	var statusErr error
	present := func() bool {
		resp, err := a.runtime.Images.ImageStatus(ctx, &runtimev1.ImageStatusRequest{Image: &runtimev1.ImageSpec{Image: a.cfg.PauseImage}})
		statusErr = err
		return err == nil && resp.Image != nil
	}
	var importErr error
	if a.cfg.ImagesDir != "" {
		importErr = a.images.ImportUntil(ctx, present)
	}
	switch {
	case present():
		return nil // what could not be imported, Run tries again and says so
	case statusErr != nil:
		return fmt.Errorf("look for the sandbox image: %w", statusErr)
	case importErr != nil:
		return importErr
	case a.cfg.PauseImage != DefaultPauseImage:
		return nil // may come from a registry
	}
	return fmt.Errorf("the sandbox image %s is not in containerd: make it with go run ./images/build -out DIR and give --images DIR", a.cfg.PauseImage)
}

// describe gathers what the Node object says.
func (a *Agent) describe(ctx context.Context) error {
	v, err := a.runtime.Version(ctx, &runtimev1.VersionRequest{})
	if err != nil {
		return fmt.Errorf("ask containerd for its version: %w", err)
	}
	a.facts = node.Facts{
		Name: a.cfg.Name, IPs: a.cfg.NodeIPs, Labels: a.cfg.Labels, Taints: a.cfg.Taints, MaxPods: a.cfg.MaxPods,
		DataDir: a.cfg.DataDir, Runtime: v.RuntimeName + "://" + strings.TrimPrefix(v.RuntimeVersion, "v"),
		GossipAt: a.cfg.GossipAddress, LocalDir: a.cfg.dir("local-volumes"), StartedAt: time.Now(),
	}
	if a.capacity, err = node.Resources(&a.facts); err != nil {
		return err
	}
	a.facts.Reserved = eviction.Reserved(a.cfg.thresholds, a.capacity)
	a.kernel = readKernel(a.log)
	kernel := &admission.Node{Kernel: a.kernel.version}
	a.facts.Declared = admission.DeclaredFeatures
	a.facts.RecursiveReadOnly, a.facts.MapsUsers = kernel.RecursiveReadOnly(), kernel.MapsUsers()
	st, err := a.runtime.Status(ctx, &runtimev1.StatusRequest{})
	if err != nil {
		return fmt.Errorf("ask containerd what it can do: %w", err)
	}
	a.can = a.runtimeCan(st)
	if !a.network.Ready() {
		a.networkBad = "this node has no pod CIDR yet"
	}
	return nil
}

// updateNode computes the Node object and says whether that worked; a change
// goes to the controllers.
func (a *Agent) updateNode() error {
	volumes := a.csi.Facts() // which asks for the node, so not under the lock
	a.mu.Lock()
	defer a.mu.Unlock()
	n, err := node.Make(&a.facts, node.Health{Runtime: a.runtimeBad, Network: a.networkBad, Pressure: a.evict.Conditions(), Handlers: a.can.handlers, GroupsPolicy: a.can.groupsPolicy, Deleted: a.deleted, CSI: volumes}, a.node, time.Now())
	if err != nil {
		return err
	}
	if node.Same(n, a.node) {
		return nil
	}
	a.node = n
	if a.stream != nil {
		a.stream.SetNode(n)
	}
	return nil
}

// wire connects the parts.
func (a *Agent) wire() {
	a.stream = stream.New(stream.Config{
		NodeName: a.cfg.Name, Version: a.cfg.Version, TLS: a.cfg.TLS, Controllers: a.controllers(),
		Desired: a.store, Logger: a.log, Cluster: a.setCluster, Node: a.setLive, Network: a.feed.Follow,
		Tunnel:     func(_ string, conn net.Conn) { a.kubelet.Serve(conn) },
		GossipKeys: a.cfg.GossipKeys, GossipKeyIDs: a.cfg.GossipKeyIDs,
	})
	a.newCSI()
	a.stream.SetNode(a.node)
	ips := make([]string, 0, len(a.cfg.NodeIPs))
	for _, ip := range a.cfg.NodeIPs {
		ips = append(ips, ip.String())
	}
	a.pods = pod.NewManager(pod.Config{
		NodeName: a.cfg.Name, Dir: a.cfg.DataDir, LocalDir: a.cfg.dir("local-volumes"), CgroupRoot: a.cfg.CgroupRoot, SeccompDir: a.cfg.dir("seccomp"), MaxPids: max(a.cfg.PodMaxPids, 0),
		Runtime: a.runtime, Images: a.runtime.Images, ImagesComing: a.images.Coming, ImagesFull: a.imagesFull, Layers: a.runtime.Layer, Views: a.runtime, CSI: a.csi, Beside: a.runtime.Beside, Objects: a.store, Statuses: a.store, Reporter: a.stream, Tokens: a.stream.Token, Certificates: a.stream.PodCertificate,
		HostIPs:  func() []string { return ips },
		Capacity: func() corev1.ResourceList { return a.capacity },
		Users:    a.users, UserNamespaces: a.userNamespaces,
		Node: a.admissionNode, RecursiveReadOnly: a.facts.RecursiveReadOnly,
		NetworkReady: func() bool {
			a.mu.Lock()
			defer a.mu.Unlock()
			return a.networkBad == ""
		},
		Policies: a.links(), PolicyOf: a.store.Policies,
		DNS: a.podDNS, ResolvConf: a.cfg.ResolvConf, KubernetesServiceIP: a.cfg.KubernetesServiceIP, Services: a.servicesIn,
		Logger: a.log,
	})
	a.images.Tried = a.pods.WakeAll // what waited for an image that did not come
	a.imageGC = a.newImageGC()
	a.evict = eviction.New(eviction.Config{
		Pods: a.pods, Node: nodeRoom{a}, Thresholds: a.cfg.thresholds, Transition: a.cfg.PressureTransition,
		Interval: a.cfg.EvictionInterval, Logger: a.log,
	})
	a.kubelet = kubelet.New(kubelet.Config{NodeName: a.cfg.Name, Runtime: a.runtime, Pods: a.pods, Logs: a.logs, Healthy: a.healthy, Volumes: a.volumeStats, Metrics: a.writeMetrics, Logger: a.log})
	a.store.Observe(desired.Observer{
		PodSet:     a.pods.Set,
		PodRemoved: a.pods.Remove,
		ObjectChanged: func(kind, namespace, name string) {
			a.pods.ObjectChanged(kind, namespace, name)
			switch kind {
			case desired.KindDriver, desired.KindAttachment, desired.KindSecret:
				a.csi.Look()
			}
			if kind == desired.KindVolume {
				a.volumesChanged()
			}
		},
		Synced: func(anew bool) {
			epoch, _ := a.store.Position()
			a.join(epoch)
			if !anew {
				return
			}
			select {
			case a.synced <- struct{}{}:
			default:
			}
		},
	})
}

// Certify asks the connected controller for a new certificate of this node.
func (a *Agent) Certify(ctx context.Context, r *pb.JoinRequest) (*pb.JoinResponse, error) {
	return a.stream.Certify(ctx, r)
}

func (a *Agent) join(clusterID string) {
	if clusterID != "" && a.cfg.Joined != nil {
		a.joined.Do(func() { a.cfg.Joined(clusterID) })
	}
}

func (a *Agent) healthy(context.Context) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	if text := a.runtimeBad + a.networkBad; text != "" {
		return errors.New(text)
	}
	return nil
}

// Run works until ctx ends. Containers and containerd go on.
func (a *Agent) Run(ctx context.Context) error {
	for _, p := range a.store.Pods() {
		a.pods.Set(p)
	}
	if epoch, _ := a.store.Position(); epoch != "" {
		a.join(epoch)
	}
	g, ctx := errgroup.WithContext(ctx)
	if a.daemon != nil {
		g.Go(func() error { return a.daemon.Run(ctx) })
	}
	if a.cfg.ImagesDir != "" {
		g.Go(func() error { return a.images.Run(ctx) })
	}
	g.Go(func() error { return a.pods.Run(ctx) })
	g.Go(func() error { return a.evict.Run(ctx) })
	g.Go(func() error { return a.imageGC.Run(ctx) })
	g.Go(func() error { return a.runtime.Run(ctx, a.handleEvent) })
	g.Go(func() error { return a.kubelet.Run(ctx) })
	g.Go(func() error { return a.logs.Run(ctx) })
	g.Go(func() error { return a.stream.Run(ctx) })
	g.Go(func() error { return a.feed.Keep(ctx) })
	g.Go(func() error { return a.services.Run(ctx) })
	g.Go(func() error { return a.addresses.Run(ctx) })
	g.Go(func() error { return a.policies.Run(ctx) })
	if a.hostPorts != nil {
		g.Go(func() error { return a.hostPorts.Run(ctx) })
	}
	g.Go(func() error { return a.followNetwork(ctx) })
	g.Go(func() error { return a.watchNode(ctx) })
	g.Go(func() error { return a.serveNames(ctx) })
	g.Go(func() error { return a.collect(ctx) })
	g.Go(func() error { return a.deleteVolumes(ctx) })
	g.Go(func() error { return a.csi.Run(ctx) })
	g.Go(func() error { return a.plugins.Run(ctx) })
	g.Go(func() error { return a.meter(ctx) })
	err := g.Wait()
	return errors.Join(err, a.store.Close(), a.runtime.Close())
}

// handleEvent takes one event of containerd.
func (a *Agent) handleEvent(e containerd.Event) {
	switch e.Type {
	case containerd.TaskExited:
		a.pods.TaskChanged(e.ID, true)
		a.logs.Ended(e.ID)
	case containerd.TaskStarted:
		a.pods.TaskChanged(e.ID, false)
		a.logs.Started(e.ID)
	case containerd.TaskOOM:
		a.pods.TaskChanged(e.ID, false)
	case containerd.ImageCreated:
		a.pods.ImageAppeared(e.ID)
	case containerd.Resubscribed:
		a.pods.WakeAll()
		a.logs.Resync()
		a.kick()
	}
}

func (a *Agent) kick() {
	select {
	case a.nodeChanged <- struct{}{}:
	default:
	}
}

// setCluster takes what a controller says of the others.
func (a *Agent) setCluster(c *pb.Cluster) {
	if len(c.Controllers) > 0 {
		raw, err := json.Marshal(c.Controllers)
		if err == nil {
			err = os.WriteFile(a.cfg.dir("controllers.json"), raw, 0o600)
		}
		if err != nil {
			a.log.Error("keep the list of controllers", "error", err)
		}
	}
	a.learnNames(c)
	a.mu.Lock()
	a.cluster = c
	a.mu.Unlock()
	select {
	case a.told <- struct{}{}:
	default:
	}
}

// controllers are those given and those known from before.
func (a *Agent) controllers() []string {
	list := slices.Clone(a.cfg.Controllers)
	raw, err := hostile.ReadRegular(a.cfg.dir("controllers.json"), hostile.MaxOwn)
	if err != nil {
		if !errors.Is(err, fs.ErrNotExist) {
			a.log.Warn("read the list of controllers", "error", err)
		}
		return list
	}
	var known []string
	if err := json.Unmarshal(raw, &known); err != nil {
		a.log.Warn("the list of controllers is damaged", "error", err)
	}
	for _, addr := range known {
		if !slices.Contains(list, addr) {
			list = append(list, addr)
		}
	}
	return list
}

// watchNode keeps the Node object true: it looks when told to, soon again while
// containerd is not ready, and now and then at memory and disk.
func (a *Agent) watchNode(ctx context.Context) error {
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-a.nodeChanged:
		case <-timer.C:
		}
		again := a.checkRuntime(ctx)
		if err := a.updateNode(); err != nil {
			a.log.Error("describe the node", "error", err)
		}
		timer.Reset(again)
	}
}

// checkRuntime asks CRI whether it and its network are ready, and lets pods
// that wait for that start. It returns when to ask again.
func (a *Agent) checkRuntime(ctx context.Context) time.Duration {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	runtimeText, networkText := "", ""
	resp, err := a.runtime.Status(ctx, &runtimev1.StatusRequest{})
	if err != nil {
		runtimeText = "containerd does not answer: " + err.Error()
		networkText = runtimeText
	} else {
		for _, c := range resp.Status.GetConditions() {
			switch {
			case c.Status:
			case c.Type == runtimev1.RuntimeReady:
				runtimeText = c.Message
			case c.Type == runtimev1.NetworkReady:
				networkText = c.Message
			}
		}
	}
	switch {
	case !a.network.Ready():
		networkText = "this node has no pod CIDR yet"
	case a.cfg.CNIConfDir != "" && networkText != "" && runtimeText == "":
		networkText += " (the pod network of --cni-conf-dir " + a.cfg.CNIConfDir + " has to be installed there)"
	case a.daemon == nil && networkText != "":
		networkText += " (the containerd given with --containerd must read its CNI configuration from " + a.cfg.cniConfDir() + ")"
	}
	a.mu.Lock()
	better := a.networkBad != "" && networkText == "" || a.runtimeBad != "" && runtimeText == ""
	a.runtimeBad, a.networkBad = runtimeText, networkText
	if resp != nil {
		a.can = a.runtimeCan(resp)
	}
	a.mu.Unlock()
	if better {
		a.pods.Hurry()
	}
	if runtimeText != "" || networkText != "" && a.network.Ready() && a.cfg.CNIConfDir == "" {
		return 100 * time.Millisecond // CRI is about to read the new configuration
	}
	return pressureInterval
}

// collect removes what belongs to no pod, once after each time the desired
// state became whole.
func (a *Agent) collect(ctx context.Context) error {
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-a.synced:
		}
		a.pods.Hurry() // those that wait for tokens
		for {
			err := a.pods.Collect(ctx)
			if err == nil || ctx.Err() != nil {
				break
			}
			a.log.Warn("look for pods that were removed; trying again", "error", err)
			select {
			case <-ctx.Done():
			case <-time.After(time.Second):
			}
		}
	}
}
