package cluster

import (
	"net/netip"
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"
	"k8s.io/client-go/tools/clientcmd"

	"timonel/pki"
)

func testSpec(t *testing.T) *Spec {
	t.Helper()
	return &Spec{Name: "test", Run: t.TempDir(), Subnet: netip.MustParsePrefix("10.77.3.0/24"),
		ClusterCIDR: netip.MustParsePrefix("10.245.0.0/16"), ServiceCIDR: netip.MustParsePrefix("10.96.0.0/16"),
		Bin: "/bin", Images: "/images", Controllers: 3, Agents: 2, ControllerFlags: []string{"--log-level=debug"}}
}

func TestMachinesOfASpec(t *testing.T) {
	t.Parallel()
	s := testSpec(t)
	require.Equal(t, []string{"c1", "c2", "c3", "a1", "a2"}, s.Names())
	require.Equal(t, "10.77.3.11:6443", s.APIAddress("c1"))
	require.Equal(t, "10.77.3.13:7443", s.ClusterAddress("c3"))
	require.Equal(t, "10.77.3.102", s.Address("a2").String())
	require.Equal(t, "10.77.3.1:6443", s.ProxyAddress())
	first, last := s.PoolAddresses()
	require.Equal(t, "10.77.3.241 10.77.3.254", first.String()+" "+last.String())
	require.NoError(t, s.Check("a2"))
	require.ErrorContains(t, s.Check("a3"), "c1, c2, c3, a1, a2")
	require.Error(t, s.Check(""))
}

func TestFlagsOfProcesses(t *testing.T) {
	t.Parallel()
	s := testSpec(t)
	controller := s.process("c2").Argv
	require.Subset(t, controller, []string{"/bin/controller", "--name", "c2", "--bind-ip", "10.77.3.12", "--bootstrap-expect", "3",
		"--join", "10.77.3.11:7946,10.77.3.12:7946,10.77.3.13:7946", "--cluster-cidr", "10.245.0.0/16", "--log-level=debug"})
	require.Contains(t, s.process("c2").Env, "TIMONEL_TLS_SAN=10.77.3.1", "the load balancer's address")
	agent := s.process("a1").Argv
	require.Subset(t, agent, []string{"/bin/agent", "--name", "a1", "--node-ip", "10.77.3.101", "--token", "@" + s.tokenFile("a1"), "--images", "/images",
		"--controllers", "10.77.3.11:7443,10.77.3.12:7443,10.77.3.13:7443", "--cgroup-root", "/timonel-test-a1"})
	require.NotContains(t, agent, "--log-level=debug")
	require.NotContains(t, agent, "--containerd-binary", "the machine's")
	s.Bin = t.TempDir()
	require.NoError(t, os.Mkdir(filepath.Join(s.Bin, "runtime"), 0o755))
	built := filepath.Join(s.Bin, "runtime", "containerd")
	require.NoError(t, os.WriteFile(built, nil, 0o644))
	require.NotContains(t, s.process("a1").Argv, built, "it cannot be run")
	require.NoError(t, os.Chmod(built, 0o755))
	require.Subset(t, s.process("a1").Argv, []string{"--containerd-binary", built})
	require.Contains(t, s.process("a1").Env, "TIMONEL_SHARED_DISK=1", "a full disk of the machine is no matter of the cluster's")
}

func TestSpecIsSavedAndLoaded(t *testing.T) {
	t.Parallel()
	s := testSpec(t)
	_, err := Load(s.Run)
	require.ErrorIs(t, err, ErrNone)
	require.ErrorContains(t, err, "timonel up")
	require.NoError(t, s.save())
	loaded, err := Load(s.Run)
	require.NoError(t, err)
	require.Equal(t, s, loaded)
	require.NoError(t, os.WriteFile(filepath.Join(s.Run, specFile), []byte("{"), 0o600))
	_, err = Load(s.Run)
	require.ErrorContains(t, err, specFile)
}

func TestPlanKeepsWhatIsThere(t *testing.T) {
	t.Parallel()
	programs := t.TempDir()
	for _, name := range []string{"controller", "agent", "machine", "image.tar"} {
		require.NoError(t, os.WriteFile(filepath.Join(programs, name), nil, 0o755))
	}
	five, three, one, two := 5, 3, 1, 2
	for name, tc := range map[string]struct {
		options Options
		want    string
		agents  int
	}{
		"nothing said":        {options: Options{Name: "test"}, agents: 2},
		"the same":            {options: Options{Name: "test", Controllers: &three, Agents: &two}, agents: 2},
		"more agents":         {options: Options{Name: "test", Agents: &five}, agents: 5},
		"fewer agents":        {options: Options{Name: "test", Agents: &one}, want: "2 agents"},
		"other controllers":   {options: Options{Name: "test", Controllers: &five}, want: "3 controllers"},
		"another name":        {options: Options{Name: "other"}, want: "--name test"},
		"a name that is none": {options: Options{Name: "Test"}, want: "lower-case"},
		"another subnet":      {options: Options{Name: "test", Subnet: netip.MustParsePrefix("10.9.0.0/24")}, want: "10.77.3.0/24"},
		"no programs":         {options: Options{Name: "test", Bin: "/nowhere"}, want: "make build"},
		"no images":           {options: Options{Name: "test", Images: "/nowhere"}, want: "make images"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := testSpec(t)
			s.Bin, s.Images = programs, programs
			require.NoError(t, s.save())
			tc.options.Run = s.Run
			got, err := plan(tc.options)
			if tc.want != "" {
				require.ErrorContains(t, err, tc.want)
				return
			}
			require.NoError(t, err)
			require.Equal(t, tc.agents, got.Agents)
			require.Equal(t, 3, got.Controllers)
		})
	}
}

func TestNewSpecErrors(t *testing.T) {
	t.Parallel()
	two, many := 2, 101
	for name, tc := range map[string]struct {
		options Options
		want    string
	}{
		"two controllers": {Options{Controllers: &two}, "1, 3 or 5"},
		"many agents":     {Options{Agents: &many}, "0 to 100"},
		"small subnet":    {Options{Subnet: netip.MustParsePrefix("10.9.0.0/28")}, "--subnet"},
		"host's address":  {Options{Subnet: netip.MustParsePrefix("10.9.0.1/24")}, "--subnet"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			tc.options.Run = t.TempDir()
			_, err := newSpec(tc.options)
			require.ErrorContains(t, err, tc.want)
		})
	}
}

func TestKubeconfigHasAContextForAllAndEach(t *testing.T) {
	t.Parallel()
	s := testSpec(t)
	bundle, err := pki.CreateBundle(s.BundleDir())
	require.NoError(t, err)
	require.NoError(t, s.writeKubeconfig(bundle))
	info, err := os.Stat(s.Kubeconfig())
	require.NoError(t, err)
	require.Equal(t, os.FileMode(0o600), info.Mode().Perm())
	config, err := clientcmd.LoadFromFile(s.Kubeconfig())
	require.NoError(t, err)
	require.Equal(t, "test", config.CurrentContext)
	servers := map[string]string{}
	for name, context := range config.Contexts {
		servers[name] = config.Clusters[context.Cluster].Server
	}
	require.Equal(t, map[string]string{"test": "https://10.77.3.1:6443", "c1": "https://10.77.3.11:6443",
		"c2": "https://10.77.3.12:6443", "c3": "https://10.77.3.13:6443"}, servers)
	require.Equal(t, "kubernetes", config.Clusters["test"].TLSServerName)

	before, err := os.ReadFile(s.Kubeconfig())
	require.NoError(t, err)
	require.NoError(t, s.writeKubeconfig(bundle))
	after, err := os.ReadFile(s.Kubeconfig())
	require.NoError(t, err)
	require.Equal(t, before, after, "a second up keeps it")
}

func TestCopiesOfTheBundleLoad(t *testing.T) {
	t.Parallel()
	s := testSpec(t)
	bundle, err := pki.CreateBundle(s.BundleDir())
	require.NoError(t, err)
	copied := filepath.Join(s.Run, "c1", "bundle")
	for range 2 {
		require.NoError(t, copyBundle(s.BundleDir(), copied))
	}
	again, err := pki.LoadBundle(copied)
	require.NoError(t, err)
	require.Equal(t, bundle.Token(), again.Token())
}

func TestSummary(t *testing.T) {
	t.Parallel()
	up := func(name, leader string, term uint64, agents ...string) ControllerStatus {
		return ControllerStatus{MachineStatus: MachineStatus{Name: name}, Answers: true, Leader: leader, Term: term, Agents: agents}
	}
	off := ControllerStatus{MachineStatus: MachineStatus{Name: "c3"}}
	for name, tc := range map[string]struct {
		controllers []ControllerStatus
		leader      string
		term        uint64
		problem     string
	}{
		"all agree":          {controllers: []ControllerStatus{up("c1", "c2", 4), up("c2", "c2", 4, "a1"), up("c3", "c2", 4)}, leader: "c2", term: 4},
		"one is off":         {controllers: []ControllerStatus{up("c1", "c2", 4), up("c2", "c2", 4, "a1"), off}, leader: "c2", term: 4},
		"an old leader left": {controllers: []ControllerStatus{up("c1", "c1", 4), up("c2", "c2", 5, "a1"), up("c3", "c2", 5)}, leader: "c2", term: 5},
		"an election":        {controllers: []ControllerStatus{up("c1", "", 4), up("c2", "", 5, "a1"), off}, term: 5, problem: "election"},
		"no majority":        {controllers: []ControllerStatus{off, up("c2", "c1", 5, "a1"), off}, term: 5, problem: "no majority"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := Status{Controllers: tc.controllers, Nodes: []NodeStatus{{MachineStatus: MachineStatus{Name: "a1"}}}}
			s.summarize()
			require.Equal(t, tc.leader, s.Leader)
			require.Equal(t, tc.term, s.Term)
			if tc.problem != "" {
				require.Len(t, s.Problems, 1)
				require.Contains(t, s.Problems[0], tc.problem)
			} else {
				require.Empty(t, s.Problems)
				require.Equal(t, "c2", s.Nodes[0].StreamTo)
			}
		})
	}
}
