package cluster

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"timonel/internal/machines"
)

// Ports that every cluster uses; each machine has an address of its own.
const (
	APIPort     = 6443
	ClusterPort = 7443
	GossipPort  = 7946
)

// Role is what a machine is for.
type Role string

// The roles of machines.
const (
	Controller Role = "controller"
	Agent      Role = "agent"
)

// Spec is what a cluster consists of. It is kept in cluster.json.
type Spec struct {
	Name        string       `json:"name"`
	Run         string       `json:"run"` // absolute
	Created     time.Time    `json:"created"`
	Subnet      netip.Prefix `json:"subnet"`
	ClusterCIDR netip.Prefix `json:"clusterCIDR"`
	ServiceCIDR netip.Prefix `json:"serviceCIDR"`
	Bin         string       `json:"bin"`    // folder of the programs
	Images      string       `json:"images"` // folder of the images that agents import
	Controllers int          `json:"controllers"`
	Agents      int          `json:"agents"`
	// ControllerFlags and AgentFlags are added to the programs' own.
	ControllerFlags []string           `json:"controllerFlags,omitempty"`
	AgentFlags      []string           `json:"agentFlags,omitempty"`
	Forwarding      bool               `json:"hostForwarding"` // the host forwarded before we came
	Proxy           machines.ProcessID `json:"proxy"`
}

const specFile = "cluster.json"

// ErrNone says that a run folder holds no cluster.
var ErrNone = errors.New("no cluster")

// Load reads the cluster in a run folder.
func Load(run string) (*Spec, error) {
	run, err := filepath.Abs(run)
	if err != nil {
		return nil, err
	}
	content, err := os.ReadFile(filepath.Join(run, specFile))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("%w in %s: start one with `timonel up`, or name another folder with --run", ErrNone, run)
	} else if err != nil {
		return nil, fmt.Errorf("read cluster: %w", err)
	}
	var s Spec
	if err := json.Unmarshal(content, &s); err != nil {
		return nil, fmt.Errorf("read cluster: %s: %w: take it down with `timonel down` and start again", filepath.Join(run, specFile), err)
	}
	s.Run = run // the folder may have been moved
	return &s, nil
}

// save writes cluster.json, whole or not at all.
func (s *Spec) save() error {
	content, err := json.MarshalIndent(s, "", "  ")
	if err != nil {
		return err
	}
	file := filepath.Join(s.Run, specFile)
	if err := os.WriteFile(file+".new", append(content, '\n'), 0o644); err != nil {
		return fmt.Errorf("write cluster: %w", err)
	}
	if err := os.Rename(file+".new", file); err != nil {
		return fmt.Errorf("write cluster: %w", err)
	}
	return nil
}

// Network is the wire between the cluster's machines.
func (s *Spec) Network() machines.Network {
	return machines.Network{Name: s.Name, Prefix: s.Subnet}
}

// Names lists the machines: c1, c2, … then a1, a2, …
func (s *Spec) Names() []string { return append(s.ControllerNames(), s.AgentNames()...) }

// ControllerNames lists the controllers' machines.
func (s *Spec) ControllerNames() []string { return numbered("c", s.Controllers) }

// AgentNames lists the agents' machines.
func (s *Spec) AgentNames() []string { return numbered("a", s.Agents) }

func numbered(letter string, count int) []string {
	names := make([]string, count)
	for i := range names {
		names[i] = letter + strconv.Itoa(i+1)
	}
	return names
}

var machineName = regexp.MustCompile(`^[ca][1-9][0-9]{0,2}$`)

// Check returns an error that lists the machines when name is none of them.
func (s *Spec) Check(name string) error {
	if !slices.Contains(s.Names(), name) {
		return fmt.Errorf("there is no machine %s: this cluster has %s", name, strings.Join(s.Names(), ", "))
	}
	return nil
}

// RoleOf says what a machine is for.
func RoleOf(name string) Role {
	if strings.HasPrefix(name, "c") {
		return Controller
	}
	return Agent
}

// Address is a machine's address: controllers from .11, agents from .101. It is
// the zero Addr when the subnet is not known.
func (s *Spec) Address(name string) netip.Addr {
	number, err := strconv.Atoi(name[1:])
	if err != nil || !s.Subnet.IsValid() {
		return netip.Addr{}
	}
	base := 100
	if RoleOf(name) == Controller {
		base = 10
	}
	address := s.Subnet.Masked().Addr().As4()
	address[3] += byte(base + number)
	return netip.AddrFrom4(address)
}

// Machine describes the machine called name.
func (s *Spec) Machine(name string) *machines.Machine {
	return s.Network().Machine(name, s.Address(name), s.dir(name))
}

func (s *Spec) dir(name string) string { return filepath.Join(s.Run, name) }

// DataDir is where a machine's controller or agent keeps its data.
func (s *Spec) DataDir(name string) string { return filepath.Join(s.dir(name), "data") }

// LogFile is where the output of a machine's controller or agent goes.
func (s *Spec) LogFile(name string) string {
	return filepath.Join(s.dir(name), string(RoleOf(name))+".log")
}

// BundleDir is the operator's copy of the cluster's secrets.
func (s *Spec) BundleDir() string { return filepath.Join(s.Run, "bundle") }

// Kubeconfig is how to reach the cluster.
func (s *Spec) Kubeconfig() string { return filepath.Join(s.Run, "kubeconfig") }

// CgroupRoot is the cgroup below which an agent puts its pods.
func (s *Spec) CgroupRoot(name string) string { return "/timonel-" + s.Name + "-" + name }

func (s *Spec) program(name string) string { return filepath.Join(s.Bin, name) }

// ProxyAddress is where the load balancer in front of the controllers listens.
func (s *Spec) ProxyAddress() string { return addressOf(s.Network().Host(), APIPort) }

// APIAddress is where a controller serves the API.
func (s *Spec) APIAddress(name string) string { return addressOf(s.Address(name), APIPort) }

// ClusterAddress is where a controller serves agents and other controllers.
func (s *Spec) ClusterAddress(name string) string { return addressOf(s.Address(name), ClusterPort) }

func addressOf(ip netip.Addr, port uint16) string { return netip.AddrPortFrom(ip, port).String() }

func (s *Spec) addresses(port uint16) string {
	var all []string
	for _, name := range s.ControllerNames() {
		all = append(all, addressOf(s.Address(name), port))
	}
	return strings.Join(all, ",")
}

// process is the main process of a machine: a controller or an agent with the
// flags that an operator would give it.
func (s *Spec) process(name string) machines.Process {
	address := s.Address(name).String()
	p := machines.Process{Log: s.LogFile(name), Env: processEnv()}
	if RoleOf(name) == Controller {
		p.Argv = []string{s.program("controller"), "--name", name,
			"--data-dir", s.DataDir(name), "--bundle", filepath.Join(s.dir(name), "bundle"),
			"--bind-ip", address, "--bootstrap-expect", strconv.Itoa(s.Controllers),
			"--join", s.addresses(GossipPort),
			"--cluster-cidr", s.ClusterCIDR.String(), "--service-cidr", s.ServiceCIDR.String()}
		p.Argv = append(p.Argv, s.ControllerFlags...)
		// Clients reach them by the load balancer too. Not a flag: an older program
		// would refuse one that it does not know.
		p.Env = append(p.Env, "TIMONEL_TLS_SAN="+s.Network().Host().String())
		return p
	}
	p.Argv = []string{s.program("agent"), "--name", name,
		"--data-dir", s.DataDir(name), "--controllers", s.addresses(ClusterPort), "--token", "@" + s.tokenFile(name),
		"--node-ip", address, "--images", s.Images, "--cgroup-root", s.CgroupRoot(name)}
	// Of another version than the machine's, from `make runtime`.
	if runtime := s.program("runtime/containerd"); executable(runtime) {
		p.Argv = append(p.Argv, "--containerd-binary", runtime)
	}
	p.Argv = append(p.Argv, s.AgentFlags...)
	// All agents share the disk of this machine with whatever else is on it. Not a
	// flag, as above.
	p.Env = append(p.Env, "TIMONEL_SHARED_DISK=1")
	return p
}

func executable(path string) bool {
	info, err := os.Stat(path)
	return err == nil && info.Mode().IsRegular() && info.Mode().Perm()&0o111 != 0
}

// processEnv is the environment of controllers and agents: what they need of
// ours to find programs and proxies, and no more.
func processEnv() []string {
	env := []string{"PATH=" + searchPath(), "HOME=/root", "LANG=C.UTF-8"}
	for _, name := range []string{"HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "GOMEMLIMIT", "GOGC", "GODEBUG"} {
		if value, ok := os.LookupEnv(name); ok {
			env = append(env, name+"="+value)
		}
	}
	return env
}
