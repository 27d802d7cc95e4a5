package main

import (
	"errors"
	"fmt"
	"log/slog"
	"math"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/pflag"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	"k8s.io/apimachinery/pkg/util/validation"

	"timonel/agent"
	"timonel/agent/admission"
	"timonel/agent/containerd"
	"timonel/agent/eviction"
	"timonel/agent/imagegc"
	"timonel/agent/logs"
	"timonel/agent/podnet"
	"timonel/network/dns"
	"timonel/network/service"
	"timonel/pki"
)

// options are the flags, as given.
type options struct {
	name, dataDir string
	kubeletDir    string
	cgroupRoot    string
	bridge        string
	containerd    string
	logLevel      string

	controllers     []string
	token           string
	tokenFile       string
	nodeIP          string
	images          string
	containerdBin   string
	handlers        []string
	pauseImage      string
	registryDir     string
	cniBin          string
	cniConf         string
	gossipPort      int
	labels          []string
	taints          []string
	maxPods         int64
	podMaxPids      int64
	unsafeSysctls   []string
	imageGC         imagegc.Policy
	logMaxSize      string
	logMaxFiles     int
	evictionHard    string
	evictionReclaim string
	transition      time.Duration
	clusterDNS      []string
	clusterDomain   string
	resolvConf      string
	stubDomains     []string
	kubernetesIP    string
	nodePorts       []string
	podNetwork      string
	vxlan           podnet.VXLAN
	podMTU          int
	keepSource      []string
	nameClients     []string
	purge, keepData bool

	podsReachCluster, blockMetadata bool
}

// common are the flags that cleanup takes too.
func (o *options) common(f *pflag.FlagSet) {
	host, _ := os.Hostname()
	f.StringVar(&o.name, "name", strings.ToLower(host), "the node's name in the cluster")
	f.StringVar(&o.dataDir, "data-dir", "/var/lib/timonel-agent", "folder for all that the agent keeps")
	f.StringVar(&o.kubeletDir, "kubelet-dir", "", "where CSI drivers have the data folder, as their manifests name it (/var/lib/kubelet); a\n"+
		"symbolic link to it is made there. Empty: the data folder's own path")
	f.StringVar(&o.cgroupRoot, "cgroup-root", "", "cgroup of all pods (default /timonel/NAME-HASH)")
	f.StringVar(&o.bridge, "bridge", "timonel0", "network device that pods hang on")
	f.StringVar(&o.containerd, "containerd", "", "socket of a containerd to use, instead of one of the agent's own")
	f.BoolVar(&o.keepData, "keep-data", false, "cleanup: keep the data folder, with images and credentials")
	f.StringVar(&o.logLevel, "log-level", "info", "debug, info, warn or error")
}

func (o *options) flags(f *pflag.FlagSet) {
	f.StringSliceVar(&o.controllers, "controllers", nil, "host:port of the controllers' cluster ports; after joining, those known are used too")
	f.StringVar(&o.tokenFile, "token-file", "", "file of the join token, needed once; it may also be in the environment as TIMONEL_JOIN_TOKEN")
	f.StringVar(&o.token, "token", "", "- for a join token from standard input, or @FILE; a token itself is taken with a warning, as others can read it here")
	f.StringVar(&o.nodeIP, "node-ip", "", "this node's own address or addresses (default: that of the default route)")
	f.StringVar(&o.images, "images", "", "folder of image archives (*.tar) to import, now and when they appear")
	f.StringVar(&o.containerdBin, "containerd-binary", "", "containerd to run; its shim and runc are those beside it, if there are any (default: from PATH)")
	f.StringArrayVar(&o.handlers, "runtime-handler", nil, "a runtime beside runc that RuntimeClasses may name, HANDLER=/PATH/OF/PROGRAM for one that is called as runc is, or HANDLER=SHIM-TYPE such as gvisor=io.containerd.runsc.v1; may be given several times")
	f.StringVar(&o.pauseImage, "pause-image", agent.DefaultPauseImage, "image of every pod's sandbox")
	f.StringVar(&o.registryDir, "registry-config", "", "folder of containerd's HOST/hosts.toml files (default: DATA-DIR/containerd/certs.d)")
	f.StringVar(&o.cniConf, "cni-conf-dir", "", "folder of the CNI configuration of another pod network, which gives pods their addresses, in place of the agent's own: that makes no bridge, routes or address translation of pods then")
	f.StringVar(&o.cniBin, "cni-bin", agent.DefaultCNIBin, "folder of the CNI plugins")
	f.IntVar(&o.gossipPort, "gossip-port", 7946, "port of the gossip pool, UDP and TCP")
	f.StringSliceVar(&o.labels, "labels", nil, "labels of the node, key=value,…")
	f.StringSliceVar(&o.taints, "taints", nil, "taints of the node when it registers, key=value:effect,…")
	f.Int64Var(&o.maxPods, "max-pods", 110, "how many pods the node takes")
	f.StringSliceVar(&o.unsafeSysctls, "allowed-unsafe-sysctls", nil, "sysctls of their own namespaces that pods may set beside the safe ones, such as kernel.msgmax,net.core.*; what they do to the node's other pods is yours to know")
	f.Int64Var(&o.podMaxPids, "pod-max-pids", agent.DefaultPodMaxPids, "how many processes and threads one pod may have; -1 for any number")
	d := imagegc.Default()
	hard := eviction.DefaultHard
	if sharesDisk() {
		d.High, hard = 100, eviction.DefaultShared
	}
	f.StringVar(&o.evictionHard, "eviction-hard", hard, "of how little being left pods are evicted, SIGNAL<VALUE,…; none or empty for never")
	f.StringVar(&o.evictionReclaim, "eviction-minimum-reclaim", "", "how much more than that has to be left until it is enough, SIGNAL=VALUE,…")
	f.DurationVar(&o.transition, "eviction-pressure-transition-period", agent.DefaultPressureTransition, "for how long the node says that it is short of something after it was")
	f.IntVar(&o.imageGC.High, "image-gc-high-threshold", d.High, "percent of use of the images' file system from which images that no pod uses are removed; 100 for never")
	f.IntVar(&o.imageGC.Low, "image-gc-low-threshold", d.Low, "percent of use of the images' file system that removing images stops at")
	f.DurationVar(&o.imageGC.MinAge, "minimum-image-ttl-duration", d.MinAge, "how long an unused image is kept at least")
	f.StringVar(&o.logMaxSize, "container-log-max-size", "10Mi", "size at which a container's log is rotated; negative for never")
	f.IntVar(&o.logMaxFiles, "container-log-max-files", logs.DefaultMaxFiles, "how many files a container's log is at most, at least 2; older ones are removed")
	f.StringSliceVar(&o.clusterDNS, "cluster-dns", nil, "name servers for pods instead of this agent's own, which does not answer then; none for those of the node")
	f.StringVar(&o.clusterDomain, "cluster-domain", "", "the cluster's DNS domain (default: as the controllers say)")
	f.StringVar(&o.resolvConf, "resolv-conf", "", "file of the node's name servers, for pods and for names outside the cluster (default: /etc/resolv.conf, or systemd-resolved's where that names the machine itself)")
	f.StringArrayVar(&o.stubDomains, "dns-stub-domain", nil, "a domain with name servers of its own, DOMAIN=ADDRESS[:PORT],…; may be given several times")
	f.StringVar(&o.kubernetesIP, "kubernetes-service-ip", "10.96.0.1", "address of the kubernetes service, as containers are told")
	f.StringSliceVar(&o.nodePorts, "node-port-addresses", []string{service.Primary}, "networks of the addresses of this node where node ports of Services are, such as 192.0.2.0/24,…; primary for the node's own, 0.0.0.0/0,::/0 for all but loopback's")
	f.StringVar(&o.podNetwork, "pod-network-mode", string(podnet.Auto), "how other nodes' pods are reached: direct by routes, vxlan, or auto for routes to nodes of the same network segment and VXLAN to others")
	f.IntVar(&o.vxlan.ID, "pod-network-vxlan-id", podnet.DefaultVXLANID, "number (VNI) of the pods' VXLAN, the same on all nodes")
	f.IntVar(&o.vxlan.Port, "pod-network-vxlan-port", podnet.DefaultVXLANPort, "UDP port of the pods' VXLAN, the same on all nodes")
	f.IntVar(&o.podMTU, "pod-network-mtu", 0, "greatest packet of pods; 0 for that of the device with --node-ip, less what VXLAN takes where it is needed")
	f.StringSliceVar(&o.nameClients, "dns-clients", nil, "networks outside the cluster that may ask this node's DNS server; pods and the node itself always may")
	f.StringSliceVar(&o.keepSource, "non-masquerade-cidr", nil, "networks outside the cluster to which pods' packets go with the pod's own address, and not the node's")
	f.BoolVar(&o.podsReachCluster, "pods-reach-cluster-ports", false, "let pods reach the ports that controllers and agents have for each other (the API is reached in any case)")
	f.BoolVar(&o.blockMetadata, "block-metadata", false, "keep pods from 169.254.169.254, where clouds tell a machine who it is and what it may do")
	f.BoolVar(&o.purge, "purge", false, "the same as the command cleanup")
}

// sharesDisk says that the disk is not this node's alone, as when several agents
// run on a developer's machine: how full it is says nothing about the node.
func sharesDisk() bool { return os.Getenv("TIMONEL_SHARED_DISK") != "" }

// checkCommon validates what every command needs and makes paths absolute.
func (o *options) checkCommon() error {
	if err := pki.CheckName(o.name); err != nil {
		return fmt.Errorf("--name %q: %w", o.name, err)
	}
	if o.dataDir == "" {
		return fmt.Errorf("--data-dir is empty")
	}
	var err error
	if o.dataDir, err = filepath.Abs(o.dataDir); err != nil {
		return fmt.Errorf("--data-dir: %w", err)
	}
	if o.dataDir == "/" {
		return fmt.Errorf("--data-dir is /: give a folder of the agent's own")
	}
	return nil
}

func (o *options) logger() (*slog.Logger, error) {
	var level slog.Level
	if err := level.UnmarshalText([]byte(o.logLevel)); err != nil {
		return nil, fmt.Errorf("--log-level %q: want debug, info, warn or error", o.logLevel)
	}
	return slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: level})), nil
}

// config validates all flags and makes the agent's configuration of them. Each
// error names its flag.
func (o *options) config() (agent.Config, error) {
	var cfg agent.Config
	if err := o.checkCommon(); err != nil {
		return cfg, err
	}
	log, err := o.logger()
	if err != nil {
		return cfg, err
	}
	for _, addr := range o.controllers {
		host, port, err := net.SplitHostPort(addr)
		if n, portErr := strconv.ParseUint(port, 10, 16); err != nil || portErr != nil || n == 0 || host == "" {
			return cfg, fmt.Errorf("--controllers: %q is not host:port", addr)
		}
	}
	if o.gossipPort < 1 || o.gossipPort > 65535 {
		return cfg, fmt.Errorf("--gossip-port %d is not a port number", o.gossipPort)
	}
	if o.maxPods < 1 {
		return cfg, fmt.Errorf("--max-pods %d: must be at least 1", o.maxPods)
	}
	if err := admission.CheckUnsafeSysctls(o.unsafeSysctls); err != nil {
		return cfg, fmt.Errorf("--allowed-unsafe-sysctls: %w", err)
	}
	if o.podMaxPids < 1 && o.podMaxPids != -1 {
		return cfg, fmt.Errorf("--pod-max-pids %d: must be at least 1, or -1 for any number", o.podMaxPids)
	}
	if strings.TrimSpace(o.evictionHard) == "" {
		o.evictionHard = "none"
	}
	thresholds, err := eviction.ParseHard(o.evictionHard)
	if err != nil {
		return cfg, fmt.Errorf("--eviction-hard: %w", err)
	}
	if err := eviction.ParseMinReclaim(o.evictionReclaim, thresholds); err != nil {
		return cfg, fmt.Errorf("--eviction-minimum-reclaim: %w", err)
	}
	if o.transition <= 0 {
		return cfg, fmt.Errorf("--eviction-pressure-transition-period %s: must be more than 0", o.transition)
	}
	if err := o.imageGC.Validate(); err != nil {
		return cfg, err
	}
	handlers, err := o.runtimeHandlers()
	if err != nil {
		return cfg, err
	}
	logMaxSize, err := parseLogMaxSize(o.logMaxSize)
	if err != nil {
		return cfg, err
	}
	if o.logMaxFiles < 2 || o.logMaxFiles > logs.MaxMaxFiles {
		return cfg, fmt.Errorf("--container-log-max-files %d: must be 2 to %d", o.logMaxFiles, logs.MaxMaxFiles)
	}
	ips, err := nodeIPs(o.nodeIP)
	if err != nil {
		return cfg, err
	}
	for flag, dir := range map[string]*string{"--images": &o.images, "--registry-config": &o.registryDir, "--cni-bin": &o.cniBin, "--cni-conf-dir": &o.cniConf} {
		if *dir == "" {
			continue
		}
		if *dir, err = filepath.Abs(*dir); err != nil {
			return cfg, fmt.Errorf("%s: %w", flag, err)
		}
		if info, err := os.Stat(*dir); err != nil || !info.IsDir() {
			return cfg, fmt.Errorf("%s: %s is not a folder", flag, *dir)
		}
	}
	labels, err := parseLabels(o.labels)
	if err != nil {
		return cfg, err
	}
	taints, err := parseTaints(o.taints)
	if err != nil {
		return cfg, err
	}
	if o.kubernetesIP != "" && net.ParseIP(o.kubernetesIP) == nil {
		return cfg, fmt.Errorf("--kubernetes-service-ip: %q is not an IP address", o.kubernetesIP)
	}
	for _, ip := range o.clusterDNS {
		if net.ParseIP(ip) == nil && (ip != agent.NoClusterDNS || len(o.clusterDNS) > 1) {
			return cfg, fmt.Errorf("--cluster-dns: %q is not an IP address", ip)
		}
	}
	if o.clusterDomain != "" && len(validation.IsDNS1123Subdomain(o.clusterDomain)) > 0 {
		return cfg, fmt.Errorf("--cluster-domain: %q is not a DNS name", o.clusterDomain)
	}
	stubs, err := dns.ParseStubs(o.stubDomains)
	if err != nil {
		return cfg, fmt.Errorf("--dns-stub-domain: %w", err)
	}
	if o.resolvConf != "" {
		if o.resolvConf, err = filepath.Abs(o.resolvConf); err != nil {
			return cfg, fmt.Errorf("--resolv-conf: %w", err)
		}
		if _, err := os.Stat(o.resolvConf); err != nil {
			return cfg, fmt.Errorf("--resolv-conf: %w", err)
		}
	}
	if err := service.CheckNodePortAddresses(o.nodePorts); err != nil {
		return cfg, fmt.Errorf("--node-port-addresses: %w", err)
	}
	if err := podnet.CheckMode(o.podNetwork); err != nil {
		return cfg, fmt.Errorf("--pod-network-mode: %w", err)
	}
	if o.vxlan.ID < 1 || o.vxlan.ID >= 1<<24 {
		return cfg, fmt.Errorf("--pod-network-vxlan-id %d: must be 1 to %d", o.vxlan.ID, 1<<24-1)
	}
	if o.vxlan.Port < 1 || o.vxlan.Port > 65535 {
		return cfg, fmt.Errorf("--pod-network-vxlan-port %d is not a port number", o.vxlan.Port)
	}
	if o.podMTU != 0 && (o.podMTU < 1280 || o.podMTU > 65535) {
		return cfg, fmt.Errorf("--pod-network-mtu %d: must be 1280 to 65535, or 0", o.podMTU)
	}
	keepSource, err := networks("non-masquerade-cidr", o.keepSource)
	if err != nil {
		return cfg, err
	}
	nameClients, err := networks("dns-clients", o.nameClients)
	if err != nil {
		return cfg, err
	}
	cfg = agent.Config{
		PodNetworkMode: podnet.Mode(o.podNetwork), VXLAN: o.vxlan, PodMTU: o.podMTU, KeepSource: keepSource, NameClients: nameClients,
		Name: o.name, DataDir: o.dataDir, KubeletDir: o.kubeletDir, Controllers: o.controllers, NodeIPs: ips, ImagesDir: o.images,
		ContainerdSocket: o.containerd, ContainerdBinary: o.containerdBin, RuntimeHandlers: handlers, PauseImage: o.pauseImage, RegistryDir: o.registryDir,
		CNIBin: o.cniBin, CNIConfDir: o.cniConf, Bridge: o.bridge, CgroupRoot: o.cgroupRoot, MaxPods: o.maxPods, PodMaxPids: o.podMaxPids, UnsafeSysctls: o.unsafeSysctls, ImageGC: &o.imageGC,
		ContainerLogMaxSize: logMaxSize, ContainerLogMaxFiles: o.logMaxFiles,
		EvictionHard: o.evictionHard, EvictionMinReclaim: o.evictionReclaim, PressureTransition: o.transition, Labels: labels, Taints: taints,
		GossipAddress: net.JoinHostPort(ips[0].String(), strconv.Itoa(o.gossipPort)),
		ClusterDNS:    o.clusterDNS, ClusterDomain: o.clusterDomain, KubernetesServiceIP: o.kubernetesIP, NodePortAddresses: o.nodePorts,
		ResolvConf: o.resolvConf, StubDomains: stubs, PodsReachCluster: o.podsReachCluster, BlockMetadata: o.blockMetadata,
		Version: version, Logger: log,
	}
	cfg.SetDefaults()
	return cfg, cfg.Validate()
}

// runtimeHandlers reads --runtime-handler.
func (o *options) runtimeHandlers() (map[string]string, error) {
	out := map[string]string{}
	for _, text := range o.handlers {
		name, program, ok := strings.Cut(text, "=")
		switch {
		case !ok:
			return nil, fmt.Errorf("--runtime-handler: %q is not HANDLER=PROGRAM", text)
		case o.containerd != "":
			return nil, errors.New("--runtime-handler: the containerd of --containerd has the runtimes of its own configuration")
		case out[name] != "":
			return nil, fmt.Errorf("--runtime-handler: %s is given twice", name)
		}
		if err := containerd.CheckHandler(name, program); err != nil {
			return nil, fmt.Errorf("--runtime-handler: %w", err)
		}
		out[name] = program
	}
	return out, nil
}

// networks reads those of a flag.
func networks(flag string, list []string) (out []netip.Prefix, err error) {
	for _, text := range list {
		p, err := netip.ParsePrefix(text)
		if err != nil {
			return nil, fmt.Errorf("--%s: %q is not a network such as 192.0.2.0/24", flag, text)
		}
		out = append(out, p.Masked())
	}
	return out, nil
}

// parseLogMaxSize reads a quantity as the kubelet does.
func parseLogMaxSize(text string) (int64, error) {
	q, err := resource.ParseQuantity(text)
	if err != nil {
		return 0, fmt.Errorf("--container-log-max-size %q: %w", text, err)
	}
	n, ok := q.AsInt64()
	if !ok || n >= 0 && n < logs.MinMaxSize || n > math.MaxInt64/logs.MaxMaxFiles/2 {
		return 0, fmt.Errorf("--container-log-max-size %q: must be a number of bytes, at least %d, or negative for no rotation", text, logs.MinMaxSize)
	}
	return n, nil
}

// nodeIPs are the given addresses, or the one that the machine would reach
// others from.
func nodeIPs(text string) ([]net.IP, error) {
	if text != "" {
		var out []net.IP
		for _, part := range strings.Split(text, ",") {
			ip := net.ParseIP(strings.TrimSpace(part))
			if ip == nil {
				return nil, fmt.Errorf("--node-ip: %q is not an IP address", part)
			}
			if !isLocal(ip) {
				return nil, fmt.Errorf("--node-ip: no network device of this machine has the address %s", ip)
			}
			out = append(out, ip)
		}
		return out, nil
	}
	// No packet is sent: this asks the kernel's routing table.
	conn, err := net.Dial("udp", "192.0.2.1:9")
	if err == nil {
		defer conn.Close()
		if addr, ok := conn.LocalAddr().(*net.UDPAddr); ok {
			return []net.IP{addr.IP}, nil
		}
	}
	return nil, fmt.Errorf("--node-ip is needed: this machine has no default route to tell its address by")
}

func isLocal(ip net.IP) bool {
	addrs, err := net.InterfaceAddrs()
	if err != nil {
		return true // cannot tell
	}
	for _, a := range addrs {
		if n, ok := a.(*net.IPNet); ok && n.IP.Equal(ip) {
			return true
		}
	}
	return false
}

func parseLabels(list []string) (map[string]string, error) {
	out := map[string]string{}
	for _, item := range list {
		key, value, ok := strings.Cut(item, "=")
		if !ok {
			return nil, fmt.Errorf("--labels: %q is not key=value", item)
		}
		if errs := append(validation.IsQualifiedName(key), validation.IsValidLabelValue(value)...); len(errs) > 0 {
			return nil, fmt.Errorf("--labels: %q: %s", item, errs[0])
		}
		out[key] = value
	}
	return out, nil
}

func parseTaints(list []string) ([]corev1.Taint, error) {
	var out []corev1.Taint
	for _, item := range list {
		rest, effect, ok := strings.Cut(item, ":")
		key, value, _ := strings.Cut(rest, "=")
		switch e := corev1.TaintEffect(effect); e {
		case corev1.TaintEffectNoSchedule, corev1.TaintEffectPreferNoSchedule, corev1.TaintEffectNoExecute:
		default:
			ok = false
		}
		if !ok {
			return nil, fmt.Errorf("--taints: %q is not key=value:NoSchedule, :PreferNoSchedule or :NoExecute", item)
		}
		if errs := append(validation.IsQualifiedName(key), validation.IsValidLabelValue(value)...); len(errs) > 0 {
			return nil, fmt.Errorf("--taints: %q: %s", item, errs[0])
		}
		out = append(out, corev1.Taint{Key: key, Value: value, Effect: corev1.TaintEffect(effect)})
	}
	return out, nil
}
