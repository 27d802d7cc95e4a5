package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"sync"
	"syscall"

	"github.com/sirupsen/logrus"
	"golang.org/x/sys/unix"
	"k8s.io/klog/v2"

	"timonel/agent"
)

// run joins the cluster if need be and runs the agent until ctx ends.
func run(ctx context.Context, o *options) error {
	cfg, err := o.config()
	if err != nil {
		return err
	}
	if err := precheck(o); err != nil {
		return err
	}
	unlock, err := lock(o.dataDir)
	if err != nil {
		return err
	}
	defer unlock()
	slog.SetDefault(cfg.Logger)
	klog.SetSlogLogger(cfg.Logger)
	logrus.SetOutput(io.Discard) // containerd's client; its errors come back as errors

	if err := portFree(cfg.GossipAddress); err != nil {
		return err
	}
	m, err := o.membership(ctx, cfg.Logger)
	if err != nil {
		return err
	}
	identity, err := newIdentity(m.node, credentialsDir(o.dataDir), o.name, cfg.Logger)
	if err != nil {
		return err
	}
	cfg.TLS = identity.tls
	for _, addr := range m.peers.Controllers {
		if !slices.Contains(cfg.Controllers, addr) {
			cfg.Controllers = append(cfg.Controllers, addr)
		}
	}
	pool := &pool{o: o, join: m.peers.Gossip, keys: m.node.GossipKeys, log: cfg.Logger, advertise: cfg.NodeIPs[0].String()}
	cfg.Joined, cfg.GossipKeys, cfg.GossipKeyIDs = pool.open, pool.setKeys, pool.keyIDs
	defer pool.close()
	a, err := agent.New(ctx, cfg)
	if err != nil {
		if ctx.Err() != nil {
			return nil
		}
		return err
	}
	cfg.Logger.Info("the agent runs", "node", o.name, "data", o.dataDir, "version", version)
	renewing, stop := context.WithCancel(ctx)
	var wait sync.WaitGroup
	defer wait.Wait()
	defer stop()
	wait.Go(func() { identity.renew(renewing, a.Certify) })
	return a.Run(ctx)
}

// precheck finds what makes the agent useless before anything is changed.
func precheck(o *options) error {
	if os.Geteuid() != 0 {
		return errors.New("the agent must run as root to run containers: start it with sudo or as a system service")
	}
	if o.containerd == "" {
		name := o.containerdBin
		if name == "" {
			name = "containerd"
		}
		if _, err := exec.LookPath(name); err != nil {
			return fmt.Errorf("containerd not found (%v): install it with: apt-get install containerd runc containernetworking-plugins, or give --containerd SOCKET", err)
		}
	} else if _, err := os.Stat(o.containerd); err != nil {
		return fmt.Errorf("--containerd: %w", err)
	}
	return nil
}

// portFree says whether gossip can have its port.
func portFree(addr string) error {
	l, err := net.Listen("tcp", addr)
	if err == nil {
		defer l.Close()
		var p net.PacketConn
		if p, err = net.ListenPacket("udp", addr); err == nil {
			return p.Close()
		}
	}
	if errors.Is(err, syscall.EADDRINUSE) {
		return fmt.Errorf("--gossip-port: %s is in use by another program: stop that one or give another port", addr)
	}
	return fmt.Errorf("--gossip-port: %w", err)
}

// lock makes this the only agent of a data folder.
func lock(dir string) (unlock func(), err error) {
	if err := os.MkdirAll(dir, 0o711); err != nil {
		return nil, fmt.Errorf("--data-dir: %w", err)
	}
	f, err := os.OpenFile(filepath.Join(dir, "agent.lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, fmt.Errorf("--data-dir: %w", err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		f.Close()
		if errors.Is(err, syscall.EWOULDBLOCK) {
			return nil, fmt.Errorf("--data-dir %s is in use by another agent: stop that one first", dir)
		}
		return nil, fmt.Errorf("--data-dir: lock: %w", err)
	}
	return func() { f.Close() }, nil
}
