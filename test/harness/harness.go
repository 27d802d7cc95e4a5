package harness

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"hash/fnv"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
	"k8s.io/client-go/kubernetes"

	"timonel/internal/cluster"
	"timonel/internal/machines"
)

// Options of a cluster.
type Options struct {
	Controllers, Agents int
	Sample              bool
	ControllerFlags     []string
	AgentFlags          []string
	Bin                 string // folder of other programs than bin/; empty: that
}

// Cluster is a cluster that is taken down when the test ends.
type Cluster struct {
	Spec   *cluster.Spec
	UpTook time.Duration
	Output string // what `timonel up` said

	program string
}

// Program returns the path of a program in bin/.
func Program(t testing.TB, name string) string {
	t.Helper()
	_, file, _, ok := runtime.Caller(0)
	require.True(t, ok)
	path := filepath.Join(filepath.Dir(file), "..", "..", "bin", name)
	_, err := os.Stat(path)
	require.NoError(t, err, "run `make build images` first")
	return path
}

// Network makes a network on a free subnet that is gone after the test. The name is
// the test's; this process's number is added.
func Network(t testing.TB, name string) machines.Network {
	t.Helper()
	prefix, err := machines.FreePrefix(netip.MustParsePrefix("10.80.0.0/24"), 100)
	require.NoError(t, err)
	network := machines.Network{Name: name + "-" + strconv.Itoa(os.Getpid()), Prefix: prefix}
	t.Cleanup(func() { require.NoError(t, network.Delete()) })
	require.NoError(t, network.Create())
	return network
}

// Up brings a cluster up.
func Up(t testing.TB, o Options) *Cluster {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Fatal("machines take root: run the tests with sudo")
	}
	c := &Cluster{program: Program(t, "timonel")}
	run := filepath.Join(t.TempDir(), "run")
	h := fnv.New32a()
	h.Write([]byte(run))
	name := fmt.Sprintf("t%x", h.Sum32())
	args := []string{"up", "--run", run, "--name", name, "--sample=" + strconv.FormatBool(o.Sample),
		"--controllers", strconv.Itoa(o.Controllers), "--agents", strconv.Itoa(o.Agents)}
	if o.Bin != "" {
		args = append(args, "--bin", o.Bin, "--images", filepath.Join(filepath.Dir(c.program), "images"))
	}
	program := c.program
	if own := filepath.Join(o.Bin, "timonel"); o.Bin != "" {
		if _, err := os.Stat(own); err == nil { // a release: its agents join as they did then
			program = own
		}
	}
	for _, flag := range o.ControllerFlags {
		args = append(args, "--controller-flag="+flag)
	}
	for _, flag := range o.AgentFlags {
		args = append(args, "--agent-flag="+flag)
	}
	t.Cleanup(func() {
		if t.Failed() {
			if os.Getenv("TIMONEL_TEST_LOGS") != "" && c.Spec != nil {
				c.dumpStacks()
			}
			printLogs(t, run)
		}
		out, err := exec.Command(c.program, "down", "--run", run, "--name", name).CombinedOutput()
		require.NoError(t, err, string(out))
	})
	begin := time.Now()
	out, err := exec.Command(program, args...).CombinedOutput()
	c.UpTook, c.Output = time.Since(begin), string(out)
	require.NoError(t, err, c.Output)
	t.Logf("\n%s", c.Output)
	c.Spec, err = cluster.Load(run)
	require.NoError(t, err)
	return c
}

// dumpStacks has each controller write its goroutines into its log, and end.
func (c *Cluster) dumpStacks() {
	for _, name := range c.Spec.ControllerNames() {
		if state, err := c.Spec.Machine(name).State(context.Background()); err == nil && state.Main.Pid != 0 {
			_ = unix.Kill(state.Main.Pid, unix.SIGQUIT)
		}
	}
	time.Sleep(2 * time.Second)
}

// printLogs shows the end of every log of a cluster whose test failed, and
// copies the logs to TIMONEL_TEST_LOGS, if that is set (with the controllers' goroutines).
func printLogs(t testing.TB, run string) {
	logs, _ := filepath.Glob(filepath.Join(run, "*", "*.log"))
	keep := os.Getenv("TIMONEL_TEST_LOGS")
	for _, log := range logs {
		content, err := os.ReadFile(log)
		if err != nil || len(content) == 0 {
			continue
		}
		if keep != "" {
			name := filepath.Base(filepath.Dir(log)) + "-" + filepath.Base(log)
			if err := os.MkdirAll(keep, 0o755); err == nil {
				os.WriteFile(filepath.Join(keep, name), content, 0o644)
			}
		}
		lines := bytes.Split(bytes.TrimSpace(content), []byte("\n"))
		if len(lines) > 25 {
			lines = lines[len(lines)-25:]
		}
		t.Logf("%s ends with:\n%s", log, bytes.Join(lines, []byte("\n")))
	}
}

// Run runs a timonel command on the cluster and returns its output.
func (c *Cluster) Run(t testing.TB, args ...string) string {
	t.Helper()
	out, err := c.Try(t.Context(), args...)
	require.NoError(t, err, "timonel %s: %s", strings.Join(args, " "), out)
	return out
}

// Try is Run for commands that may fail.
func (c *Cluster) Try(ctx context.Context, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, c.program, args...)
	cmd.Env = append(os.Environ(), "TIMONEL_RUN="+c.Spec.Run, "TIMONEL_NAME="+c.Spec.Name, "KUBECONFIG=")
	out, err := cmd.CombinedOutput()
	return string(out), err
}

// Status is what `timonel status -o json` says.
func (c *Cluster) Status(t testing.TB) *cluster.Status {
	t.Helper()
	var status cluster.Status
	out := c.Run(t, "status", "-o", "json")
	require.NoError(t, json.Unmarshal([]byte(out), &status), out)
	return &status
}

// Leader waits until a majority follows a leader and returns its name.
func (c *Cluster) Leader(t testing.TB) string {
	t.Helper()
	var leader string
	Eventually(t, 20*time.Second, "a leader", func() error {
		if leader = c.Status(t).Leader; leader == "" {
			return fmt.Errorf("nobody leads")
		}
		return nil
	})
	return leader
}

// Kill kills -9 a controller or agent, or cuts the power of its machine.
func (c *Cluster) Kill(t testing.TB, name string, processOnly bool) {
	t.Helper()
	require.NoError(t, c.Spec.Kill(t.Context(), name, processOnly))
}

// Start starts a controller or agent and waits until it is ready. A controller
// that was wiped also has to vote again: wiping another before would lose the
// majority.
func (c *Cluster) Start(t testing.TB, name string) {
	t.Helper()
	require.NoError(t, c.Spec.Start(t.Context(), name))
	if cluster.RoleOf(name) == cluster.Controller {
		c.WaitServing(t, name, time.Minute)
		Eventually(t, time.Minute, name+" votes", func() error {
			for _, s := range c.Status(t).Controllers {
				if s.Name == name && (!s.Answers || s.Role == "non-voter" || s.Role == "joining") {
					return fmt.Errorf("it is %q", s.Role)
				}
			}
			return nil
		})
	} else {
		c.WaitNode(t, name, true, time.Minute)
	}
}

// Client reaches the API: through the load balancer when on is empty, else on
// that controller.
func (c *Cluster) Client(t testing.TB, on string) *kubernetes.Clientset {
	t.Helper()
	if on == "" {
		on = c.Spec.Name
	}
	config, err := c.Spec.RESTConfig(on)
	require.NoError(t, err)
	config.Timeout = 15 * time.Second
	config.ContentType = "application/vnd.kubernetes.protobuf"
	set, err := kubernetes.NewForConfig(config)
	require.NoError(t, err)
	return set
}

// Eventually calls f until it returns nil, and fails the test with f's last
// error after the timeout. It returns how long it took.
func Eventually(t testing.TB, timeout time.Duration, what string, f func() error) time.Duration {
	t.Helper()
	begin := time.Now()
	ctx, cancel := context.WithTimeout(t.Context(), timeout)
	defer cancel()
	ticker := time.NewTicker(25 * time.Millisecond)
	defer ticker.Stop()
	for {
		err := f()
		if err == nil {
			return time.Since(begin)
		}
		select {
		case <-ctx.Done():
			t.Fatalf("%s: not within %s: %v", what, timeout, err)
		case <-ticker.C:
		}
	}
}

// For checks again and again for a while that f returns nil.
func For(t testing.TB, duration time.Duration, what string, f func() error) {
	t.Helper()
	end := time.NewTimer(duration)
	defer end.Stop()
	ticker := time.NewTicker(100 * time.Millisecond)
	defer ticker.Stop()
	for {
		if err := f(); err != nil {
			t.Fatalf("%s: %v", what, err)
		}
		select {
		case <-end.C:
			return
		case <-ticker.C:
		}
	}
}
