package machines

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Init is process 1 of a machine: it sets the machine's mounts up, starts the
// main process when it is asked to, and reaps every orphan.
type Init struct {
	Dir      string // the machine's folder
	Hostname string
	Log      *slog.Logger

	mu   sync.Mutex
	main reply
}

// Run does the work of process 1 until its context ends, and with it the
// machine.
func (i *Init) Run(ctx context.Context) error {
	if os.Getpid() != 1 {
		return errors.New("machine init runs as process 1 of a machine only: use `timonel up`")
	}
	if err := unix.Sethostname([]byte(i.Hostname)); err != nil {
		return fmt.Errorf("set host name: %w", err)
	}
	if err := setUpMounts(i.Dir); err != nil {
		return err
	}
	children := make(chan os.Signal, 1)
	signal.Notify(children, unix.SIGCHLD)
	defer signal.Stop(children)

	if err := os.Chdir(i.Dir); err != nil { // a short path for the socket
		return err
	}
	if err := os.Remove("init.sock"); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	listener, err := net.Listen("unix", "init.sock")
	if err != nil {
		return err
	}
	if err := os.Chmod("init.sock", 0o600); err != nil {
		return err
	}
	served := make(chan error, 1)
	go func() { served <- i.serve(listener) }()
	for {
		select {
		case <-children:
			i.mu.Lock()
			i.reap()
			i.mu.Unlock()
		case err := <-served:
			return err
		case <-ctx.Done():
			listener.Close()
			<-served
			return ctx.Err()
		}
	}
}

func (i *Init) serve(listener net.Listener) error {
	for {
		conn, err := listener.Accept()
		if err != nil {
			return err
		}
		i.answer(conn)
	}
}

func (i *Init) answer(conn net.Conn) {
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(settle))
	var r request
	if err := json.NewDecoder(conn).Decode(&r); err != nil {
		i.Log.Warn("request is not understood", "error", err)
		return
	}
	i.mu.Lock()
	i.reap() // so that the answer is of now
	if r.Op == opStart {
		i.start(r.Process)
	}
	answer := i.main
	i.mu.Unlock()
	if err := json.NewEncoder(conn).Encode(answer); err != nil {
		i.Log.Warn("request is not answered", "error", err)
	}
}

// start starts the main process unless it runs. i.mu is held, so that a child
// that ends at once is reaped after its pid is known.
func (i *Init) start(p Process) {
	i.main.Error = ""
	if i.main.Pid != 0 {
		return
	}
	pid, err := startProcess(p)
	if err != nil {
		i.main.Error = err.Error()
		return
	}
	i.main = reply{Pid: pid, Started: time.Now()}
	i.Log.Info("started", "program", p.Argv[0], "pid", pid)
}

func startProcess(p Process) (int, error) {
	log, err := os.OpenFile(p.Log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return 0, err
	}
	defer log.Close()
	null, err := os.Open(os.DevNull)
	if err != nil {
		return 0, err
	}
	defer null.Close()
	process, err := os.StartProcess(p.Argv[0], p.Argv, &os.ProcAttr{Dir: "/", Env: p.Env,
		Files: []*os.File{null, log, log}, Sys: &syscall.SysProcAttr{Setsid: true}})
	if err != nil {
		return 0, err
	}
	defer process.Release() // reap waits for it
	return process.Pid, nil
}

// reap collects every child that ended. i.mu is held.
func (i *Init) reap() {
	for {
		var status unix.WaitStatus
		pid, err := unix.Wait4(-1, &status, unix.WNOHANG, nil)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil || pid == 0 {
			return
		}
		if pid != i.main.Pid {
			continue
		}
		i.main.Pid = 0
		i.main.Exited = fmt.Sprintf("exit status %d", status.ExitStatus())
		if status.Signaled() {
			i.main.Exited = "killed by " + unix.SignalName(status.Signal())
		}
		i.Log.Info("main process ended", "pid", pid, "how", i.main.Exited)
	}
}

// setUpMounts gives the machine its own /proc and an empty /run, and keeps its
// mounts from the host.
func setUpMounts(dir string) error {
	if dir == "/run" || strings.HasPrefix(dir, "/run/") || strings.HasPrefix(dir, "/var/run/") {
		return fmt.Errorf("machine folder %s: a machine has an empty /run: choose another folder", dir)
	}
	// Mounts of the host come and go here too, ours do not there.
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_SLAVE, ""); err != nil {
		return fmt.Errorf("separate mounts from the host's: %w", err)
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_SHARED, ""); err != nil {
		return fmt.Errorf("share mounts inside the machine: %w", err)
	}
	const flags = unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC
	if err := unix.Mount("proc", "/proc", "proc", flags, ""); err != nil {
		return fmt.Errorf("mount /proc: %w", err)
	}
	// On many hosts resolv.conf is a link into /run, which is about to be hidden.
	resolver, readErr := os.ReadFile("/etc/resolv.conf")
	target, _ := filepath.EvalSymlinks("/etc/resolv.conf")
	if err := unix.Mount("run", "/run", "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, "mode=755"); err != nil {
		return fmt.Errorf("mount /run: %w", err)
	}
	if readErr == nil && strings.HasPrefix(target, "/run/") {
		if err := os.MkdirAll(filepath.Dir(target), 0o755); err != nil {
			return err
		}
		return os.WriteFile(target, resolver, 0o644)
	}
	return nil
}
