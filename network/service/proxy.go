package service

import (
	"cmp"
	"context"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"net/netip"
	"os/exec"
	"reflect"
	"slices"
	"strings"
	"sync"
	"time"

	"sigs.k8s.io/knftables"

	"timonel/network/feed"
	"timonel/network/tables"
)

// Proxy keeps the tables of one node.
type Proxy struct {
	cfg    Config
	log    *slog.Logger
	sides  []*side
	health *health
	stats  stats

	// All that follows is Run's alone.
	after  uint64 // revision of the View that was taken last
	around surroundings
	filter bool // bridges ask conntrack
	looked time.Time

	mu              sync.Mutex
	networks, taken Networks // what was said, and what Run knows
	wake            context.CancelFunc
}

// New returns a Proxy, which changes nothing before it runs.
func New(cfg Config) (*Proxy, error) {
	if err := cfg.validate(); err != nil {
		return nil, err
	}
	if cfg.Look == 0 {
		cfg.Look = DefaultLook
	}
	if cfg.nft == nil {
		cfg.nft = func(family knftables.Family, table string) (knftables.Interface, error) {
			// nft itself would read all elements to list the names of maps.
			return knftables.New(family, table, knftables.UseNetlink)
		}
	}
	if cfg.Watcher == nil {
		cfg.Watcher = &tables.Watcher{}
	}
	p := &Proxy{cfg: cfg, log: cfg.Logger.With("component", "services")}
	p.health = newHealth(p)
	for _, f := range []family{ipv4, ipv6} {
		p.sides = append(p.sides, &side{
			name:     cfg.Table,
			compiler: compiler{family: f, node: cfg.Node, nodeIPs: cfg.NodeIPs},
			claims:   newClaims(), held: map[feed.Name]*objects{}, said: map[feed.Name]string{}, applied: feed.NewStore(cfg.Node).View(),
			table: &table{family: f, refs: map[string]int{}, stale: map[string]time.Time{}, broken: true, now: time.Now},
		})
	}
	return p, nil
}

// SetNetworks says what this node knows of the cluster's addresses.
func (p *Proxy) SetNetworks(n Networks) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if !reflect.DeepEqual(n, p.networks) {
		p.networks = n
		if p.wake != nil {
			p.wake()
		}
	}
}

// Run keeps the tables until ctx ends. They stay as they are then: so do connections.
// It returns an error when it cannot begin.
func (p *Proxy) Run(ctx context.Context) error {
	defer p.health.close()
	if _, err := exec.LookPath("nft"); err != nil {
		p.log.Error("nft is not installed: no Service can be reached from this node; install it with: apt-get install nftables")
		<-ctx.Done()
		return nil
	}
	if p.filter = tables.BridgeFilter(); !p.filter {
		p.log.Warn("the kernel module br_netfilter is not there: pods that reach a pod of their own node through a Service are seen with the node's address; load it with: modprobe br_netfilter")
	}
	for ctx.Err() == nil {
		p.pass(ctx)
		p.wait(ctx)
	}
	return nil
}

// wait is until something has changed, or it is time to look.
func (p *Proxy) wait(ctx context.Context) {
	d := p.cfg.Look
	for _, s := range p.sides {
		if s.table.nft == nil || len(s.table.stale) > 0 || s.table.broken {
			d = min(d, chainRest)
		}
	}
	ctx, cancel := context.WithTimeout(ctx, d)
	defer cancel()
	p.mu.Lock()
	p.wake = cancel
	changed := p.after > 0 && !reflect.DeepEqual(p.networks, p.taken)
	p.mu.Unlock()
	if !changed {
		_, _ = p.cfg.Store.Changes(ctx, p.after) // that the time is over is as good a reason to go on
	}
}

// pass brings the tables to the newest View.
func (p *Proxy) pass(ctx context.Context) {
	changes := feed.Changes{View: p.cfg.Store.View(), Reset: p.after == 0}
	if !changes.View.Synced() {
		return // what an earlier agent left is better than a part
	}
	if p.after != 0 && changes.View.Revision() != p.after {
		var err error
		if changes, err = p.cfg.Store.Changes(ctx, p.after); err != nil {
			return
		}
	}
	look := time.Since(p.looked) >= p.cfg.Look
	if look {
		p.looked = time.Now()
	}
	if around := p.surroundings(); !reflect.DeepEqual(around, p.around) {
		p.around, changes.Reset = around, true
	}
	for _, s := range p.sides {
		begun := time.Now()
		did, err := p.one(ctx, s, changes, look)
		if ctx.Err() != nil {
			return
		}
		p.stats.synced(s, did, time.Since(begun), err)
		if err != nil {
			p.log.Error("the kernel does not take the rules of Services; what was there stays, and it is tried again", "family", s.compiler.family.ip, "error", tables.Brief(err))
		}
	}
	p.after = changes.View.Revision()
	p.health.update(changes, p)
	p.stats.took(p.after)
}

// one brings one table to a View, and says whether there was something to do.
func (p *Proxy) one(ctx context.Context, s *side, changes feed.Changes, look bool) (bool, error) {
	if s.table.nft == nil {
		nft, err := p.cfg.nft(s.compiler.family.nft, p.cfg.Table)
		if err != nil {
			return true, fmt.Errorf("nftables: %w", err)
		}
		s.table.nft = s.trust.Watch(p.cfg.Watcher, nft)
	}
	if err := s.table.sweep(ctx); err != nil {
		p.log.Warn("nftables", "error", tables.Brief(err))
	}
	whole := changes.Reset || s.table.broken || look && s.touched(ctx, p.log)
	names := changes.Services
	if look && len(s.held) > 0 {
		names = maps.Clone(names)
		if names == nil {
			names = map[feed.Name]struct{}{}
		}
		for name := range s.held {
			names[name] = struct{}{}
		}
	}
	if !whole && len(names) == 0 {
		return false, nil
	}
	var out outcome
	var err error
	old := s.applied
	if whole {
		out, err = s.reset(ctx, changes.View, p.around)
	} else {
		out, err = s.step(ctx, changes.View, names)
	}
	if err != nil {
		return true, err
	}
	p.say(s, changes.View, names, out)
	if err := s.flows(old, changes.View, names, whole, p.around); err != nil {
		p.log.Warn("connections by UDP to endpoints that are gone stay until they time out", "family", s.compiler.family.ip, "error", err)
	}
	return true, nil
}

// say tells users, once for as long as it is so, which of their Services have no rules.
func (p *Proxy) say(s *side, view *feed.View, names map[feed.Name]struct{}, out outcome) {
	texts := map[feed.Name][2]string{}
	for name, others := range out.contested {
		f := slices.MinFunc(slices.Collect(maps.Keys(others)), func(a, b frontend) int { return cmp.Compare(a.String(), b.String()) })
		texts[name] = [2]string{ReasonTaken, fmt.Sprintf("%s is of Service %s, which is older or has more right to it: nothing is sent to this one there; remove it from spec.externalIPs or status.loadBalancer of one of them", f, others[f])}
	}
	for name, err := range out.refused {
		texts[name] = [2]string{ReasonRefused, fmt.Sprintf("node %s: the kernel refuses the rules of this Service, which stay as they were: %v; look at nft list table %s %s there, and at dmesg",
			p.cfg.Node, tables.Brief(err), s.compiler.family.nft, p.cfg.Table)}
	}
	for name := range s.said {
		if _, is := names[name]; (is || names == nil) && texts[name][0] == "" {
			delete(s.said, name)
		}
	}
	for name, text := range texts {
		if s.said[name] == text[1] {
			continue
		}
		s.said[name] = text[1]
		p.log.Warn("Service", "service", name, "family", s.compiler.family.ip, "reason", text[0], "message", text[1])
		if svc := view.Service(name); svc != nil && p.cfg.Event != nil {
			p.cfg.Event(svc, text[0], text[1])
		}
	}
}

// Reasons of the events that a Proxy gives.
const (
	ReasonTaken   = "ServiceAddressTaken"
	ReasonRefused = "ServiceRulesRefused"
	ReasonHealth  = "FailedToStartServiceHealthcheck" // kube-proxy's
)

func (p *Proxy) sideOf(f family) *side {
	if f.v4() {
		return p.sides[0]
	}
	return p.sides[1]
}

// healthy says whether both tables are what the newest View says.
func (p *Proxy) healthy() bool { return !p.stats.behind() }

// surroundings are what is known of the node and the cluster now.
func (p *Proxy) surroundings() surroundings {
	p.mu.Lock()
	p.taken = p.networks
	n := p.networks
	p.mu.Unlock()
	out := surroundings{pods: slices.Concat(n.Pods, n.Own), services: n.Services, served: n.Local, ports: p.cfg.ClusterPorts}
	if !p.filter {
		out.ownPods = n.Own
	}
	if len(n.Pods) > 0 {
		out.askers = slices.Concat(out.pods, p.cfg.NameClients)
	}
	out.nodePorts, out.allNodePorts = p.nodePorts()
	return out
}

// nodePorts are the addresses of this node where node ports are.
func (p *Proxy) nodePorts() (list []netip.Addr, all bool) {
	if len(p.cfg.NodePortAddresses) == 0 || p.cfg.NodePortAddresses[0] == Primary {
		return p.cfg.NodeIPs, false
	}
	var networks []netip.Prefix
	for _, text := range p.cfg.NodePortAddresses {
		n, err := netip.ParsePrefix(strings.TrimSpace(text))
		if err != nil {
			continue // validate has looked
		}
		if all = n.Bits() == 0; all {
			return nil, true
		}
		networks = append(networks, n)
	}
	for _, ip := range hostAddresses() {
		if !ip.IsLoopback() && slices.ContainsFunc(networks, func(n netip.Prefix) bool { return n.Contains(ip) }) {
			list = appendNew(list, ip)
		}
	}
	slices.SortFunc(list, netip.Addr.Compare)
	return list, false
}

// hostAddresses are all of this machine's.
func hostAddresses() []netip.Addr {
	addrs, err := net.InterfaceAddrs()
	if err != nil {
		return nil
	}
	var out []netip.Addr
	for _, a := range addrs {
		if n, ok := a.(*net.IPNet); ok {
			if ip, ok := netip.AddrFromSlice(n.IP); ok {
				out = append(out, ip.Unmap())
			}
		}
	}
	return out
}

// Remove takes away the tables of a node.
func Remove(ctx context.Context, name string) error {
	return tables.Remove(ctx, name, ipv4.nft, ipv6.nft)
}
