package machines

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"timonel/test/needs"
)

// buildInit builds the program that is process 1.
func buildInit(t *testing.T) string {
	t.Helper()
	program := filepath.Join(t.TempDir(), "machine")
	out, err := exec.Command("go", "build", "-buildvcs=false", "-o", program, "timonel/cmd/machine").CombinedOutput()
	require.NoError(t, err, string(out))
	return program
}

// testNetwork makes a network that is gone after the test.
func testNetwork(t *testing.T) Network {
	t.Helper()
	needs.Root(t, "makes network namespaces")
	prefix, err := FreePrefix(netip.MustParsePrefix("10.78.0.0/24"), 100)
	require.NoError(t, err)
	n := Network{Name: "machines-test-" + strconv.Itoa(os.Getpid()), Prefix: prefix}
	t.Cleanup(func() {
		require.NoError(t, n.Delete())
		require.Empty(t, n.Leftovers([]string{"c1", "c2"}))
	})
	require.NoError(t, n.Create())
	require.NoError(t, n.Create(), "a second time changes nothing")
	return n
}

func bootMachine(t *testing.T, n Network, program, name string, host byte) *Machine {
	t.Helper()
	a := n.Prefix.Addr().As4()
	a[3] = host
	m := n.Machine(name, netip.AddrFrom4(a), filepath.Join(t.TempDir(), name))
	t.Cleanup(func() { require.NoError(t, m.PowerOff(context.Background())) })
	require.NoError(t, m.Boot(t.Context(), program))
	return m
}

// reaches reports whether an address answers the machine: that it refuses a
// connection to a port where nothing listens is an answer.
func (m *Machine) reaches(t *testing.T, address netip.Addr) bool {
	t.Helper()
	err := inNamespace(m.Namespace(), func() error {
		conn, err := net.DialTimeout("tcp", netip.AddrPortFrom(address, 9).String(), time.Second)
		if err == nil {
			conn.Close()
		}
		return err
	})
	return err == nil || errors.Is(err, unix.ECONNREFUSED)
}

func TestMachines(t *testing.T) {
	n := testNetwork(t)
	program := buildInit(t)
	c1 := bootMachine(t, n, program, "c1", 11)
	c2 := bootMachine(t, n, program, "c2", 12)
	ctx := t.Context()

	t.Run("a machine has its own name, processes, /run and address", func(t *testing.T) {
		cmd, err := c1.Command(ctx, "sh", "-c", "hostname; ls /run; cat /proc/1/cmdline; ip -4 -o addr show eth0")
		require.NoError(t, err)
		out, err := cmd.Output()
		require.NoError(t, err)
		require.True(t, strings.HasPrefix(string(out), "c1\n"), string(out))
		require.Contains(t, string(out), c1.Address.String())
		require.Contains(t, string(out), "init\x00--dir")
	})

	t.Run("machines and the host reach each other", func(t *testing.T) {
		require.True(t, c1.reaches(t, c2.Address))
		require.True(t, c1.reaches(t, n.Host()))
	})

	t.Run("a cut is one-way or both ways, and heals", func(t *testing.T) {
		require.NoError(t, n.Cut("c1", []string{"c2"}, In))
		cuts, err := n.Cuts()
		require.NoError(t, err)
		require.Equal(t, []string{"c2 -> c1"}, cuts)
		require.False(t, c1.reaches(t, c2.Address), "the answer is dropped")
		require.True(t, c1.reaches(t, n.Host()))
		require.NoError(t, n.Cut("c1", []string{"c2", HostName}, Both))
		cuts, err = n.Cuts()
		require.NoError(t, err)
		require.Equal(t, []string{"c1 -> c2", "c1 -> host", "c2 -> c1", "host -> c1"}, cuts)
		require.False(t, c1.reaches(t, n.Host()))
		require.NoError(t, n.Create(), "creating again keeps cuts")
		require.NoError(t, n.Heal("c1"))
		cuts, err = n.Cuts()
		require.NoError(t, err)
		require.Empty(t, cuts)
		require.True(t, c1.reaches(t, c2.Address))
	})

	log := filepath.Join(c1.Dir, "log")
	process := Process{Argv: []string{"/bin/sh", "-c", "echo hello $GREETED; sleep 1000 & wait"}, Env: []string{"GREETED=world", "PATH=" + os.Getenv("PATH")}, Log: log}

	t.Run("the main process starts once", func(t *testing.T) {
		require.NoError(t, c1.Start(ctx, process))
		first, err := c1.State(ctx)
		require.NoError(t, err)
		require.True(t, first.Up())
		require.True(t, first.Main.Alive())
		require.NoError(t, c1.Start(ctx, process))
		second, err := c1.State(ctx)
		require.NoError(t, err)
		require.Equal(t, first.Main, second.Main)
		require.NoError(t, poll(ctx, func() (bool, error) {
			content, err := os.ReadFile(log)
			return string(content) == "hello world\n", err
		}))
	})

	t.Run("it is paused and resumed, alone and with the machine", func(t *testing.T) {
		for _, everything := range []bool{false, true} {
			require.NoError(t, c1.Signal(ctx, unix.SIGSTOP, everything))
			require.NoError(t, poll(ctx, func() (bool, error) {
				state, err := c1.State(ctx)
				return state.Paused, err
			}))
			require.NoError(t, c1.Signal(ctx, unix.SIGCONT, everything))
			require.NoError(t, poll(ctx, func() (bool, error) {
				state, err := c1.State(ctx)
				return !state.Paused, err
			}))
		}
	})

	t.Run("killed alone it leaves the rest, and how it ended is known", func(t *testing.T) {
		require.NoError(t, c1.Signal(ctx, unix.SIGKILL, false))
		state, err := c1.State(ctx)
		require.NoError(t, err)
		require.False(t, state.Up())
		require.True(t, state.On)
		require.Equal(t, "killed by SIGKILL", state.Exited)
		pids, err := c1.Pids()
		require.NoError(t, err)
		require.Len(t, pids, 2, "process 1 and the orphaned sleep")
		require.NoError(t, c1.Start(ctx, process))
	})

	t.Run("a program that is not there is an error", func(t *testing.T) {
		err := c2.Start(ctx, Process{Argv: []string{"/nowhere/program"}, Log: log})
		require.ErrorContains(t, err, "/nowhere/program")
	})

	t.Run("power off leaves no process, and boot brings it back", func(t *testing.T) {
		pids, err := c1.Pids()
		require.NoError(t, err)
		ids := identifyAll(pids)
		require.NoError(t, c1.PowerOff(ctx))
		require.False(t, slices.ContainsFunc(ids, ProcessID.Alive))
		require.False(t, c2.reaches(t, c1.Address))
		state, err := c1.State(ctx)
		require.NoError(t, err)
		require.Equal(t, State{}, state)
		require.NoError(t, c1.PowerOff(ctx), "off twice is harmless")
		require.NoError(t, c1.Boot(ctx, program))
		require.True(t, c2.reaches(t, c1.Address))
	})

	t.Run("a machine whose record is lost is still found", func(t *testing.T) {
		id := c2.initID()
		_, elsewhere := c2.RunsElsewhere()
		require.False(t, elsewhere)
		dir, elsewhere := n.Machine("c2", c2.Address, t.TempDir()).RunsElsewhere()
		require.True(t, elsewhere)
		require.Equal(t, c2.Dir, dir)
		require.NoError(t, os.Remove(c2.idFile()))
		require.Equal(t, id, c2.initID())
		require.NoError(t, c2.PowerOff(ctx))
		require.False(t, id.Alive())
	})
}

func identifyAll(pids []int) []ProcessID {
	var ids []ProcessID
	for _, pid := range pids {
		if id, err := Identify(pid); err == nil {
			ids = append(ids, id)
		}
	}
	return ids
}

func TestNames(t *testing.T) {
	t.Parallel()
	for name, want := range map[string]string{"timonel": "timonel-c1", "a-very-long-name": "a-v"} {
		n := Network{Name: name}
		require.True(t, strings.HasPrefix(n.Link("c1"), want), n.Link("c1"))
		require.LessOrEqual(t, len(n.Link("c123")), 15)
	}
	require.NotEqual(t, Network{Name: "a-very-long-name"}.Bridge(), Network{Name: "a-very-long-nome"}.Bridge())
	for _, bad := range []string{"", "Upper", "9lives", "-x", "a_b", strings.Repeat("a", 41)} {
		require.Error(t, CheckName(bad), bad)
	}
	require.NoError(t, CheckName("chaos-7"))
}

func TestFreePrefixSkipsUsed(t *testing.T) {
	t.Parallel()
	used := []netip.Prefix{netip.MustParsePrefix("10.77.0.0/24"), netip.MustParsePrefix("10.64.0.0/12")}
	require.True(t, overlapsAny(netip.MustParsePrefix("10.77.0.0/25"), used))
	require.True(t, overlapsAny(netip.MustParsePrefix("10.70.0.0/16"), used))
	require.False(t, overlapsAny(netip.MustParsePrefix("10.80.0.0/16"), used))
}

func TestMemoryOfThisProcess(t *testing.T) {
	t.Parallel()
	m, err := ReadMemory(os.Getpid())
	require.NoError(t, err)
	require.Positive(t, m.Anonymous)
	require.Equal(t, m.Resident, m.Anonymous+m.File)
}

func TestProcessIDOfAnEndedProcess(t *testing.T) {
	t.Parallel()
	cmd := exec.Command("sleep", "60")
	require.NoError(t, cmd.Start())
	id, err := Identify(cmd.Process.Pid)
	require.NoError(t, err)
	require.True(t, id.Alive())
	require.False(t, ProcessID{Pid: id.Pid, Start: id.Start + 1}.Alive(), "another process with the same pid")
	require.NoError(t, cmd.Process.Kill())
	_, err = cmd.Process.Wait()
	require.NoError(t, err)
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()
	require.NoError(t, poll(ctx, func() (bool, error) { return !id.Alive(), nil }))
}
