package hostport

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	"sigs.k8s.io/knftables"

	"timonel/network/tables"
)

// DefaultLook is how often it is looked whether the table is as it was left.
const DefaultLook = 5 * time.Second

// Config describes the host ports of one node.
type Config struct {
	// Table is the table's name.
	Table string
	// Bridge is the device that pods hang on.
	Bridge string
	// ClusterPorts are those at which nodes and controllers talk to each other, by UDP and
	// TCP: no pod gets them.
	ClusterPorts []uint16
	// Look is how often it is looked whether the table is as it was left. Default
	// DefaultLook.
	Look time.Duration
	// Changed is called when Ready may have another answer than it had; may be nil.
	Changed func()
	// Watcher is that of all who write to nftables here. Default: one of its own.
	Watcher *tables.Watcher
	// Logger gets the rest.
	Logger *slog.Logger

	// nft makes the way to the table; tests put what fails there.
	nft func() (knftables.Interface, error)
}

func (c *Config) validate() error {
	switch {
	case c.Table == "":
		return errors.New("host port config: Table is empty")
	case c.Bridge == "":
		return errors.New("host port config: Bridge is empty")
	case c.Logger == nil:
		return errors.New("host port config: Logger is nil")
	}
	return nil
}

// Pod is one that runs on this node, in a network namespace of its own.
type Pod struct {
	UID       string
	Addresses []netip.Addr
	// Ports are those of its containers that run together. One without a hostPort is of no
	// interest.
	Ports []corev1.ContainerPort
}

// Networks are what a node knows of the cluster's addresses.
type Networks struct {
	// Own are those of this node's pods, Services those of cluster addresses.
	Own, Services []netip.Prefix
}

// Ports keeps the table of one node. Its methods are safe for concurrent use.
type Ports struct {
	cfg Config
	log *slog.Logger

	mu       sync.Mutex
	pods     map[string]Pod // those with host ports, by uid
	networks Networks
	table    table
	refused  map[string]error // pods whose ports the kernel does not take, by uid
	failed   error            // why the table is not what it should be
	waited   bool             // somebody was told to wait
	changed  chan struct{}
}

// New returns Ports, which change nothing before a pod is set or they run.
func New(cfg Config) (*Ports, error) {
	if err := cfg.validate(); err != nil {
		return nil, err
	}
	if cfg.Look == 0 {
		cfg.Look = DefaultLook
	}
	if cfg.nft == nil {
		cfg.nft = func() (knftables.Interface, error) {
			return knftables.New(knftables.InetFamily, cfg.Table, knftables.UseNetlink)
		}
	}
	if cfg.Watcher == nil {
		cfg.Watcher = &tables.Watcher{}
	}
	return &Ports{cfg: cfg, log: cfg.Logger.With("component", "hostports"), pods: map[string]Pod{}, refused: map[string]error{}, changed: make(chan struct{}, 1)}, nil
}

// SetPod says that a pod has its addresses now. All that run are to be said before Run.
func (p *Ports) SetPod(pod Pod) {
	pod.Ports = slices.DeleteFunc(slices.Clone(pod.Ports), func(c corev1.ContainerPort) bool { return c.HostPort == 0 })
	p.mu.Lock()
	defer p.mu.Unlock()
	had, is := p.pods[pod.UID]
	switch {
	case len(pod.Ports) == 0 || len(pod.Addresses) == 0:
		if !is {
			return
		}
		delete(p.pods, pod.UID)
	case is && reflect.DeepEqual(had, pod):
		return
	default:
		p.pods[pod.UID] = pod
	}
	p.touch()
}

// RemovePod says that nothing of a pod runs any more and that its addresses are free.
func (p *Ports) RemovePod(uid string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if _, is := p.pods[uid]; is {
		delete(p.pods, uid)
		p.touch()
	}
}

// SetNetworks says what this node knows of the cluster's addresses.
func (p *Ports) SetNetworks(n Networks) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if !reflect.DeepEqual(n, p.networks) {
		p.networks = n
		p.touch()
	}
}

func (p *Ports) touch() {
	p.table.current = false
	select {
	case p.changed <- struct{}{}:
	default:
	}
}

// Ready says why what is sent to the host ports of a pod does not arrive yet; nil: it does, or
// there are none. When the answer may be another, Config.Changed is called.
func (p *Ports) Ready(uid string) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	_, is := p.pods[uid]
	switch {
	case !is:
		return nil
	case p.refused[uid] != nil:
		p.waited = true
		return fmt.Errorf("the kernel refuses the rules of the pod's host ports: %w", p.refused[uid])
	case p.table.current:
		return nil
	}
	p.waited = true
	if p.failed != nil {
		return fmt.Errorf("the kernel does not take the rules of host ports: %w", p.failed)
	}
	return errors.New("the rules of the pod's host ports are not in the kernel yet")
}

// Run keeps the table until ctx ends. It stays as it is then.
func (p *Ports) Run(ctx context.Context) error {
	for ctx.Err() == nil {
		p.pass(ctx)
		d := p.cfg.Look
		p.mu.Lock()
		if p.failed != nil {
			d = min(d, time.Second)
		}
		p.mu.Unlock()
		select {
		case <-ctx.Done():
		case <-p.changed:
		case <-time.After(d):
		}
	}
	return nil
}

// pass makes the table what it is to be, if it is not, or may not be.
func (p *Ports) pass(ctx context.Context) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.table.current && !p.table.touched(ctx, p.cfg, p.log) && len(p.refused) == 0 {
		return
	}
	refused, err := p.write(ctx)
	if ctx.Err() != nil {
		p.table.current = false
		return
	}
	if err != nil && (p.failed == nil || p.failed.Error() != err.Error()) {
		p.log.Error("the kernel does not take the rules of host ports; what was there stays, and it is tried again", "error", tables.Brief(err))
	}
	for uid, why := range refused {
		if p.refused[uid] == nil {
			p.log.Warn("the kernel refuses the rules of a pod's host ports", "pod", uid, "error", why)
		}
	}
	p.failed = err
	if err == nil {
		p.refused = refused
	}
	if p.waited && p.cfg.Changed != nil {
		p.waited = false
		go p.cfg.Changed() // which may ask
	}
}

// write makes the whole table anew, without the pods that the kernel refuses, which it returns.
func (p *Ports) write(ctx context.Context) (map[string]error, error) {
	surroundings := surroundings{bridge: p.cfg.Bridge, networks: p.networks, ports: p.cfg.ClusterPorts, filter: tables.BridgeFilter()}
	refused := map[string]error{}
	frontends := frontendsOf(p.pods)
	if slices.ContainsFunc(frontends, frontend.loopback) {
		if err := routeLocalnet(p.cfg.Bridge); err != nil && !errors.Is(err, os.ErrNotExist) { // it comes with the first pod
			return nil, err
		}
	}
	err := p.table.write(ctx, p.cfg, surroundings, frontends)
	if err == nil || ctx.Err() != nil {
		return refused, errors.Join(err, ctx.Err())
	}
	if p.table.write(ctx, p.cfg, surroundings, nil) != nil {
		return nil, err // it is none of them
	}
	good := map[string]Pod{}
	for _, uid := range slices.Sorted(maps.Keys(p.pods)) {
		good[uid] = p.pods[uid]
		if err := p.table.write(ctx, p.cfg, surroundings, frontendsOf(good)); err != nil {
			refused[uid] = errors.New(tables.Brief(err))
			delete(good, uid)
		}
	}
	return refused, p.table.write(ctx, p.cfg, surroundings, frontendsOf(good))
}

// routeLocalnet lets packets of 127.0.0.1 leave by a device.
func routeLocalnet(device string) error {
	path := filepath.Join("/proc/sys/net/ipv4/conf", device, "route_localnet")
	if err := os.WriteFile(path, []byte("1"), 0o644); err != nil {
		return fmt.Errorf("let the node reach host ports at 127.0.0.1: %w", err)
	}
	return nil
}

// Remove takes away the table.
func Remove(ctx context.Context, name string) error {
	return tables.Remove(ctx, name, knftables.InetFamily)
}
