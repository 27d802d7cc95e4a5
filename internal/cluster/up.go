package cluster

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"timonel/internal/machines"
	"timonel/pki"
)

// Options of Up. Zero values of an existing cluster mean: as it is.
type Options struct {
	Run, Name           string
	Controllers, Agents *int         // nil: 3 and 2
	Subnet              netip.Prefix // zero: a free one of 10.77.0.0/16
	Bin, Images         string       // absolute
	ControllerFlags     []string
	AgentFlags          []string
	Sample              bool // deploy the sample application
	Pool                bool // give Services of type LoadBalancer addresses of the machines' network
	Report              Reporter
}

// Reporter is told how Up gets on.
type Reporter interface {
	Start(what string)               // something begins
	Done(format string, args ...any) // and has ended well, with this to say
}

// Up brings the cluster up: it makes what is missing and starts what does not
// run. It returns when all of it is ready, with what it took.
func Up(ctx context.Context, o Options) (*Spec, error) {
	if err := CheckHost(); err != nil {
		return nil, err
	}
	s, err := plan(o)
	if err != nil {
		return nil, err
	}
	if err := os.MkdirAll(s.Run, 0o755); err != nil {
		return nil, fmt.Errorf("make the run folder: %w", err)
	}
	unlock, err := lock(s.Run)
	if err != nil {
		return nil, err
	}
	defer unlock()
	u := &up{Spec: s, report: o.Report}
	steps := []func(context.Context) error{u.network, u.secrets, u.controllers, u.proxy, u.agents}
	if o.Pool {
		steps = append(steps, u.pool)
	}
	if o.Sample && s.Agents > 0 {
		steps = append(steps, u.sample)
	}
	for _, step := range steps {
		if err := step(ctx); err != nil {
			return nil, err
		}
	}
	return s, nil
}

type up struct {
	*Spec
	report Reporter
	bundle *pki.Bundle
	client *client
}

// plan merges the options with the cluster that is in the run folder, if any.
func plan(o Options) (*Spec, error) {
	if err := machines.CheckName(o.Name); err != nil {
		return nil, err
	}
	s, err := Load(o.Run)
	if errors.Is(err, ErrNone) {
		s, err = newSpec(o)
	}
	if err != nil {
		return nil, err
	}
	switch {
	case s.Name != o.Name:
		return nil, fmt.Errorf("%s holds the cluster %s: use --name %s, or another --run for the cluster %s", s.Run, s.Name, s.Name, o.Name)
	case o.Controllers != nil && *o.Controllers != s.Controllers:
		return nil, fmt.Errorf("the cluster has %d controllers: `timonel down` first to start one with %d", s.Controllers, *o.Controllers)
	case o.Agents != nil && *o.Agents < s.Agents:
		return nil, fmt.Errorf("the cluster has %d agents: `timonel down` first to start one with %d", s.Agents, *o.Agents)
	case o.Subnet.IsValid() && o.Subnet != s.Subnet:
		return nil, fmt.Errorf("the cluster is in %s: `timonel down` first to start one in %s", s.Subnet, o.Subnet)
	}
	if o.Agents != nil {
		s.Agents = *o.Agents
	}
	if o.Bin != "" {
		s.Bin = o.Bin
	}
	if o.Images != "" {
		s.Images = o.Images
	}
	if o.ControllerFlags != nil {
		s.ControllerFlags = o.ControllerFlags
	}
	if o.AgentFlags != nil {
		s.AgentFlags = o.AgentFlags
	}
	return s, s.checkPrograms()
}

func newSpec(o Options) (*Spec, error) {
	run, err := filepath.Abs(o.Run)
	if err != nil {
		return nil, err
	}
	s := &Spec{Name: o.Name, Run: run, Created: time.Now().Truncate(time.Second), Controllers: 3, Agents: 2,
		Bin: o.Bin, Images: o.Images, ServiceCIDR: netip.MustParsePrefix("10.96.0.0/16")}
	if o.Controllers != nil {
		s.Controllers = *o.Controllers
	}
	if o.Agents != nil {
		s.Agents = *o.Agents
	}
	switch s.Controllers {
	case 1, 3, 5:
	default:
		return nil, fmt.Errorf("--controllers %d: a cluster has 1, 3 or 5", s.Controllers)
	}
	if s.Agents < 0 || s.Agents > 100 {
		return nil, fmt.Errorf("--agents %d: want 0 to 100", s.Agents)
	}
	if s.Subnet = o.Subnet; !s.Subnet.IsValid() {
		if s.Subnet, err = machines.FreePrefix(netip.MustParsePrefix("10.77.0.0/24"), 256); err != nil {
			return nil, err
		}
	} else if !s.Subnet.Addr().Is4() || s.Subnet.Bits() > 24 || s.Subnet != s.Subnet.Masked() {
		return nil, fmt.Errorf("--subnet %s: want an IPv4 network of at least 256 addresses, such as 10.77.0.0/24", s.Subnet)
	}
	// The host has a route to each node's pods, so the pods' networks of two
	// clusters on one host must differ.
	s.ClusterCIDR, err = machines.FreePrefix(netip.MustParsePrefix("10.244.0.0/16"), 12)
	return s, err
}

// lock keeps two commands from changing one cluster at the same time.
func lock(run string) (func(), error) {
	file, err := os.OpenFile(filepath.Join(run, ".lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, fmt.Errorf("lock the run folder: %w", err)
	}
	if err := unix.Flock(int(file.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		file.Close()
		return nil, fmt.Errorf("another timonel command is changing the cluster in %s: wait until it has finished", run)
	}
	return func() { file.Close() }, nil
}

func (u *up) network(context.Context) error {
	u.report.Start(fmt.Sprintf("network %s on bridge %s", u.Subnet, u.Network().Bridge()))
	was, err := machines.SetForwarding(true)
	if err != nil {
		return err
	}
	if _, err := os.Stat(filepath.Join(u.Run, specFile)); errors.Is(err, os.ErrNotExist) {
		u.Forwarding = was
	}
	if err := u.save(); err != nil { // from here on `down` finds all that is made
		return err
	}
	if err := u.Network().Create(); err != nil {
		return err
	}
	u.report.Done("network %s on bridge %s", u.Subnet, u.Network().Bridge())
	return nil
}

// secrets makes the cluster's secrets once and gives each controller its copy,
// as an operator would.
func (u *up) secrets(context.Context) error {
	bundle, err := pki.LoadBundle(u.BundleDir())
	if errors.Is(err, os.ErrNotExist) {
		u.report.Start("certificates and join token")
		if bundle, err = pki.CreateBundle(u.BundleDir()); err == nil {
			u.report.Done("certificates and join token")
		}
	}
	if err != nil {
		return err
	}
	u.bundle = bundle
	for _, name := range u.ControllerNames() {
		if err := copyBundle(u.BundleDir(), filepath.Join(u.dir(name), "bundle")); err != nil {
			return err
		}
	}
	if err := u.writeKubeconfig(bundle); err != nil {
		return err
	}
	u.client, err = newClient(u.Spec)
	return err
}

// copyBundle copies the folder of secrets unless the copy is there.
func copyBundle(from, to string) error {
	if _, err := os.Stat(to); err == nil {
		return nil
	}
	temporary := to + ".new"
	if err := os.RemoveAll(temporary); err != nil {
		return err
	}
	if err := os.MkdirAll(temporary, 0o700); err != nil {
		return err
	}
	if err := os.CopyFS(temporary, os.DirFS(from)); err != nil {
		return fmt.Errorf("copy the cluster's secrets: %w", err)
	}
	// CopyFS applies the umask to modes that are group- and world-readable at most.
	entries, err := os.ReadDir(temporary)
	if err != nil {
		return err
	}
	for _, entry := range entries {
		info, err := os.Stat(filepath.Join(from, entry.Name()))
		if err != nil {
			return err
		}
		if err := os.Chmod(filepath.Join(temporary, entry.Name()), info.Mode().Perm()); err != nil {
			return err
		}
	}
	return os.Rename(temporary, to)
}

// controllers starts them together, and measures how long it takes until they
// serve.
func (u *up) controllers(ctx context.Context) error {
	names := u.ControllerNames()
	u.report.Start("controllers " + strings.Join(names, ", "))
	started, begin, err := u.startAll(ctx, names)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, readyTimeout)
	defer cancel()
	group, ctx := errgroup.WithContext(ctx)
	var written time.Duration
	group.Go(func() error {
		err := u.client.recordUp(ctx, u.Spec)
		written = time.Since(begin)
		return err
	})
	for _, name := range names {
		group.Go(func() error { return u.waitServing(ctx, name) })
	}
	if err := group.Wait(); err != nil {
		return err
	}
	if len(started) == 0 {
		u.report.Done("controllers %s run already", strings.Join(names, ", "))
		return nil
	}
	u.report.Done("controllers %s: first write served %s after the start, all ready after %s",
		strings.Join(names, ", "), seconds(written), seconds(time.Since(begin)))
	return nil
}

// readyTimeout bounds how long a part of the cluster may take to be ready.
const readyTimeout = 2 * time.Minute

func seconds(d time.Duration) string { return fmt.Sprintf("%.2f s", d.Seconds()) }

// startAll boots the machines, then starts the main process of those where it
// does not run.
func (u *up) startAll(ctx context.Context, names []string) (started []string, begin time.Time, err error) {
	group, bootCtx := errgroup.WithContext(ctx)
	for _, name := range names {
		group.Go(func() error { return u.Machine(name).Boot(bootCtx, u.program("machine")) })
	}
	if err := group.Wait(); err != nil {
		return nil, begin, err
	}
	begin = time.Now()
	for _, name := range names {
		running, _, err := u.Machine(name).Running(ctx)
		if err != nil {
			return started, begin, err
		}
		if running {
			continue
		}
		if RoleOf(name) == Agent {
			if err := u.admit(ctx, name); err != nil {
				return started, begin, err
			}
		}
		if err := u.Machine(name).Start(ctx, u.process(name)); err != nil {
			return started, begin, err
		}
		started = append(started, name)
	}
	return started, begin, nil
}

// waitServing waits until a controller's API says it is ready.
func (u *up) waitServing(ctx context.Context, name string) error {
	last := errors.New("no answer yet")
	err := poll(ctx, 20*time.Millisecond, func() (bool, error) {
		if err := u.checkRuns(ctx, name); err != nil {
			return false, err
		}
		last = u.client.ready(ctx, name)
		return last == nil, nil
	})
	if errors.Is(err, context.DeadlineExceeded) {
		return fmt.Errorf("controller %s is not ready: %w: see `timonel logs %s`", name, last, name)
	}
	return err
}

// checkRuns returns why a machine's main process does not run.
func (s *Spec) checkRuns(ctx context.Context, name string) error {
	running, exited, err := s.Machine(name).Running(ctx)
	if err != nil || running {
		return err
	}
	return fmt.Errorf("%s %s ended (%s): %s", RoleOf(name), name, exited, lastLine(s.LogFile(name)))
}

// proxy starts the load balancer in front of the controllers.
func (u *up) proxy(ctx context.Context) error {
	if u.Proxy.Alive() {
		return nil
	}
	u.report.Start("load balancer on " + u.ProxyAddress())
	log, err := os.OpenFile(filepath.Join(u.Run, "proxy.log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	defer log.Close()
	argv := []string{"proxy", "--listen", u.ProxyAddress(), "--ca", filepath.Join(u.BundleDir(), pki.CAFile)}
	for _, name := range u.ControllerNames() {
		argv = append(argv, "--backend", u.APIAddress(name))
	}
	cmd := exec.Command(u.program("machine"), argv...)
	cmd.Dir, cmd.Env, cmd.Stdout, cmd.Stderr = "/", processEnv(), log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("start the load balancer: %w", err)
	}
	u.Proxy, err = machines.Identify(cmd.Process.Pid)
	go cmd.Wait() // reaps it if it ends while we are its parent
	if err != nil {
		return fmt.Errorf("start the load balancer: %s", lastLine(log.Name()))
	}
	if err := u.save(); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, readyTimeout)
	defer cancel()
	err = poll(ctx, 20*time.Millisecond, func() (bool, error) {
		if !u.Proxy.Alive() {
			return false, fmt.Errorf("the load balancer ended: %s", lastLine(log.Name()))
		}
		return u.client.readyAt(ctx, u.ProxyAddress()) == nil, nil
	})
	if err != nil {
		return err
	}
	u.report.Done("load balancer on %s", u.ProxyAddress())
	return nil
}

func (u *up) agents(ctx context.Context) error {
	names := u.AgentNames()
	if len(names) == 0 {
		return nil
	}
	u.report.Start("agents " + strings.Join(names, ", "))
	started, begin, err := u.startAll(ctx, names)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, readyTimeout)
	defer cancel()
	for _, name := range names {
		if err := u.waitNode(ctx, name); err != nil {
			return err
		}
	}
	if len(started) == 0 {
		u.report.Done("agents %s run already", strings.Join(names, ", "))
		return nil
	}
	u.report.Done("agents %s: nodes Ready after %s", strings.Join(names, ", "), seconds(time.Since(begin)))
	return nil
}

// waitNode waits until a node is Ready, and routes the host's packets to its
// pods.
func (u *up) waitNode(ctx context.Context, name string) error {
	why := "it has not registered"
	err := poll(ctx, 50*time.Millisecond, func() (bool, error) {
		if err := u.checkRuns(ctx, name); err != nil {
			return false, err
		}
		node, err := u.client.node(ctx, name)
		if err != nil {
			why = err.Error()
			return false, nil
		}
		var ready bool
		if ready, why = nodeReady(node); !ready {
			return false, nil
		}
		if len(node.Spec.PodCIDRs) == 0 {
			why = "it has no pod network"
			return false, nil
		}
		return true, u.route(node)
	})
	if errors.Is(err, context.DeadlineExceeded) {
		return fmt.Errorf("node %s is not ready: %s: see `timonel logs %s`", name, why, name)
	}
	return err
}

// lastLine is the last line of a log, for an error message.
func lastLine(file string) string {
	content, err := os.ReadFile(file)
	if err != nil {
		return err.Error()
	}
	lines := strings.Split(strings.TrimSpace(string(content)), "\n")
	if last := strings.TrimSpace(lines[len(lines)-1]); last != "" {
		return last
	}
	return "its log " + file + " is empty"
}

// poll calls done at an interval until it is true, fails, or ctx ends.
func poll(ctx context.Context, interval time.Duration, done func() (bool, error)) error {
	ticker := time.NewTicker(interval)
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
