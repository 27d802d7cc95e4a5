package machines

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Machine is one machine of a network, on or off. What it keeps is in Dir.
type Machine struct {
	Name    string
	Address netip.Addr
	Dir     string // absolute; its files: init.json, init.sock, init.log and the main process's data

	network Network
}

// Process is the main process of a machine.
type Process struct {
	Argv []string `json:"argv"` // Argv[0] is the program's absolute path
	Env  []string `json:"env"`
	Log  string   `json:"log"` // file that its output is appended to
}

// State is what a machine is doing.
type State struct {
	On      bool      `json:"on"`
	Init    ProcessID `json:"init"`    // process 1
	Main    ProcessID `json:"main"`    // zero when the main process does not run
	Paused  bool      `json:"paused"`  // the main process is stopped by a signal
	Exited  string    `json:"exited"`  // how the last main process ended, if one did
	Started time.Time `json:"started"` // when the last main process started
}

// Up reports whether the machine is on and its main process runs.
func (s State) Up() bool { return s.On && s.Main.Pid != 0 }

// settle is how long the kernel may take to start or to end a machine.
const settle = 20 * time.Second

func (m *Machine) idFile() string { return filepath.Join(m.Dir, "init.json") }

// Namespace is the name of the machine's network namespace.
func (m *Machine) Namespace() string { return m.network.Namespace(m.Name) }

// Boot turns the machine on with nothing running in it but program, cmd/machine's
// path, as process 1. A machine that is on stays as it is.
func (m *Machine) Boot(ctx context.Context, program string) error {
	if m.initID().Alive() {
		return m.network.setLink(m.Name, true)
	}
	if err := m.clear(); err != nil {
		return err
	}
	if err := os.MkdirAll(m.Dir, 0o755); err != nil {
		return fmt.Errorf("machine %s: %w", m.Name, err)
	}
	if err := m.network.attach(m.Name, m.Address); err != nil {
		return fmt.Errorf("machine %s: %w", m.Name, err)
	}
	log, err := os.OpenFile(filepath.Join(m.Dir, "init.log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return fmt.Errorf("machine %s: %w", m.Name, err)
	}
	defer log.Close()
	cmd := exec.Command(program, "init", "--dir", m.Dir, "--hostname", m.Name)
	cmd.Dir, cmd.Stdout, cmd.Stderr = "/", log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true,
		Cloneflags: unix.CLONE_NEWPID | unix.CLONE_NEWNS | unix.CLONE_NEWUTS | unix.CLONE_NEWIPC}
	if err := inNamespace(m.Namespace(), cmd.Start); err != nil {
		return fmt.Errorf("machine %s: start process 1: %w", m.Name, err)
	}
	id, err := Identify(cmd.Process.Pid)
	go cmd.Wait() // reaps it if it ends while we are its parent
	if err == nil {
		err = writeJSON(m.idFile(), id)
	}
	if err != nil {
		return fmt.Errorf("machine %s: record process 1: %w", m.Name, err)
	}
	return m.waitInit(ctx, id)
}

// waitInit waits until process 1 answers.
func (m *Machine) waitInit(ctx context.Context, id ProcessID) error {
	ctx, cancel := context.WithTimeout(ctx, settle)
	defer cancel()
	return poll(ctx, func() (bool, error) {
		if !id.Alive() {
			return false, fmt.Errorf("machine %s: process 1 ended: see %s", m.Name, filepath.Join(m.Dir, "init.log"))
		}
		_, err := m.call(ctx, request{Op: opStatus})
		return err == nil, nil
	})
}

// Start starts the machine's main process. One that runs stays as it is.
func (m *Machine) Start(ctx context.Context, process Process) error {
	if !m.initID().Alive() {
		return fmt.Errorf("machine %s is off", m.Name)
	}
	reply, err := m.call(ctx, request{Op: opStart, Process: process})
	if err != nil {
		return fmt.Errorf("machine %s: %w", m.Name, err)
	}
	if reply.Error != "" {
		return fmt.Errorf("machine %s: start %s: %s", m.Name, filepath.Base(process.Argv[0]), reply.Error)
	}
	return nil
}

// State looks at the machine.
func (m *Machine) State(ctx context.Context) (State, error) {
	state := State{Init: m.initID()}
	if state.On = state.Init.Alive(); !state.On {
		return State{}, nil
	}
	if state.Init.Stopped() { // it could not answer
		state.Paused = true
		state.Main = m.recordedMain()
		return state, nil
	}
	reply, err := m.call(ctx, request{Op: opStatus})
	if err != nil {
		if !state.Init.Alive() { // it was turned off meanwhile
			return State{}, nil
		}
		return state, fmt.Errorf("machine %s: %w", m.Name, err)
	}
	state.Exited, state.Started = reply.Exited, reply.Started
	if reply.Pid == 0 {
		return state, nil
	}
	if state.Main, err = m.hostID(state.Init.Pid, reply.Pid); err != nil {
		return state, fmt.Errorf("machine %s: %w", m.Name, err)
	}
	state.Paused = state.Main.Stopped()
	return state, nil
}

// Running asks whether the main process runs and, when not, how it ended. It is
// cheaper than State.
func (m *Machine) Running(ctx context.Context) (running bool, exited string, err error) {
	if !m.initID().Alive() {
		return false, "machine is off", nil
	}
	reply, err := m.call(ctx, request{Op: opStatus})
	if err != nil {
		return false, "", fmt.Errorf("machine %s: %w", m.Name, err)
	}
	return reply.Pid != 0, reply.Exited, nil
}

// recordedMain is the main process as the last look at the machine found it.
func (m *Machine) recordedMain() ProcessID {
	var id ProcessID
	if readJSON(filepath.Join(m.Dir, "main.json"), &id) != nil || !id.Alive() {
		return ProcessID{}
	}
	return id
}

// hostID finds which process of the host a pid inside the machine is.
func (m *Machine) hostID(init, inner int) (ProcessID, error) {
	_, depth, err := innerPid(init)
	if err != nil {
		return ProcessID{}, err
	}
	pids, err := descendants(init)
	if err != nil {
		return ProcessID{}, err
	}
	for _, pid := range pids {
		if found, d, err := innerPid(pid); err == nil && d == depth && found == inner {
			id, err := Identify(pid)
			if err != nil {
				return ProcessID{}, nil // it ended while we looked
			}
			return id, writeJSON(filepath.Join(m.Dir, "main.json"), id)
		}
	}
	return ProcessID{}, nil
}

// PowerOff cuts the machine's power: nothing in it runs one instruction more or
// sends one packet more, and only its folder is left. It waits until all is
// gone. A machine that is off is no error.
func (m *Machine) PowerOff(ctx context.Context) error {
	id := m.initID()
	if id.Alive() {
		// First the link, so that no peer is told that connections are gone.
		if err := m.network.setLink(m.Name, false); err != nil && !errors.As(err, &netlink.LinkNotFoundError{}) {
			return fmt.Errorf("machine %s: %w", m.Name, err)
		}
	}
	return m.clear()
}

// clear kills what is left of the machine's processes and removes its network.
func (m *Machine) clear() error {
	id := m.initID()
	if id.Alive() {
		if err := unix.Kill(id.Pid, unix.SIGKILL); err != nil && !errors.Is(err, unix.ESRCH) {
			return fmt.Errorf("machine %s: kill process 1: %w", m.Name, err)
		}
		ctx, cancel := context.WithTimeout(context.Background(), settle)
		defer cancel()
		err := poll(ctx, func() (bool, error) { return !id.Alive(), nil })
		if err != nil {
			return fmt.Errorf("machine %s: process 1 (pid %d) did not end after SIGKILL: %w", m.Name, id.Pid, err)
		}
	}
	for _, file := range []string{m.idFile(), filepath.Join(m.Dir, "init.sock"), filepath.Join(m.Dir, "main.json")} {
		if err := os.Remove(file); err != nil && !errors.Is(err, os.ErrNotExist) {
			return fmt.Errorf("machine %s: %w", m.Name, err)
		}
	}
	if err := m.network.detach(m.Name); err != nil {
		return fmt.Errorf("machine %s: %w", m.Name, err)
	}
	return nil
}

// Signal sends a signal to the machine's main process alone, or to every
// process of the machine.
func (m *Machine) Signal(ctx context.Context, signal unix.Signal, everything bool) error {
	state, err := m.State(ctx)
	if err != nil {
		return err
	}
	if !state.On {
		return fmt.Errorf("machine %s is off", m.Name)
	}
	pids := []int{state.Main.Pid}
	if everything {
		if pids, err = descendants(state.Init.Pid); err != nil {
			return fmt.Errorf("machine %s: list processes: %w", m.Name, err)
		}
	} else if state.Main.Pid == 0 {
		return fmt.Errorf("the main process of machine %s does not run", m.Name)
	}
	for _, pid := range pids {
		if err := unix.Kill(pid, signal); err != nil && !errors.Is(err, unix.ESRCH) {
			return fmt.Errorf("machine %s: %s to pid %d: %w", m.Name, signal, pid, err)
		}
	}
	if signal != unix.SIGKILL || everything {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, settle)
	defer cancel()
	return m.waitEnded(ctx)
}

// waitEnded waits until process 1 has seen the main process end, so that it can
// be started again.
func (m *Machine) waitEnded(ctx context.Context) error {
	return poll(ctx, func() (bool, error) {
		running, _, err := m.Running(ctx)
		return !running, err
	})
}

// Stop asks the main process to end (SIGTERM) and waits until it has, or until
// ctx ends.
func (m *Machine) Stop(ctx context.Context) error {
	state, err := m.State(ctx)
	if err != nil || !state.Up() {
		return err
	}
	if err := unix.Kill(state.Main.Pid, unix.SIGTERM); err != nil && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("machine %s: stop pid %d: %w", m.Name, state.Main.Pid, err)
	}
	if err := m.waitEnded(ctx); err != nil {
		return fmt.Errorf("machine %s: pid %d does not end: %w", m.Name, state.Main.Pid, err)
	}
	return nil
}

// Command prepares a command that runs inside the machine.
func (m *Machine) Command(ctx context.Context, argv ...string) (*exec.Cmd, error) {
	id := m.initID()
	if !id.Alive() {
		return nil, fmt.Errorf("machine %s is off", m.Name)
	}
	enter := []string{"--target", strconv.Itoa(id.Pid), "--net", "--pid", "--mount", "--uts", "--ipc", "--"}
	return exec.CommandContext(ctx, "nsenter", append(enter, argv...)...), nil
}

// Pids returns every process of the machine as the host numbers them, process 1
// first.
func (m *Machine) Pids() ([]int, error) {
	id := m.initID()
	if !id.Alive() {
		return nil, nil
	}
	pids, err := descendants(id.Pid)
	return append([]int{id.Pid}, pids...), err
}

func (m *Machine) initID() ProcessID {
	var id ProcessID
	if err := readJSON(m.idFile(), &id); err != nil {
		return m.findInit()
	}
	return id
}

// findInit looks for a process 1 whose record is lost, so that a half-broken
// cluster can still be taken down.
func (m *Machine) findInit() ProcessID {
	for dir, id := range m.inits() {
		if dir == m.Dir {
			return id
		}
	}
	return ProcessID{}
}

// RunsElsewhere reports whether a machine of this network and name is on that
// has another folder, and which.
func (m *Machine) RunsElsewhere() (dir string, ok bool) {
	for dir := range m.inits() {
		if dir != m.Dir {
			return dir, true
		}
	}
	return "", false
}

// inits finds every process 1 of a machine with this name that has this folder
// or is in this network namespace, by its folder.
func (m *Machine) inits() map[string]ProcessID {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil
	}
	namespace, namespaceErr := os.Stat(filepath.Join(netnsDir, m.Namespace()))
	found := map[string]ProcessID{}
	for _, entry := range entries {
		pid, err := strconv.Atoi(entry.Name())
		if err != nil {
			continue
		}
		cmdline, err := os.ReadFile(filepath.Join("/proc", entry.Name(), "cmdline"))
		if err != nil {
			continue
		}
		args := strings.Split(strings.TrimRight(string(cmdline), "\x00"), "\x00")
		if len(args) != 6 || args[1] != "init" || args[2] != "--dir" || args[4] != "--hostname" || args[5] != m.Name {
			continue
		}
		inside, err := os.Stat(filepath.Join("/proc", entry.Name(), "ns", "net"))
		if args[3] != m.Dir && (err != nil || namespaceErr != nil || !os.SameFile(inside, namespace)) {
			continue
		}
		if id, err := Identify(pid); err == nil && id.Alive() {
			found[args[3]] = id
		}
	}
	return found
}

func writeJSON(file string, value any) error {
	content, err := json.Marshal(value)
	if err != nil {
		return err
	}
	temporary := file + ".new"
	if err := os.WriteFile(temporary, append(content, '\n'), 0o644); err != nil {
		return err
	}
	return os.Rename(temporary, file)
}

func readJSON(file string, value any) error {
	content, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	return json.Unmarshal(content, value)
}

// poll calls done every few milliseconds until it is true, fails, or ctx ends.
func poll(ctx context.Context, done func() (bool, error)) error {
	ticker := time.NewTicker(5 * time.Millisecond)
	defer ticker.Stop()
	for {
		if ok, err := done(); ok || err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-ticker.C:
		}
	}
}
