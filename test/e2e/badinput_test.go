//go:build e2e

package e2e

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io/fs"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"timonel/internal/machines"
	"timonel/pki"
	"timonel/test/harness"
)

// TestBadInput gives the programs what people get wrong. Each time the answer is
// one line that says so, exit status 1, and nothing is destroyed.
func TestBadInput(t *testing.T) {
	for _, program := range []string{"controller", "agent", "timonel", "machine"} {
		t.Run(program+": a flag that there is not", func(t *testing.T) {
			requireFails(t, program, exec.Command(harness.Program(t, program), "--nonsense"), "nonsense")
		})
	}
	t.Run("controller: values that make no sense", func(t *testing.T) {
		for flag, value := range map[string]string{"bootstrap-expect": "2", "bind-ip": "localhost", "cluster-cidr": "10.244.1.1/16",
			"api-port": "99999", "join": "nowhere", "log-level": "loud", "name": "Not_A_Name"} {
			cmd := exec.Command(harness.Program(t, "controller"), "--name=c1", "--data-dir", t.TempDir(), "--bundle", t.TempDir(), "--bind-ip=127.0.0.1",
				"--"+flag+"="+value)
			requireFails(t, "controller", cmd, "--"+flag)
		}
	})
	t.Run("timonel: a machine that there is not, a cluster that there is not", func(t *testing.T) {
		empty := t.TempDir()
		requireFails(t, "timonel", exec.Command(harness.Program(t, "timonel"), "status", "--run", empty), "timonel up")
		requireFails(t, "timonel", exec.Command(harness.Program(t, "timonel"), "up", "--run", empty, "--controllers", "2"), "1, 3 or 5")
		requireFails(t, "timonel", exec.Command(harness.Program(t, "timonel"), "up", "--run", empty, "--name", "Bad_Name"), "Bad_Name")
		requireFails(t, "timonel", exec.Command(harness.Program(t, "timonel"), "up", "--run", empty, "--bin", empty), "make build")
	})
	t.Run("timonel and agent: no root", func(t *testing.T) {
		dir := t.TempDir()
		requireFails(t, "timonel", asNobody(t, "timonel", "up", "--run", dir), "root")
		requireFails(t, "agent", asNobody(t, "agent", "--name=a1", "--data-dir", dir, "--controllers=127.0.0.1:1", "--node-ip=127.0.0.1", "--token", wellFormedToken), "root")
	})
	t.Run("agent: no containerd", func(t *testing.T) {
		cmd := exec.Command(harness.Program(t, "agent"), "--name=a1", "--data-dir", t.TempDir(), "--controllers=127.0.0.1:1", "--node-ip=127.0.0.1",
			"--token", wellFormedToken, "--containerd", filepath.Join(t.TempDir(), "containerd.sock"))
		requireFails(t, "agent", cmd, "containerd")
	})
	t.Run("agent: a token that is none", func(t *testing.T) {
		cmd := exec.Command(harness.Program(t, "agent"), "--name=a1", "--data-dir", t.TempDir(), "--controllers=127.0.0.1:1", "--node-ip=127.0.0.1", "--token=secret")
		requireFails(t, "agent", cmd, "token")
	})
}

// wellFormedToken is of a cluster that there is not.
var wellFormedToken = "timonel1." + strings.Repeat("ab", 32) + "." + strings.Repeat("cd", 16)

// TestBadStart breaks what a single controller, on a machine of its own, starts
// from.
func TestBadStart(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	c := &controller{bundle: filepath.Join(dir, "bundle"), data: filepath.Join(dir, "data"), machine: newMachine(t, filepath.Join(dir, "c1"))}
	_, err := pki.CreateBundle(c.bundle)
	require.NoError(t, err)
	other := filepath.Join(dir, "other-bundle")
	otherBundle, err := pki.CreateBundle(other)
	require.NoError(t, err)
	c.start(t)

	t.Run("a port that is in use", func(t *testing.T) {
		second := *c
		second.data = filepath.Join(dir, "second")
		requireFails(t, "controller", second.command(t), "in use")
	})
	t.Run("agent: the token of another cluster", func(t *testing.T) {
		requireFails(t, "agent", c.agent(t, otherBundle.Token()), "another cluster")
	})
	t.Run("agent: a wrong secret in the token of the right cluster", func(t *testing.T) {
		bundle, err := pki.LoadBundle(c.bundle)
		require.NoError(t, err)
		token := bundle.Token()
		wrong := token[:strings.LastIndexByte(token, '.')+1] + strings.Repeat("00", 16)
		requireFails(t, "agent", c.agent(t, wrong), "token")
	})
	c.stop(t)

	t.Run("no bundle", func(t *testing.T) {
		without := *c
		without.bundle = filepath.Join(dir, "nowhere")
		requireFails(t, "controller", without.command(t), without.bundle)
	})
	t.Run("a data folder of another cluster", func(t *testing.T) {
		before := contents(t, c.data)
		foreign := *c
		foreign.bundle = other
		requireFails(t, "controller", foreign.command(t), "cluster")
		require.Equal(t, before, contents(t, c.data), "nothing is destroyed")
	})
	t.Run("a truncated log", func(t *testing.T) {
		c.requireRefusesTruncated(t, "*.db")
	})
	t.Run("a truncated snapshot", func(t *testing.T) {
		c.start(t)
		harness.Eventually(t, 3*time.Minute, "a snapshot", func() error { // one is due every minute or two
			if found, err := filepath.Glob(filepath.Join(c.data, "*", "snapshots", "*", "state.bin")); err != nil || len(found) == 0 {
				return errors.New("there is none")
			}
			return nil
		})
		c.stop(t)
		c.requireRefusesTruncated(t, "state.bin")
	})
	t.Run("with all put right again it starts", func(t *testing.T) {
		c.start(t)
		c.stop(t)
	})
}

// newMachine turns on a machine that is gone after the test.
func newMachine(t *testing.T, dir string) *machines.Machine {
	t.Helper()
	network := harness.Network(t, "badstart")
	m := network.Machine("c1", network.Host().Next(), dir)
	t.Cleanup(func() { require.NoError(t, m.PowerOff(context.Background())) })
	require.NoError(t, m.Boot(t.Context(), harness.Program(t, "machine")))
	return m
}

// controller is a cluster of one.
type controller struct {
	bundle, data string
	machine      *machines.Machine
}

func (c *controller) argv(t *testing.T) []string {
	t.Helper()
	return []string{harness.Program(t, "controller"), "--name=c1", "--data-dir", c.data, "--bundle", c.bundle,
		"--bind-ip", c.machine.Address.String(), "--bootstrap-expect=1", "--snapshot-threshold=20", "--trailing-logs=10"}
}

// command starts the controller on the machine, as one that is to fail.
func (c *controller) command(t *testing.T) *exec.Cmd {
	t.Helper()
	return c.inside(t, c.argv(t))
}

func (c *controller) agent(t *testing.T, token string) *exec.Cmd {
	t.Helper()
	return c.inside(t, []string{harness.Program(t, "agent"), "--name=a1", "--data-dir", t.TempDir(), "--node-ip", c.machine.Address.String(),
		"--controllers", c.machine.Address.String() + ":7443", "--gossip-port=17946", // 7946 is the controller's, on the same machine
		"--token", token, "--cgroup-root", "/timonel-badstart"})
}

func (c *controller) inside(t *testing.T, argv []string) *exec.Cmd {
	t.Helper()
	cmd, err := c.machine.Command(t.Context(), argv...)
	require.NoError(t, err)
	return cmd
}

func (c *controller) start(t *testing.T) {
	t.Helper()
	log := filepath.Join(c.machine.Dir, "controller.log")
	require.NoError(t, c.machine.Start(t.Context(), machines.Process{Argv: c.argv(t), Env: []string{"PATH=" + os.Getenv("PATH")}, Log: log}))
	bundle, err := pki.LoadBundle(c.bundle)
	require.NoError(t, err)
	client := clientOf(t, bundle)
	harness.Eventually(t, time.Minute, "the controller is ready", func() error {
		if running, exited, err := c.machine.Running(t.Context()); err != nil || !running {
			content, _ := os.ReadFile(log)
			t.Fatalf("the controller ended (%s): %s", exited, content)
		}
		response, err := client.Get("https://" + c.machine.Address.String() + ":6443/readyz")
		if err != nil {
			return err
		}
		response.Body.Close()
		if response.StatusCode != http.StatusOK {
			return errors.New(response.Status)
		}
		return nil
	})
}

func (c *controller) stop(t *testing.T) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	require.NoError(t, c.machine.Stop(ctx))
}

// requireRefusesTruncated cuts the newest file of that name short, checks that
// the controller refuses to start and changes nothing, and puts the file right.
func (c *controller) requireRefusesTruncated(t *testing.T, pattern string) {
	t.Helper()
	var newest string
	var newestTime time.Time
	require.NoError(t, filepath.WalkDir(c.data, func(path string, entry fs.DirEntry, err error) error {
		if err != nil || entry.IsDir() {
			return err
		}
		if ok, _ := filepath.Match(pattern, entry.Name()); !ok {
			return nil
		}
		info, err := entry.Info()
		if err == nil && info.ModTime().After(newestTime) {
			newest, newestTime = path, info.ModTime()
		}
		return err
	}))
	require.NotEmpty(t, newest, "no %s in %s", pattern, c.data)
	whole, err := os.ReadFile(newest)
	require.NoError(t, err)
	// Well below half, for a database has room to spare at its end.
	require.NoError(t, os.Truncate(newest, int64(min(len(whole)/2, 20<<10))))
	before := contents(t, c.data)
	requireFails(t, "controller", c.command(t), filepath.Base(newest))
	require.Equal(t, before, contents(t, c.data), "nothing is destroyed")
	require.NoError(t, os.WriteFile(newest, whole, 0o600))
}

// contents says how long each file of the log, of snapshots and of identity is.
func contents(t *testing.T, dir string) map[string]int64 {
	t.Helper()
	files := map[string]int64{}
	require.NoError(t, filepath.WalkDir(dir, func(path string, entry fs.DirEntry, err error) error {
		if err != nil || entry.IsDir() || entry.Name() == "lock" || slices.Contains([]string{".crt", ".key", ".pem"}, filepath.Ext(path)) {
			return err
		}
		info, err := entry.Info()
		if err == nil {
			files[path] = info.Size()
		}
		return err
	}))
	return files
}

// requireFails runs a command and checks that it ends by itself, soon, with exit
// status 1 and a last line that names the program and says want.
func requireFails(t *testing.T, program string, cmd *exec.Cmd, want string) {
	t.Helper()
	var output bytes.Buffer
	cmd.Stdout, cmd.Stderr = &output, &output
	cmd.WaitDelay = time.Second // what nsenter started may outlive it
	require.NoError(t, cmd.Start())
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	stop := context.AfterFunc(ctx, func() { cmd.Process.Kill() })
	defer stop()
	err := cmd.Wait()
	said := output.String()
	require.NoError(t, ctx.Err(), "it does not end by itself:\n%s", said)
	var exit *exec.ExitError
	require.ErrorAs(t, err, &exit, said)
	require.Equal(t, 1, exit.ExitCode(), said)
	require.NotContains(t, said, "goroutine ")
	lines := strings.Split(strings.TrimRight(said, "\n"), "\n")
	last := lines[len(lines)-1]
	require.True(t, strings.HasPrefix(last, program+": "), "the last line does not name the program:\n%s", said)
	require.Contains(t, last, want)
}

// asNobody runs a copy of a program as a user without rights.
func asNobody(t *testing.T, program string, args ...string) *exec.Cmd {
	t.Helper()
	dir, err := os.MkdirTemp("", "timonel-e2e-")
	require.NoError(t, err)
	t.Cleanup(func() { os.RemoveAll(dir) })
	require.NoError(t, os.Chmod(dir, 0o755))
	content, err := os.ReadFile(harness.Program(t, program))
	require.NoError(t, err)
	copied := filepath.Join(dir, program)
	require.NoError(t, os.WriteFile(copied, content, 0o755))
	cmd := exec.Command(copied, args...)
	cmd.Dir = "/"
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	return cmd
}

func clientOf(t *testing.T, bundle *pki.Bundle) *http.Client {
	t.Helper()
	admin, err := bundle.ClientCert("e2e", []string{pki.AdminGroup})
	require.NoError(t, err)
	certificate, err := admin.TLS()
	require.NoError(t, err)
	roots := x509.NewCertPool()
	require.True(t, roots.AppendCertsFromPEM(bundle.CA()))
	config := &tls.Config{RootCAs: roots, Certificates: []tls.Certificate{certificate}, MinVersion: tls.VersionTLS12}
	return &http.Client{Timeout: 2 * time.Second, Transport: &http.Transport{TLSClientConfig: config, DisableKeepAlives: true}}
}
