package hostport

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"
	"sigs.k8s.io/knftables"

	"timonel/network/tables"
)

// frontend is a port of this node, and where what is sent there goes.
type frontend struct {
	at       netip.Addr // zero: any address of the family of to
	protocol string
	port     uint16
	to       netip.AddrPort
}

// loopback says whether the node itself may reach it at 127.0.0.1.
func (f frontend) loopback() bool { return f.to.Addr().Is4() && (!f.at.IsValid() || f.at.IsLoopback()) }

func (f frontend) family() string {
	if f.to.Addr().Is4() {
		return "4"
	}
	return "6"
}

func (f frontend) chain() string {
	name := "to-" + f.protocol + "-" + strconv.Itoa(int(f.port)) + "-ip" + f.family()
	if f.at.IsValid() {
		name += "-" + strings.NewReplacer(":", "_", ".", "_").Replace(f.at.String())
	}
	return name
}

// frontendsOf are those of pods, in order. Of two pods of one port, which neither scheduler
// nor agent let be, the first has it.
func frontendsOf(pods map[string]Pod) (out []frontend) {
	taken := map[string]bool{}
	for _, uid := range slices.Sorted(maps.Keys(pods)) {
		for _, c := range pods[uid].Ports {
			at, _ := netip.ParseAddr(c.HostIP) // empty: any
			at = at.Unmap()
			for _, ip := range pods[uid].Addresses {
				switch {
				case !at.IsValid() || at == netip.IPv6Unspecified():
					at = netip.Addr{}
				case at == netip.IPv4Unspecified():
					// As everywhere in Kubernetes, all addresses.
					at = netip.Addr{}
				case at.Is4() != ip.Is4():
					continue
				}
				f := frontend{at, strings.ToLower(string(cmp.Or(c.Protocol, corev1.ProtocolTCP))), uint16(c.HostPort), netip.AddrPortFrom(ip, uint16(c.ContainerPort))}
				if !taken[f.chain()] {
					taken[f.chain()] = true
					out = append(out, f)
				}
			}
		}
	}
	return out
}

// surroundings are what else the table is made of.
type surroundings struct {
	bridge   string
	networks Networks
	ports    []uint16
	filter   bool // bridges ask conntrack
}

// table is what is known of the table in the kernel.
type table struct {
	nft     knftables.Interface
	current bool           // it is what was last wanted, if nobody else changed it
	lines   map[string]int // rules of each chain
	chains  int
	has     []frontend
	written bool
	trust   tables.Trust
}

// touched says whether somebody else may have changed the table.
func (t *table) touched(ctx context.Context, cfg Config, log *slog.Logger) bool {
	return t.trust.Touched(ctx, tables.Of{What: "host ports", Family: knftables.InetFamily, Name: cfg.Table}, func(l *tables.Listing) bool {
		return maps.Equal(l.Rules, t.lines) && len(l.Names["chain"]) == t.chains && len(l.Names["map"]) == 4
	}, log)
}

// write makes the table in one transaction, and ends flows by UDP that lead elsewhere than they
// should now.
func (t *table) write(ctx context.Context, cfg Config, s surroundings, frontends []frontend) error {
	if t.nft == nil {
		nft, err := cfg.nft()
		if err != nil {
			return fmt.Errorf("nftables: %w; install it with: apt-get install nftables", err)
		}
		t.nft = t.trust.Watch(cfg.Watcher, nft)
	}
	t.current = false
	begun := time.Now()
	tx := t.nft.NewTransaction()
	tx.Add(&knftables.Table{}) // so that deleting it cannot fail
	tx.Delete(&knftables.Table{})
	tx.Add(&knftables.Table{Comment: knftables.PtrTo("host ports, of the Timonel agent")})
	lines, chains := map[string]int{}, 0
	chain := func(c *knftables.Chain, rules ...string) {
		tx.Add(c)
		chains++
		for _, r := range rules {
			tx.Add(&knftables.Rule{Chain: c.Name, Rule: r})
			lines[c.Name]++
		}
	}
	hook := func(name string, kind knftables.BaseChainType, at knftables.BaseChainHook, priority knftables.BaseChainPriority, rules ...string) {
		chain(&knftables.Chain{Name: name, Type: &kind, Hook: &at, Priority: &priority}, rules...)
	}
	for _, f := range []struct{ digit, addr string }{{"4", "ipv4_addr"}, {"6", "ipv6_addr"}} {
		tx.Add(&knftables.Map{Name: "at" + f.digit, Type: f.addr + " . inet_proto . inet_service : verdict"})
		tx.Add(&knftables.Map{Name: "any" + f.digit, Type: "inet_proto . inet_service : verdict"})
	}
	for _, f := range frontends {
		ip := map[string]string{"4": "ip", "6": "ip6"}[f.family()]
		chain(&knftables.Chain{Name: f.chain()}, "meta l4proto "+f.protocol+" dnat "+ip+" to "+f.to.String())
	}
	chain(&knftables.Chain{Name: "ports"}, portRules(s)...)
	hook("prerouting", knftables.NATType, knftables.PreroutingHook, knftables.DNATPriority, "fib daddr type local jump ports")
	hook("output", knftables.NATType, knftables.OutputHook, "-100", "fib daddr type local jump ports")
	hook("postrouting", knftables.NATType, knftables.PostroutingHook, knftables.SNATPriority, sourceRules(s, frontends)...)
	hook("guard", knftables.FilterType, knftables.PreroutingHook, knftables.RawPriority, "iifname "+strconv.Quote(s.bridge)+" ip daddr 127.0.0.0/8 drop")
	for _, f := range frontends {
		e := &knftables.Element{Map: "any" + f.family(), Key: []string{f.protocol, strconv.Itoa(int(f.port))}, Value: []string{"goto " + f.chain()}}
		if f.at.IsValid() {
			e.Map, e.Key = "at"+f.family(), append([]string{f.at.String()}, e.Key...)
		}
		tx.Add(e)
	}
	if err := t.nft.Run(ctx, tx); err != nil {
		return err
	}
	t.lines, t.chains = lines, chains
	t.trust.Written(begun)
	if err := t.flows(frontends); err != nil {
		return err
	}
	t.current = true
	return nil
}

// portRules look for the port of a packet to this node.
func portRules(s surroundings) (out []string) {
	for _, p := range tables.Outermost(s.networks.Services) {
		out = append(out, ip(p)+" daddr "+p.String()+" return") // Services on a link of this node
	}
	if len(s.ports) > 0 {
		var texts []string
		for _, p := range s.ports {
			texts = append(texts, strconv.Itoa(int(p)))
		}
		out = append(out, "meta l4proto { tcp, udp } th dport { "+strings.Join(texts, ", ")+" } return")
	}
	return append(out,
		"ip daddr . meta l4proto . th dport vmap @at4", "ip6 daddr . meta l4proto . th dport vmap @at6",
		"meta nfproto ipv4 meta l4proto . th dport vmap @any4", "meta nfproto ipv6 meta l4proto . th dport vmap @any6")
}

// sourceRules are for packets of which the answer would not come back this way.
func sourceRules(s surroundings, frontends []frontend) (out []string) {
	pods := map[netip.Addr]bool{}
	for _, f := range frontends {
		pods[f.to.Addr()] = true
	}
	if len(pods) == 0 {
		return nil
	}
	out = append(out, "ct status dnat oifname "+strconv.Quote(s.bridge)+" ip saddr 127.0.0.0/8 masquerade")
	for _, a := range slices.SortedFunc(maps.Keys(pods), netip.Addr.Compare) {
		f := ip(netip.PrefixFrom(a, a.BitLen()))
		out = append(out, fmt.Sprintf("ct status dnat %s saddr %s %s daddr %s masquerade", f, a, f, a))
	}
	if !s.filter { // pods of this node would answer each other by the bridge alone
		for _, p := range tables.Outermost(s.networks.Own) {
			out = append(out, fmt.Sprintf("ct status dnat %s saddr %s %s daddr %s masquerade", ip(p), p, ip(p), p))
		}
	}
	return out
}

func ip(p netip.Prefix) string {
	if p.Addr().Is4() {
		return "ip"
	}
	return "ip6"
}

// flows ends those by UDP to ports that changed, or all when it is not known which did, that
// lead elsewhere than now: a client that goes on sending would never get to the pod.
func (t *table) flows(frontends []frontend) error {
	m := &flowFilter{is: map[portOf]map[netip.AddrPort]bool{}}
	note := func(list, other []frontend) {
		for _, f := range list {
			if f.protocol == "udp" && !(t.written && slices.Contains(other, f)) {
				m.is[portOf{f.to.Addr().Is4(), f.port}] = map[netip.AddrPort]bool{}
			}
		}
	}
	note(frontends, t.has)
	note(t.has, frontends)
	for _, f := range frontends {
		if to := m.is[portOf{f.to.Addr().Is4(), f.port}]; f.protocol == "udp" && to != nil {
			to[f.to] = true
		}
	}
	t.has, t.written = frontends, true
	if len(m.is) == 0 {
		return nil
	}
	list, err := netlink.AddrList(nil, netlink.FAMILY_ALL)
	if err != nil {
		return fmt.Errorf("list this machine's addresses: %w", err)
	}
	m.own = map[netip.Addr]bool{}
	for _, a := range list {
		if addr, ok := netip.AddrFromSlice(a.IP); ok {
			m.own[addr.Unmap()] = true
		}
	}
	for _, f := range []netlink.InetFamily{unix.AF_INET, unix.AF_INET6} {
		if _, err := netlink.ConntrackDeleteFilters(netlink.ConntrackTable, f, m); err != nil && !errors.Is(err, unix.ENOENT) {
			return fmt.Errorf("end flows to host ports of before: %w", err)
		}
	}
	return nil
}

type portOf struct {
	v4   bool
	port uint16
}

// flowFilter matches entries of ports of this node that lead to none of the pods that have them.
type flowFilter struct {
	own map[netip.Addr]bool
	is  map[portOf]map[netip.AddrPort]bool
}

// MatchConntrackFlow implements [netlink.CustomConntrackFilter].
func (m *flowFilter) MatchConntrackFlow(flow *netlink.ConntrackFlow) bool {
	to, ok := netip.AddrFromSlice(flow.Forward.DstIP)
	from, ok2 := netip.AddrFromSlice(flow.Reverse.SrcIP)
	if !ok || !ok2 || flow.Forward.Protocol != unix.IPPROTO_UDP || !m.own[to.Unmap()] {
		return false
	}
	leads, changed := m.is[portOf{to.Unmap().Is4(), flow.Forward.DstPort}]
	return changed && !leads[netip.AddrPortFrom(from.Unmap(), flow.Reverse.SrcPort)]
}
