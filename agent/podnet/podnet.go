package podnet

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"sync"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"timonel/agent/hostile"
	"timonel/internal/durable"
)

// routeProtocol marks the routes that are ours in the kernel's table.
const routeProtocol = 157

// Config says where the network's files are and what it is called.
type Config struct {
	// Name is the CNI network's name, derived from the node's.
	Name string
	// Bridge is the network device that pods hang on.
	Bridge string
	// ConfDir is where containerd reads CNI configuration; StateDir keeps the
	// addresses that are given out.
	ConfDir, StateDir string
	// BinDir has the plugins bridge, host-local, loopback and, for host ports,
	// portmap.
	BinDir string
	// Table is the nftables table for address translation.
	Table string
	// Keep are addresses that no route may lead away from, known before a controller
	// has said anything: the controllers'.
	Keep   []netip.Addr
	Logger *slog.Logger
}

// Peer is another node.
type Peer struct {
	Name    string
	CIDRs   []string
	Address string
}

// Network is one node's pod network.
type Network struct {
	cfg Config
	log *slog.Logger

	updating sync.Mutex // one Update at a time
	refused  string     // what was last refused, as it was logged

	mu    sync.Mutex
	cidrs []string
	guard Guard
}

// New returns a network that has what an earlier agent left. It checks that
// the plugins are there.
func New(cfg Config) (*Network, error) {
	for _, plugin := range []string{"bridge", "host-local", "loopback"} {
		if _, err := os.Stat(filepath.Join(cfg.BinDir, plugin)); err != nil {
			return nil, fmt.Errorf("CNI plugin %s not found in %s: install it with: apt-get install containernetworking-plugins (or set --cni-bin)", plugin, cfg.BinDir)
		}
	}
	n := &Network{cfg: cfg, log: cfg.Logger.With("component", "podnet")}
	if raw, err := hostile.ReadRegular(n.statePath(), hostile.MaxOwn); err == nil {
		_ = json.Unmarshal(raw, &n.cidrs) // a damaged file is as none: it comes anew
	}
	n.guard = n.loadGuard()
	if err := n.sweep(); err != nil {
		n.log.Error("look for routes that must not be", "error", err)
	}
	if len(n.cidrs) > 0 {
		if err := n.apply(n.cidrs); err != nil {
			return nil, err
		}
	}
	return n, nil
}

func (n *Network) statePath() string { return filepath.Join(n.cfg.StateDir, "pod-cidrs.json") }
func (n *Network) confPath() string  { return filepath.Join(n.cfg.ConfDir, "10-timonel.conflist") }

// Ready says whether this node has a pod CIDR.
func (n *Network) Ready() bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	return len(n.cidrs) > 0
}

// CIDRs are the node's own.
func (n *Network) CIDRs() []string {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.cidrs
}

// Guard is the last that a controller told, also before a restart; the zero Guard: none
// ever did.
func (n *Network) Guard() Guard {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.guard
}

// Update takes the node's own pod CIDRs and those of its peers, as a controller says
// that they are. What guard does not let pass is left out and is in the error; the
// rest is done all the same. changed says that the node's own are new.
func (n *Network) Update(own []string, peers []Peer, guard Guard) (changed bool, err error) {
	n.updating.Lock()
	defer n.updating.Unlock()
	addresses, err := n.ownAddresses()
	if err != nil {
		return false, err
	}
	n.mu.Lock()
	old, known := n.cidrs, n.guard
	n.mu.Unlock()
	if !slices.Equal(known.Keep, guard.Keep) || known.Pods != guard.Pods || known.NodeBits != guard.NodeBits || known.Services != guard.Services {
		if err := os.MkdirAll(n.cfg.StateDir, 0o700); err != nil {
			return false, fmt.Errorf("make the pod network's folder: %w", err)
		}
		if err := n.keepGuard(guard); err != nil {
			return false, err
		}
	}
	var ranges []netip.Prefix
	var refused error
	for _, text := range own {
		p, err := guard.checkRange(text, addresses)
		if err != nil {
			refused = fmt.Errorf("this node's own pod range: %w", err)
			own, ranges = nil, nil
			break
		}
		ranges = append(ranges, p)
	}
	if len(own) > 0 && fmt.Sprint(own) != fmt.Sprint(old) {
		if len(old) > 0 {
			n.log.Warn("this node's pod CIDR has changed; running pods keep their old addresses", "old", old, "new", own)
		}
		if err := n.apply(own); err != nil {
			return false, err
		}
		raw, err := json.Marshal(own)
		if err == nil {
			err = os.WriteFile(n.statePath(), raw, 0o600)
		}
		if err != nil {
			return false, fmt.Errorf("keep the pod CIDR: %w", err)
		}
		changed = true
	}
	n.mu.Lock()
	if len(own) > 0 {
		n.cidrs = own
	}
	n.guard = guard
	cidrs := n.cidrs
	n.mu.Unlock()
	for _, text := range old { // a range that was refused leaves the old one in place
		if p, err := netip.ParsePrefix(text); err == nil && len(own) == 0 {
			ranges = append(ranges, p.Masked())
		}
	}
	hops, wrong := guard.sift(ranges, peers, addresses)
	n.say(errors.Join(refused, wrong))
	return changed, errors.Join(refused, wrong, n.routes(hops), n.masquerade(cidrs, hops))
}

// say logs what was refused, once for as long as it is the same.
func (n *Network) say(err error) {
	text := ""
	if err != nil {
		text = err.Error()
	}
	if text != n.refused && text != "" {
		n.log.Error("the controller asks for routes that must not be; they are left out", "error", err)
	}
	n.refused = text
}

// sweep removes routes of ours that may not be, such as an earlier version made, so
// that a node that they cut off comes back.
func (n *Network) sweep() error {
	addresses, err := n.ownAddresses()
	if err != nil {
		return err
	}
	have, err := ourRoutes()
	if err != nil {
		return err
	}
	var errs []error
	guard := n.guard
	guard.Keep = slices.Concat(guard.Keep, n.cfg.Keep)
	for _, r := range have {
		if r.Dst == nil {
			continue
		}
		if _, wrong := guard.checkRange(r.Dst.String(), addresses); wrong != nil {
			n.log.Warn("removing a route that must not be", "route", r.Dst.String(), "reason", wrong)
			errs = append(errs, remove(&r))
		}
	}
	return errors.Join(errs...)
}

// apply writes the CNI configuration and turns forwarding on.
func (n *Network) apply(cidrs []string) error {
	if err := forwarding(); err != nil {
		return err
	}
	for _, dir := range []string{n.cfg.ConfDir, n.cfg.StateDir} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return fmt.Errorf("make the pod network's folder: %w", err)
		}
	}
	conf, err := n.render(cidrs)
	if err != nil {
		return err
	}
	if old, err := hostile.ReadRegular(n.confPath(), hostile.MaxOwn); err == nil && bytes.Equal(old, conf) {
		return nil
	}
	if err := durable.WriteFile(n.confPath(), conf, 0o600); err != nil {
		return fmt.Errorf("write the CNI configuration: %w", err)
	}
	return nil
}

func (n *Network) render(cidrs []string) ([]byte, error) {
	type object = map[string]any
	var ranges [][]object
	var routes []object
	for _, c := range cidrs {
		p, err := netip.ParsePrefix(c)
		if err != nil {
			return nil, fmt.Errorf("pod CIDR %q: %w", c, err)
		}
		ranges = append(ranges, []object{{"subnet": p.Masked().String()}})
		dst := "0.0.0.0/0"
		if p.Addr().Is6() {
			dst = "::/0"
		}
		routes = append(routes, object{"dst": dst})
	}
	plugins := []object{{
		"type": "bridge", "bridge": n.cfg.Bridge, "isGateway": true, "hairpinMode": true, "ipMasq": false,
		"ipam": object{"type": "host-local", "dataDir": filepath.Join(n.cfg.StateDir, "ipam"), "ranges": ranges, "routes": routes},
	}}
	// portmap needs iptables even to take nothing down.
	_, portmap := os.Stat(filepath.Join(n.cfg.BinDir, "portmap"))
	if _, err := exec.LookPath("iptables"); err == nil && portmap == nil {
		plugins = append(plugins, object{"type": "portmap", "capabilities": object{"portMappings": true}, "snat": true})
	}
	return json.MarshalIndent(object{"cniVersion": "0.4.0", "name": n.cfg.Name, "plugins": plugins}, "", "  ")
}

func forwarding() error {
	for _, path := range []string{"/proc/sys/net/ipv4/ip_forward", "/proc/sys/net/ipv6/conf/all/forwarding"} {
		raw, err := hostile.ReadRegular(path, hostile.MaxOwn)
		if os.IsNotExist(err) {
			continue // no such family
		}
		if err == nil && len(raw) > 0 && raw[0] == '1' {
			continue
		}
		if err := os.WriteFile(path, []byte("1"), 0o644); err != nil {
			return fmt.Errorf("turn on forwarding: %w", err)
		}
	}
	return nil
}

// routes makes the kernel's routes to the pods of peers, and removes those of
// ours that lead nowhere any more. Routes that are not ours stay as they are.
func (n *Network) routes(hops []hop) error {
	var errs []error
	want := map[string]bool{}
	all, err := netlink.RouteList(nil, netlink.FAMILY_ALL)
	if err != nil {
		return fmt.Errorf("list routes: %w", err)
	}
	foreign := map[string]bool{}
	for _, r := range all {
		if r.Dst != nil && r.Protocol != routeProtocol {
			foreign[r.Dst.String()] = true
		}
	}
	links := map[netip.Addr]int{}
	for _, h := range hops {
		dst, gw := &net.IPNet{IP: h.dst.Addr().AsSlice(), Mask: net.CIDRMask(h.dst.Bits(), h.dst.Addr().BitLen())}, net.IP(h.via.AsSlice())
		if !h.via.IsValid() || h.via.Is4() != h.dst.Addr().Is4() {
			continue
		}
		if foreign[dst.String()] {
			errs = append(errs, fmt.Errorf("route %s via node %s: this machine has another route to there, which is not the agent's", dst, h.node))
			continue
		}
		link, seen := links[h.via]
		if !seen {
			index, ok, err := direct(gw)
			if err != nil {
				errs = append(errs, fmt.Errorf("route to node %s: %w", h.node, err))
				continue
			}
			if link = index; !ok {
				link = -1
				n.log.Warn("node is not on this network; its pods cannot be reached from here", "node", h.node, "address", h.via)
			}
			links[h.via] = link
		}
		if link < 0 {
			continue
		}
		want[dst.String()] = true
		if err := netlink.RouteReplace(&netlink.Route{Dst: dst, Gw: gw, LinkIndex: link, Protocol: routeProtocol}); err != nil {
			errs = append(errs, fmt.Errorf("route %s via node %s (%s): %w", dst, h.node, h.via, err))
		}
	}
	have, err := ourRoutes()
	if err != nil {
		return errors.Join(append(errs, err)...)
	}
	for _, r := range have {
		if r.Dst != nil && !want[r.Dst.String()] {
			errs = append(errs, remove(&r))
		}
	}
	return errors.Join(errs...)
}

func ourRoutes() ([]netlink.Route, error) {
	have, err := netlink.RouteListFiltered(netlink.FAMILY_ALL, &netlink.Route{Protocol: routeProtocol}, netlink.RT_FILTER_PROTOCOL)
	if err != nil {
		return nil, fmt.Errorf("list routes: %w", err)
	}
	return have, nil
}

func remove(r *netlink.Route) error {
	if err := netlink.RouteDel(r); err != nil && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("remove route %s: %w", r.Dst, err)
	}
	return nil
}

// direct says by which link an address is reached without a gateway.
func direct(ip net.IP) (link int, ok bool, err error) {
	routes, err := netlink.RouteGet(ip)
	if errors.Is(err, unix.ENETUNREACH) || errors.Is(err, unix.EHOSTUNREACH) {
		return 0, false, nil
	}
	if err != nil {
		return 0, false, err
	}
	for _, r := range routes {
		if r.Gw == nil && r.Type != unix.RTN_LOCAL {
			return r.LinkIndex, true, nil
		}
	}
	return 0, false, nil
}

// Remove takes down what this package made in the network namespace: the
// bridge, the routes and the nftables table.
func Remove(cfg Config) error {
	var errs []error
	if link, err := netlink.LinkByName(cfg.Bridge); err == nil {
		errs = append(errs, netlink.LinkDel(link))
	}
	n := &Network{cfg: cfg, log: cfg.Logger}
	errs = append(errs, n.routes(nil), n.unmasquerade())
	return errors.Join(errs...)
}
