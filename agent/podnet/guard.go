package podnet

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"timonel/internal/durable"
	"timonel/internal/podrange"
)

// Guard is what a node knows of the cluster's addresses, to refuse by itself what
// must not become a route whoever says so: the controllers check the same before,
// and this is the second line.
type Guard struct {
	// Pods are the networks that all pods' ranges are of. Zero when the controller does
	// not say, being older.
	Pods podrange.Ranges `json:"podRanges"`
	// Services are the networks of the Services' addresses; may be none.
	Services []netip.Prefix `json:"serviceRanges"`
	// Keep are addresses that no route of ours may lead away from: those of the
	// controllers, of the name servers, of the kubernetes Service.
	Keep []netip.Addr `json:"keep"`
}

// Bounds of a range where Guard.Pods is not known.
const (
	widest4 = 16
	widest6 = 48
)

var (
	shared4   = netip.MustParsePrefix("0.0.0.0/8")
	loopback4 = netip.MustParsePrefix("127.0.0.0/8")
	local4    = netip.MustParsePrefix("169.254.0.0/16")
	high4     = netip.MustParsePrefix("224.0.0.0/3")
	low6      = netip.MustParsePrefix("::/16") // unspecified, loopback, IPv4 in IPv6
	local6    = netip.MustParsePrefix("fe80::/10")
	multi6    = netip.MustParsePrefix("ff00::/8")
)

// checkRange returns a pod range in its plain form, or why it cannot be one. own are
// this machine's addresses.
func (g Guard) checkRange(text string, own []netip.Addr) (netip.Prefix, error) {
	p, err := netip.ParsePrefix(text)
	if err != nil {
		return p, fmt.Errorf("%q is not a network", text)
	}
	p = p.Masked()
	if g.Pods.Known() {
		if err := g.Pods.CheckPart(p); err != nil {
			return p, err
		}
	}
	if least := map[bool]int{true: widest4, false: widest6}[p.Addr().Is4()]; p.Bits() < least && !g.Pods.Known() {
		return p, fmt.Errorf("%s is wider than a /%d", p, least)
	}
	for _, never := range []netip.Prefix{shared4, loopback4, local4, high4, low6, local6, multi6} {
		if never.Overlaps(p) {
			return p, fmt.Errorf("%s overlaps %s, where no pods can be", p, never)
		}
	}
	for _, s := range g.Services {
		if s.Overlaps(p) {
			return p, fmt.Errorf("%s overlaps the Services' network %s", p, s)
		}
	}
	for _, ip := range g.Keep {
		if p.Contains(ip) {
			return p, fmt.Errorf("%s holds %s, which must stay in reach", p, ip)
		}
	}
	for _, ip := range own {
		if p.Contains(ip) {
			return p, fmt.Errorf("%s holds this node's own address %s", p, ip)
		}
	}
	return p, nil
}

// checkNextHop returns the address of a node that its pods are reached by, or why it
// cannot be one.
func (g Guard) checkNextHop(text string, own []netip.Addr) (netip.Addr, error) {
	ip, err := netip.ParseAddr(text)
	switch {
	case err != nil:
		return ip, fmt.Errorf("%q is not an IP address", text)
	case ip.Zone() != "" || ip.Is4In6() || !ip.IsGlobalUnicast():
		return ip, fmt.Errorf("%s is not a unicast address", ip)
	case g.Pods.Contains(ip) || slices.ContainsFunc(g.Services, func(s netip.Prefix) bool { return s.Contains(ip) }):
		return ip, fmt.Errorf("%s is a pod's or a Service's address", ip)
	case slices.Contains(g.Keep, ip):
		return ip, fmt.Errorf("%s is a controller's address", ip)
	case slices.Contains(own, ip):
		return ip, fmt.Errorf("%s is this node's own address", ip)
	}
	return ip, nil
}

// hop is a range that is reached by a node, at its addresses that are known.
type hop struct {
	node      string
	dst       netip.Prefix
	addresses []netip.Addr
}

// address is the node's first of a family, zero when there is none.
func (h hop) address(v4 bool) netip.Addr {
	for _, ip := range h.addresses {
		if ip.Is4() == v4 {
			return ip
		}
	}
	return netip.Addr{}
}

// sift returns what of the peers may become routes, and what is wrong with the rest.
// What comes first has it: ranges overlap no other and next hops are one node's.
func (g Guard) sift(ranges []netip.Prefix, peers []Peer, own []netip.Addr) (out []hop, wrong error) {
	var errs []error
	taken := newTaken(ranges)
	addresses := make(map[netip.Addr]string)
	for _, p := range peers {
		var mine []netip.Addr
		for _, text := range p.Addresses {
			ip, err := g.checkNextHop(text, own)
			if other := addresses[ip]; err == nil && other != "" {
				err = fmt.Errorf("%s is the address of node %s", ip, other)
			}
			if err != nil {
				errs = append(errs, fmt.Errorf("address of node %s: %w", p.Name, err))
				continue
			}
			addresses[ip] = p.Name
			mine = append(mine, ip)
		}
		for _, text := range p.CIDRs {
			dst, err := g.checkRange(text, own)
			if err == nil {
				err = taken.add(dst)
			}
			if err != nil {
				errs = append(errs, fmt.Errorf("pod range of node %s: %w", p.Name, err))
				continue
			}
			out = append(out, hop{node: p.Name, dst: dst, addresses: mine})
		}
	}
	if g.Pods.Known() {
		return out, summary(errs) // no address of a node is of the pods' network
	}
	// A range must lead away from no node.
	out = slices.DeleteFunc(out, func(h hop) bool {
		for ip, node := range addresses {
			if h.dst.Contains(ip) {
				errs = append(errs, fmt.Errorf("pod range of node %s: %s holds the address %s of node %s", h.node, h.dst, ip, node))
				return true
			}
		}
		return false
	})
	return out, summary(errs)
}

// taken are ranges that overlap no other. Nearly always all are of one size, and then
// one look tells; inside knows, of the others, what is within what.
type taken struct {
	ranges map[netip.Prefix]struct{}
	inside map[netip.Prefix]netip.Prefix // a wider network to one range in it
	sizes  map[int]struct{}
}

func newTaken(ranges []netip.Prefix) *taken {
	t := &taken{ranges: map[netip.Prefix]struct{}{}, inside: map[netip.Prefix]netip.Prefix{}, sizes: map[int]struct{}{}}
	for _, p := range ranges {
		_ = t.add(p) // a node's own, which is said elsewhere
	}
	return t
}

func (t *taken) add(p netip.Prefix) error {
	if _, is := t.sizes[p.Bits()]; !is {
		t.sizes[p.Bits()] = struct{}{}
		for other := range t.ranges { // what is there is looked for in this size too
			t.note(other, p.Bits())
		}
	}
	for size := range t.sizes {
		if size > p.Bits() {
			continue
		}
		if wide, err := p.Addr().Prefix(size); err == nil {
			if _, is := t.ranges[wide]; is {
				return fmt.Errorf("%s overlaps %s of another node", p, wide)
			}
		}
	}
	if within, is := t.inside[p]; is {
		return fmt.Errorf("%s overlaps %s of another node", p, within)
	}
	t.ranges[p] = struct{}{}
	for size := range t.sizes {
		t.note(p, size)
	}
	return nil
}

func (t *taken) note(p netip.Prefix, size int) {
	if size >= p.Bits() {
		return
	}
	if wide, err := p.Addr().Prefix(size); err == nil {
		t.inside[wide] = p
	}
}

// summary is many errors as one that is short.
func summary(errs []error) error {
	if len(errs) <= 3 {
		return errors.Join(errs...)
	}
	return errors.Join(errors.Join(errs[:3]...), fmt.Errorf("and %d more", len(errs)-3))
}

// ownAddresses are this machine's, but for those of the pod network's devices.
func (n *Network) ownAddresses() ([]netip.Addr, error) {
	links, err := net.Interfaces()
	if err != nil {
		return nil, fmt.Errorf("list network devices: %w", err)
	}
	var out []netip.Addr
	for _, link := range links {
		if link.Name == n.cfg.Bridge || link.Name == n.cfg.VXLAN.Device {
			continue
		}
		addrs, err := link.Addrs()
		if err != nil {
			continue // it has just gone
		}
		for _, a := range addrs {
			if ip, ok := a.(*net.IPNet); ok {
				if addr, ok := netip.AddrFromSlice(ip.IP); ok {
					out = append(out, addr.Unmap())
				}
			}
		}
	}
	return out, nil
}

const guardLimit = 1 << 20

func (n *Network) guardPath() string { return filepath.Join(n.cfg.StateDir, "guard.json") }

// equal says whether both are the same.
func (g Guard) equal(o Guard) bool {
	return g.Pods.Equal(o.Pods) && slices.Equal(g.Services, o.Services) && slices.Equal(g.Keep, o.Keep)
}

// loadGuard reads what was known before this process; none is the zero Guard.
func (n *Network) loadGuard() Guard {
	var g struct {
		Guard
		// As agents kept it that knew of one network.
		Pods     netip.Prefix `json:"pods"`
		NodeBits int          `json:"nodeBits"`
		Services netip.Prefix `json:"services"`
	}
	f, err := os.Open(n.guardPath())
	if err != nil {
		return Guard{}
	}
	defer f.Close()
	raw, err := io.ReadAll(io.LimitReader(f, guardLimit))
	if err == nil {
		err = json.Unmarshal(raw, &g)
	}
	if err != nil {
		n.log.Warn("what is known of the cluster's addresses cannot be read; it comes anew with the next controller", "error", err)
		return Guard{}
	}
	if !g.Guard.Pods.Known() && g.Pods.IsValid() {
		g.Guard.Pods = podrange.Ranges{Networks: []netip.Prefix{g.Pods}, Bits4: g.NodeBits, Bits6: g.NodeBits}
	}
	if len(g.Guard.Services) == 0 && g.Services.IsValid() {
		g.Guard.Services = []netip.Prefix{g.Services}
	}
	return g.Guard
}

func (n *Network) keepGuard(g Guard) error {
	raw, err := json.Marshal(g)
	if err != nil {
		return err
	}
	if err := durable.WriteFile(n.guardPath(), raw, 0o600); err != nil {
		return fmt.Errorf("keep what is known of the cluster's addresses: %w", err)
	}
	return nil
}

// HostsOf are the IP addresses among host:port addresses and bare ones.
func HostsOf(addresses ...string) []netip.Addr {
	var out []netip.Addr
	for _, a := range addresses {
		host, _, err := net.SplitHostPort(a)
		if err != nil {
			host = strings.Trim(a, "[]")
		}
		if ip, err := netip.ParseAddr(host); err == nil && !slices.Contains(out, ip.Unmap()) {
			out = append(out, ip.Unmap())
		}
	}
	return out
}
