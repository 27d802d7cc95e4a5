package containerd

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"timonel/agent/hostile"
)

// startTimeout bounds how long a containerd may take to serve its socket.
const startTimeout = 60 * time.Second

// Daemon is one supervised containerd. It runs in a session of its own, so it
// goes on when the agent stops or dies; a new agent adopts it by its pid file.
type Daemon struct {
	cfg    DaemonConfig
	binary string
	path   string // in which it finds its shim and runc
	log    *slog.Logger
	proc   process
}

// process is a containerd that was started or adopted: a pid together with the
// kernel's start time of it, so that a pid used again is not taken for it.
type process struct {
	pid   int
	start string
}

// NewDaemon checks the configuration and that containerd and runc are
// installed. It changes nothing.
func NewDaemon(cfg DaemonConfig) (*Daemon, error) {
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	if os.Geteuid() != 0 {
		return nil, errors.New("the agent must run as root to run containers: start it with sudo or as a system service")
	}
	name := cfg.Binary
	if name == "" {
		name = "containerd"
	}
	binary, err := exec.LookPath(name)
	if err != nil {
		return nil, fmt.Errorf("containerd not found (%v): install it with: apt-get install containerd runc containernetworking-plugins", err)
	}
	path := cfg.path()
	if _, err := lookIn(path, "runc"); err != nil {
		return nil, fmt.Errorf("runc not found (%v): install it with: apt-get install runc", err)
	}
	log := cfg.Logger
	if log == nil {
		log = slog.Default()
	}
	return &Daemon{cfg: cfg, binary: binary, path: path, log: log.With("component", "containerd")}, nil
}

// path is where the containerd of this configuration looks for programs.
func (c *DaemonConfig) path() string {
	path := os.Getenv("PATH")
	if strings.ContainsRune(c.Binary, filepath.Separator) {
		path = filepath.Dir(c.Binary) + string(filepath.ListSeparator) + path
	}
	return path
}

// lookIn finds a program as [exec.LookPath] does, in a path that is not this process'.
func lookIn(path, program string) (string, error) {
	for _, dir := range filepath.SplitList(path) {
		if !filepath.IsAbs(dir) {
			continue
		}
		if found, err := exec.LookPath(filepath.Join(dir, program)); err == nil {
			return found, nil
		}
	}
	return "", fmt.Errorf("%q: %w in %s", program, exec.ErrNotFound, path)
}

// Socket is the path of containerd's gRPC socket.
func (d *Daemon) Socket() string { return d.cfg.paths().socket }

// RegistryDir is where HOST/hosts.toml say how registries are reached.
func (d *Daemon) RegistryDir() string { return d.cfg.paths().registry }

// Start adopts the containerd of an earlier agent, or starts one, and returns
// when its socket answers.
func (d *Daemon) Start(ctx context.Context) error {
	if err := d.cfg.write(); err != nil {
		return err
	}
	if p, ok := d.find(); ok {
		d.proc = p
		d.log.Info("adopted the running containerd", "pid", p.pid)
	} else if err := d.spawn(); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeoutCause(ctx, startTimeout,
		fmt.Errorf("containerd did not serve %s within %s: see %s", d.Socket(), startTimeout, d.cfg.paths().log))
	defer cancel()
	return d.waitServing(ctx)
}

// Run keeps containerd alive until ctx ends, and then leaves it running.
func (d *Daemon) Run(ctx context.Context) error {
	var wait sync.WaitGroup
	defer wait.Wait()
	wait.Go(func() { d.boundLog(ctx) })
	delay := 100 * time.Millisecond
	for {
		began := time.Now()
		if err := d.proc.wait(ctx); ctx.Err() != nil {
			return nil
		} else if err != nil {
			return fmt.Errorf("watch containerd (pid %d): %w", d.proc.pid, err)
		}
		if time.Since(began) > time.Minute {
			delay = 100 * time.Millisecond
		}
		d.log.Warn("containerd ended; starting it again, containers go on", "pid", d.proc.pid, "in", delay, "log", d.cfg.paths().log)
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(delay):
		}
		delay = min(delay*2, 10*time.Second)
		if err := d.spawn(); err != nil {
			d.log.Error("start containerd", "error", err)
		}
	}
}

// How long containerd's own log gets before it is begun anew, and how often that
// is looked at. What containers, images and registries make containerd say is up
// to them.
const (
	maxLog      = 10 << 20
	logInterval = 10 * time.Second
)

// boundLog keeps containerd's log and the one before it at maxLog each.
func (d *Daemon) boundLog(ctx context.Context) {
	for {
		if err := spillLog(d.cfg.paths().log); err != nil && !errors.Is(err, fs.ErrNotExist) {
			d.log.Warn("begin containerd's log anew", "error", err)
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(logInterval):
		}
	}
}

func spillLog(path string) error {
	dir, err := hostile.OpenRoot(filepath.Dir(path))
	if err != nil {
		return err
	}
	defer dir.Close()
	return dir.Spill(filepath.Base(path), filepath.Base(path)+".1", maxLog)
}

// Stop ends containerd and waits for it; containers are not touched.
func (d *Daemon) Stop(ctx context.Context) error {
	p, ok := d.find()
	if !ok {
		return nil
	}
	if err := unix.Kill(p.pid, unix.SIGTERM); err != nil && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("stop containerd (pid %d): %w", p.pid, err)
	}
	grace, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	if err := p.wait(grace); err == nil && grace.Err() == nil {
		return nil
	}
	_ = unix.Kill(p.pid, unix.SIGKILL)
	return p.wait(ctx)
}

// spawn starts containerd in a session of its own.
func (d *Daemon) spawn() error {
	p := d.cfg.paths()
	log, err := os.OpenFile(p.log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return fmt.Errorf("open containerd's log: %w", err)
	}
	defer log.Close()
	cmd := exec.Command(d.binary, "--config", p.config)
	cmd.Dir = "/"
	cmd.Stdout, cmd.Stderr = log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	// The agent's own file descriptors are close-on-exec; NOTIFY_SOCKET would
	// make containerd report itself ready to systemd in the agent's place.
	cmd.Env = append(withoutEnv(withoutEnv(os.Environ(), "NOTIFY_SOCKET"), "PATH"), "PATH="+d.path)
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("start %s: %w", d.binary, err)
	}
	go func() { _ = cmd.Wait() }() // reaps; ends with the child
	pid := cmd.Process.Pid
	start, err := startTime(pid)
	if err != nil {
		return fmt.Errorf("containerd ended at once, see %s: %w", p.log, err)
	}
	d.proc = process{pid: pid, start: start}
	if err := os.WriteFile(p.pid, fmt.Appendf(nil, "%d %s\n", pid, start), 0o600); err != nil {
		return fmt.Errorf("write containerd's pid file: %w", err)
	}
	d.log.Info("started containerd", "pid", pid, "config", p.config)
	return nil
}

// find returns the containerd that the pid file names, if it still runs.
func (d *Daemon) find() (process, bool) {
	raw, err := hostile.ReadRegular(d.cfg.paths().pid, hostile.MaxOwn)
	if err != nil {
		return process{}, false
	}
	pidText, start, _ := strings.Cut(strings.TrimSpace(string(raw)), " ")
	pid, err := strconv.Atoi(pidText)
	if err != nil {
		return process{}, false
	}
	now, err := startTime(pid)
	if err != nil || now != start {
		return process{}, false
	}
	return process{pid: pid, start: start}, true
}

// waitServing waits until the socket answers a Version call.
func (d *Daemon) waitServing(ctx context.Context) error {
	for {
		if Ping(ctx, d.Socket()) == nil {
			return nil
		}
		if now, err := startTime(d.proc.pid); err != nil || now != d.proc.start {
			return fmt.Errorf("containerd ended while starting: %s (log: %s)", lastLine(d.cfg.paths().log), d.cfg.paths().log)
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// wait returns when the process has ended or ctx has.
func (p process) wait(ctx context.Context) error {
	fd, err := unix.PidfdOpen(p.pid, 0)
	if errors.Is(err, unix.ESRCH) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("pidfd_open: %w", err)
	}
	f := os.NewFile(uintptr(fd), "pidfd")
	defer f.Close()
	if now, err := startTime(p.pid); err != nil || now != p.start {
		return nil
	}
	for ctx.Err() == nil {
		fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
		n, err := unix.Poll(fds, 500)
		if err != nil && !errors.Is(err, unix.EINTR) {
			return fmt.Errorf("poll pidfd: %w", err)
		}
		if n > 0 {
			return nil
		}
	}
	return ctx.Err()
}

// startTime returns field 22 of /proc/PID/stat, or an error for a process that
// is gone or is a zombie.
func startTime(pid int) (string, error) {
	raw, err := hostile.ReadRegular(filepath.Join("/proc", strconv.Itoa(pid), "stat"), hostile.MaxOwn)
	if err != nil {
		return "", err
	}
	text := string(raw)
	fields := strings.Fields(text[strings.LastIndexByte(text, ')')+1:])
	if len(fields) < 20 {
		return "", fmt.Errorf("unexpected /proc/%d/stat", pid)
	}
	if fields[0] == "Z" || fields[0] == "X" {
		return "", fmt.Errorf("process %d has ended", pid)
	}
	return fields[19], nil
}

func withoutEnv(env []string, name string) []string {
	out := make([]string, 0, len(env))
	for _, kv := range env {
		if !strings.HasPrefix(kv, name+"=") {
			out = append(out, kv)
		}
	}
	return out
}

// lastLine returns the end of a log, for an error message. What containerd logs
// is made of what registries and images say, and is of any length.
func lastLine(path string) string {
	dir, err := hostile.OpenRoot(filepath.Dir(path))
	if err != nil {
		return err.Error()
	}
	defer dir.Close()
	raw, err := dir.ReadTail(filepath.Base(path), 2048)
	if err != nil {
		return err.Error()
	}
	text := strings.TrimSpace(string(raw))
	return text[strings.LastIndexByte(text, '\n')+1:]
}
