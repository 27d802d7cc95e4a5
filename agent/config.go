package agent

import (
	"context"
	"crypto/sha256"
	"crypto/tls"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"path"
	"path/filepath"
	"strconv"
	"time"

	corev1 "k8s.io/api/core/v1"

	"timonel/agent/containerd"
	"timonel/agent/eviction"
	"timonel/agent/imagegc"
	"timonel/agent/logs"
	"timonel/agent/podnet"
	"timonel/network/dns/resolvconf"
	"timonel/network/service"
)

// Config describes one agent. Everything it owns on the machine is derived
// from Name and DataDir, so that several agents run on one machine, each in a
// network namespace of its own.
type Config struct {
	// Name is the node's name in the cluster.
	Name string
	// DataDir holds all that the agent keeps. Absolute.
	DataDir string
	// KubeletDir is the path at which CSI drivers have DataDir: their manifests name it. A
	// symbolic link to DataDir is made there if nothing is. Default: DataDir.
	KubeletDir string
	// Controllers are host:port of cluster ports to begin with.
	Controllers []string
	// TLS is the node's side of a connection to a controller.
	TLS *tls.Config
	// NodeIPs are the node's own addresses, the first of each family counts.
	NodeIPs []net.IP
	// ImagesDir has image archives to import; empty: none.
	ImagesDir string
	// loadImages is put round the import of each archive in tests.
	loadImages func(load func(context.Context, string) ([]string, error)) func(context.Context, string) ([]string, error)
	// ContainerdSocket is a containerd to use; empty: the agent runs its own.
	ContainerdSocket string
	// ContainerdBinary is the containerd to run. Default: from PATH.
	ContainerdBinary string
	// RuntimeHandlers are runtimes that pods may ask for, as [containerd.DaemonConfig]
	// has them. Not with ContainerdSocket: that containerd has its own.
	RuntimeHandlers map[string]string
	// PauseImage is the sandbox image.
	PauseImage string
	// RegistryDir has containerd's HOST/hosts.toml files. Default: below DataDir.
	RegistryDir string
	// CNIConfDir has the CNI configuration of another pod network, in place of the agent's
	// own. Default: the agent's.
	CNIConfDir string
	// CNIBin has the CNI plugins.
	CNIBin string
	// Bridge is the device that pods hang on. Default "timonel0".
	Bridge string
	// CgroupRoot is the cgroup of all pods. Default /timonel/NAME-HASH.
	CgroupRoot string
	// MaxPods is how many pods the node takes. Default 110.
	MaxPods int64
	// PodMaxPids is how many processes and threads one pod may have, -1: any
	// number. Default DefaultPodMaxPids.
	PodMaxPids int64
	// UnsafeSysctls are sysctls that pods may set beside the safe ones, as
	// [admission.Node] has them.
	UnsafeSysctls []string
	// EvictionInterval is how often pods' limits of disk and what the node has left
	// are looked at. Default eviction.Interval.
	EvictionInterval time.Duration
	// EvictionHard are the thresholds of eviction, as in eviction.ParseHard.
	// Default eviction.DefaultHard; "none": nothing is evicted for the node's sake.
	EvictionHard string
	// EvictionMinReclaim is how much more than a threshold is freed, as in
	// eviction.ParseMinReclaim.
	EvictionMinReclaim string
	// PressureTransition is for how long the node says that it is short of
	// something after it was. Default 5 min.
	PressureTransition time.Duration
	thresholds         []eviction.Threshold // set by Validate
	// ImageGC says when images that no pod uses are removed. Default
	// imagegc.Default().
	ImageGC *imagegc.Policy
	// ImageGCInterval is how often the images' file system is looked at. Default
	// imagegc.Interval.
	ImageGCInterval time.Duration
	// ContainerLogMaxSize is at how many bytes a container's log is rotated;
	// negative: never. Default 10 MiB.
	ContainerLogMaxSize int64
	// ContainerLogMaxFiles is how many files a container's log is at most.
	// Default 5.
	ContainerLogMaxFiles int

	Labels map[string]string
	Taints []corev1.Taint
	// GossipAddress is where gossip reaches this node, host:port.
	GossipAddress string
	// ClusterDNS are the cluster's name servers, where this agent is not to answer for the
	// cluster's names itself: somebody else's, or NoClusterDNS. Default: this agent
	// answers, at the addresses that controllers say.
	ClusterDNS []string
	// ClusterDomain is that of the cluster's names. Default: as controllers say.
	ClusterDomain string
	// ResolvConf has the node's name servers, for pods and for names that are not the
	// cluster's. Default: resolvconf.Find.
	ResolvConf string
	// StubDomains are domains with name servers of their own.
	StubDomains map[string][]netip.AddrPort
	// KubernetesServiceIP is what containers see.
	KubernetesServiceIP string
	// NodePortAddresses are the networks of the addresses of this node where node ports
	// are. Default service.Primary: NodeIPs.
	NodePortAddresses []string
	// PodNetworkMode says how other nodes' pods are reached. Default podnet.Auto.
	PodNetworkMode podnet.Mode
	// VXLAN is where packets are that are carried to nodes of other segments.
	VXLAN podnet.VXLAN
	// PodMTU is the MTU of pods. Default: as the node's own network allows.
	PodMTU int
	// NameClients are networks beside the pods' that may ask this node for the cluster's names.
	NameClients []netip.Prefix
	// KeepSource are networks beside the pods' to which pods' packets go with the pod's
	// own address.
	KeepSource []netip.Prefix
	// PodsReachCluster lets pods reach the ports that controllers and agents have for
	// each other. The API is reached in any case.
	PodsReachCluster bool
	// BlockMetadata keeps pods from the address where clouds tell a machine of itself.
	BlockMetadata bool
	// Version of the agent.
	Version string
	// Joined is called, once, with the cluster's id when a controller has first
	// said it; at once when it is known from before.
	Joined func(clusterID string)
	// GossipKeys is called with the keys of the nodes' gossip pool that a controller
	// tells, the first of which seals; without error they are kept. GossipKeyIDs names
	// those that are kept. Nil: this agent takes part in no gossip.
	GossipKeys   func(keys [][]byte) error
	GossipKeyIDs func() []string
	Logger       *slog.Logger
}

// DefaultPauseImage is made by images/build.
const DefaultPauseImage = "docker.io/timonel/pause:latest"

// DefaultCNIBin is where Debian puts the CNI plugins.
const DefaultCNIBin = "/usr/lib/cni"

// DefaultPodMaxPids leaves room for large programs and keeps one pod from taking
// all the process ids of a node.
const DefaultPodMaxPids = 4096

// DefaultPressureTransition is upstream's.
const DefaultPressureTransition = 5 * time.Minute

// SetDefaults fills what is empty and has a default.
func (c *Config) SetDefaults() {
	if c.KubeletDir == "" {
		c.KubeletDir = c.DataDir
	}
	if c.PauseImage == "" {
		c.PauseImage = DefaultPauseImage
	}
	if c.CNIBin == "" {
		c.CNIBin = DefaultCNIBin
	}
	if c.Bridge == "" {
		c.Bridge = "timonel0"
	}
	if c.CgroupRoot == "" {
		c.CgroupRoot = path.Join("/timonel", c.ID())
	}
	if c.MaxPods == 0 {
		c.MaxPods = 110
	}
	if c.PodMaxPids == 0 {
		c.PodMaxPids = DefaultPodMaxPids
	}
	if c.EvictionHard == "" {
		c.EvictionHard = eviction.DefaultHard
	}
	if c.PressureTransition == 0 {
		c.PressureTransition = DefaultPressureTransition
	}
	if c.ImageGC == nil {
		policy := imagegc.Default()
		c.ImageGC = &policy
	}
	if c.ContainerLogMaxSize == 0 {
		c.ContainerLogMaxSize = logs.DefaultMaxSize
	}
	if c.ContainerLogMaxFiles == 0 {
		c.ContainerLogMaxFiles = logs.DefaultMaxFiles
	}
	if c.ResolvConf == "" {
		c.ResolvConf = resolvconf.Find()
	}
	if c.Logger == nil {
		c.Logger = slog.Default()
	}
}

// Validate names the first field that cannot work.
func (c *Config) Validate() error {
	switch {
	case c.Name == "":
		return errors.New("agent config: Name is empty")
	case !filepath.IsAbs(c.DataDir):
		return fmt.Errorf("agent config: DataDir %q is not an absolute path", c.DataDir)
	case c.KubeletDir != "" && !filepath.IsAbs(c.KubeletDir):
		return fmt.Errorf("agent config: KubeletDir %q is not an absolute path", c.KubeletDir)
	case len(c.NodeIPs) == 0:
		return errors.New("agent config: NodeIPs is empty")
	case c.MaxPods < 0:
		return fmt.Errorf("agent config: MaxPods %d is negative", c.MaxPods)
	case c.PodMaxPids < -1:
		return fmt.Errorf("agent config: PodMaxPids %d: want a number of processes, or -1 for any", c.PodMaxPids)
	case c.ContainerLogMaxSize >= 0 && c.ContainerLogMaxSize < logs.MinMaxSize:
		return fmt.Errorf("agent config: ContainerLogMaxSize %d: want at least %d bytes, or a negative number for no rotation", c.ContainerLogMaxSize, logs.MinMaxSize)
	case c.ContainerLogMaxFiles < 2 || c.ContainerLogMaxFiles > logs.MaxMaxFiles:
		return fmt.Errorf("agent config: ContainerLogMaxFiles %d: want 2 to %d", c.ContainerLogMaxFiles, logs.MaxMaxFiles)
	case c.ContainerdSocket != "" && len(c.RuntimeHandlers) > 0:
		return errors.New("agent config: RuntimeHandlers: the containerd of ContainerdSocket has those of its own configuration")
	case len(c.Bridge) > 15:
		return fmt.Errorf("agent config: Bridge %q is longer than 15 characters", c.Bridge)
	case !path.IsAbs(c.CgroupRoot) || path.Clean(c.CgroupRoot) == "/":
		return fmt.Errorf("agent config: CgroupRoot %q must be an absolute cgroup path below the root", c.CgroupRoot)
	}
	if c.PressureTransition < 0 {
		return fmt.Errorf("agent config: PressureTransition %s is negative", c.PressureTransition)
	}
	if err := service.CheckNodePortAddresses(c.NodePortAddresses); err != nil {
		return fmt.Errorf("agent config: NodePortAddresses: %w", err)
	}
	var err error
	if c.thresholds, err = eviction.ParseHard(c.EvictionHard); err != nil {
		return fmt.Errorf("agent config: EvictionHard: %w", err)
	}
	if err := eviction.ParseMinReclaim(c.EvictionMinReclaim, c.thresholds); err != nil {
		return fmt.Errorf("agent config: EvictionMinReclaim: %w", err)
	}
	if err := c.ImageGC.Validate(); err != nil {
		return fmt.Errorf("agent config: ImageGC: %w", err)
	}
	return nil
}

// ID tells this agent's things from those of others on the machine.
func (c *Config) ID() string {
	sum := sha256.Sum256([]byte(c.DataDir))
	return c.Name + "-" + hex.EncodeToString(sum[:4])
}

func (c *Config) dir(parts ...string) string {
	return filepath.Join(append([]string{c.DataDir}, parts...)...)
}

func (c *Config) daemon() containerd.DaemonConfig {
	return containerd.DaemonConfig{
		Dir: c.dir("containerd"), Binary: c.ContainerdBinary, PauseImage: c.PauseImage,
		CNIConfDir: c.cniConfDir(), CNIBinDirs: []string{c.CNIBin}, RegistryDir: c.RegistryDir, Handlers: c.RuntimeHandlers, Logger: c.Logger,
	}
}

func (c *Config) cniConfDir() string {
	if c.CNIConfDir != "" {
		return c.CNIConfDir
	}
	return c.dir("cni", "conf")
}

func (c *Config) network() podnet.Config {
	var ips []netip.Addr
	for _, ip := range c.NodeIPs {
		if addr, ok := netip.AddrFromSlice(ip); ok {
			ips = append(ips, addr.Unmap())
		}
	}
	return podnet.Config{
		Name: "timonel-" + c.ID(), Bridge: c.Bridge, ConfDir: c.cniConfDir(), Foreign: c.CNIConfDir != "", StateDir: c.dir("cni", "state"),
		BinDir: c.CNIBin, Table: "timonel-pods", NodeIPs: ips, Mode: c.PodNetworkMode, VXLAN: c.VXLAN, MTU: c.PodMTU, KeepSource: c.KeepSource,
		Logger: c.Logger,
	}
}

// clusterPorts are those at which nodes talk to each other in packets that no dialer of
// this process marks: gossip's, and that of pods' packets between segments.
func (c *Config) clusterPorts() []uint16 {
	vxlan := c.VXLAN.Port
	if vxlan == 0 {
		vxlan = podnet.DefaultVXLANPort
	}
	out := []uint16{uint16(vxlan)}
	if _, text, err := net.SplitHostPort(c.GossipAddress); err == nil {
		if port, err := strconv.ParseUint(text, 10, 16); err == nil && port != 0 && int(port) != vxlan {
			out = append(out, uint16(port))
		}
	}
	return out
}
