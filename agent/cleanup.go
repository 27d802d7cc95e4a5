package agent

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
	runtimev1 "k8s.io/cri-api/pkg/apis/runtime/v1"

	"timonel/agent/cgroup"
	"timonel/agent/containerd"
	"timonel/agent/hostile"
	"timonel/agent/podnet"
	"timonel/network/hostport"
	"timonel/network/policy"
	"timonel/network/service"
)

// Cleanup ends all containers of an agent that does not run any more and
// removes what it made on this machine: containerd, shims, mounts, cgroups,
// network devices and, unless keepData, the data folder. What is gone already
// is no error.
func Cleanup(ctx context.Context, cfg Config, keepData bool) error {
	if os.Geteuid() != 0 {
		return errors.New("cleanup must run as root")
	}
	log := cfg.Logger
	var errs []error
	fail := func(err error) {
		if err != nil {
			errs = append(errs, err)
		}
	}
	socket := cfg.ContainerdSocket
	var daemon *containerd.Daemon
	if socket == "" {
		d, err := containerd.NewDaemon(cfg.daemon())
		if err == nil {
			daemon, socket = d, d.Socket()
		} else {
			log.Warn("containerd", "error", err)
		}
	}
	if socket != "" && containerd.Ping(ctx, socket) == nil {
		// In a containerd that others use too, only this agent's pods are ours.
		only := func(uid string) bool { return true }
		if daemon == nil {
			only = func(uid string) bool {
				_, err := os.Stat(cfg.dir("pods", uid))
				return uid != "" && err == nil
			}
		}
		if err := removePods(ctx, socket, only); err != nil {
			log.Warn("remove pods by way of containerd; ending their processes instead", "error", err)
		}
	}
	if daemon != nil {
		fail(daemon.Stop(ctx))
	}
	// What is left is ended by the kernel's own books.
	killAll(ctx, func() []int { return cgroup.Processes(cfg.CgroupRoot) })
	if daemon != nil {
		killAll(ctx, func() []int { return shims(socket) })
	}
	fail(hostile.Unmount(cfg.DataDir))
	if cfg.KubeletDir != "" && cfg.KubeletDir != cfg.DataDir {
		fail(hostile.RemoveLink(cfg.KubeletDir, cfg.DataDir))
	}
	fail(cgroup.Remove(cfg.CgroupRoot))
	fail(podnet.Remove(cfg.network()))
	fail(service.Remove(ctx, servicesTable))
	fail(policy.Remove(ctx, policyTable))
	fail(hostport.Remove(ctx, hostPortsTable))
	fail(cfg.dnsAddresses().Set(nil))
	if !keepData && len(errs) == 0 {
		fail(hostile.RemoveAll(ctx, cfg.DataDir))
	}
	if daemon != nil && filepath.Dir(socket) != cfg.dir("containerd") {
		fail(hostile.RemoveAll(ctx, filepath.Dir(socket)))
	}
	return errors.Join(errs...)
}

// removePods removes the sandboxes of this agent, with all in them.
func removePods(ctx context.Context, socket string, only func(uid string) bool) error {
	rt, err := containerd.Dial(ctx, socket)
	if err != nil {
		return err
	}
	defer rt.Close()
	list, err := rt.ListPodSandbox(ctx, &runtimev1.ListPodSandboxRequest{})
	if err != nil {
		return err
	}
	containers, err := rt.ListContainers(ctx, &runtimev1.ListContainersRequest{})
	if err != nil {
		return err
	}
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(16)
	for _, s := range list.Items {
		if !only(s.Metadata.GetUid()) {
			continue
		}
		g.Go(func() error {
			for _, c := range containers.Containers {
				if c.PodSandboxId == s.Id {
					if _, err := rt.StopContainer(ctx, &runtimev1.StopContainerRequest{ContainerId: c.Id}); err != nil && !containerd.NotFound(err) {
						return fmt.Errorf("stop container %s: %w", c.Id, err)
					}
				}
			}
			if _, err := rt.StopPodSandbox(ctx, &runtimev1.StopPodSandboxRequest{PodSandboxId: s.Id}); err != nil && !containerd.NotFound(err) {
				return fmt.Errorf("stop sandbox %s: %w", s.Id, err)
			}
			if _, err := rt.RemovePodSandbox(ctx, &runtimev1.RemovePodSandboxRequest{PodSandboxId: s.Id}); err != nil && !containerd.NotFound(err) {
				return fmt.Errorf("remove sandbox %s: %w", s.Id, err)
			}
			return nil
		})
	}
	return g.Wait()
}

// killAll kills what list lists until it lists nothing, for 10 s at most.
func killAll(ctx context.Context, list func() []int) {
	for range 200 {
		pids := list()
		if len(pids) == 0 || ctx.Err() != nil {
			return
		}
		for _, pid := range pids {
			_ = unix.Kill(pid, unix.SIGKILL) // it may have gone meanwhile
		}
		time.Sleep(50 * time.Millisecond)
	}
}

// shims lists the shims that were started by the containerd of a socket.
func shims(socket string) []int {
	dirs, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		return nil
	}
	var out []int
	for _, path := range dirs {
		raw, err := hostile.ReadRegular(path, hostile.MaxOwn)
		if err != nil {
			continue
		}
		args := bytes.Split(bytes.TrimRight(raw, "\x00"), []byte{0})
		if !bytes.Contains(args[0], []byte("containerd-shim")) {
			continue
		}
		i := slices.IndexFunc(args, func(a []byte) bool { return string(a) == "-address" })
		if i < 0 || i+1 >= len(args) || string(args[i+1]) != socket {
			continue
		}
		if pid, err := strconv.Atoi(filepath.Base(filepath.Dir(path))); err == nil {
			out = append(out, pid)
		}
	}
	return out
}
