package podnet

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"time"

	"sigs.k8s.io/knftables"

	"timonel/network/tables"
)

const rulesTimeout = 10 * time.Second

// rules are what the table of the pod network is made from.
type rules struct {
	own   []netip.Prefix // this node's ranges
	pods  []netip.Prefix // where pods are: from there, and only there, packets come out of the tunnel
	keep  []netip.Prefix // to which packets of pods keep their source
	nodes []netip.Addr   // who sends by VXLAN
	vxlan bool
}

func (r rules) equal(o rules) bool {
	return slices.Equal(r.own, o.own) && slices.Equal(r.pods, o.pods) && slices.Equal(r.keep, o.keep) &&
		slices.Equal(r.nodes, o.nodes) && r.vxlan == o.vxlan
}

// makeRules writes the table of the pod network when it is not, or may not be, as it was
// written last.
//
// Packets from this node's pods to anything but pods get the node's address. VXLAN is
// taken from nodes alone; what comes out of it must be from a pod of another node to one
// of this.
func (n *Network) makeRules(own []netip.Prefix, guard Guard, hops []hop) error {
	if len(own) == 0 {
		return nil
	}
	if _, err := exec.LookPath("nft"); err != nil {
		return errors.New("nft is not installed: pods cannot reach addresses outside the cluster, and there is no VXLAN; install it with: apt-get install nftables")
	}
	r := rules{own: own, vxlan: n.tunnels()}
	if guard.Pods.Known() {
		r.pods = guard.Pods.Networks
	} else {
		r.pods = slices.Clone(own)
		for _, h := range hops {
			r.pods = append(r.pods, h.dst)
		}
	}
	r.pods = tables.Outermost(r.pods)
	r.keep = tables.Outermost(slices.Concat(r.pods, own, n.cfg.KeepSource))
	if r.vxlan {
		for _, h := range hops {
			if ip := h.address(n.cfg.NodeIPs[0].Is4()); ip.IsValid() {
				r.nodes = append(r.nodes, ip)
			}
		}
		slices.SortFunc(r.nodes, netip.Addr.Compare)
		r.nodes = slices.Compact(r.nodes)
	}
	if n.ruled && r.equal(n.rules) && !n.touched() {
		return nil
	}
	if err := n.writeRules(r); err != nil {
		n.ruled = false
		return err
	}
	n.rules, n.ruled = r, true
	return nil
}

func (n *Network) writeRules(r rules) error {
	ctx, cancel := context.WithTimeout(context.Background(), rulesTimeout)
	defer cancel()
	nft, err := knftables.New(knftables.InetFamily, n.cfg.Table)
	if err != nil {
		return fmt.Errorf("nftables: %w", err)
	}
	nft = n.trust.Watch(n.cfg.Watcher, nft)
	lines, begun := map[string]int{}, time.Now()
	tx := nft.NewTransaction()
	tx.Add(&knftables.Table{}) // so that deleting it cannot fail
	tx.Delete(&knftables.Table{})
	tx.Add(&knftables.Table{Comment: knftables.PtrTo("pod network of the Timonel agent")})
	chain := func(name string, typ knftables.BaseChainType, hook knftables.BaseChainHook, priority knftables.BaseChainPriority, rules ...string) {
		tx.Add(&knftables.Chain{Name: name, Type: &typ, Hook: &hook, Priority: &priority})
		for _, rule := range rules {
			tx.Add(&knftables.Rule{Chain: name, Rule: rule})
			lines[name]++
		}
	}
	var translate, ends, inside []string
	for _, f := range []family{{"4", "ip", true}, {"6", "ip6", false}} {
		keep, pods, nodes := "keep"+f.name, "pods"+f.name, "nodes"+f.name
		set(tx, keep, f, f.texts(r.keep))
		set(tx, pods, f, f.texts(r.pods))
		var ips []string
		for _, ip := range r.nodes {
			if ip.Is4() == f.v4 {
				ips = append(ips, ip.String())
			}
		}
		set(tx, nodes, f, ips)
		for _, p := range f.texts(r.own) {
			translate = append(translate, f.nft+" saddr "+p+" "+f.nft+" daddr != @"+keep+" masquerade")
		}
		if !r.vxlan {
			continue
		}
		// Another VXLAN may use the port: only what is of our number is looked at. It is in
		// the 13th to 15th byte behind the IP header.
		ends = append(ends, fmt.Sprintf("udp dport %d @th,96,24 %d %s saddr != @%s drop", n.cfg.VXLAN.Port, n.cfg.VXLAN.ID, f.nft, nodes))
		device := "iifname " + strconv.Quote(n.cfg.VXLAN.Device) + " "
		own := f.texts(r.own)
		if len(own) == 0 {
			inside = append(inside, device+"meta nfproto ipv"+f.name+" drop")
			continue
		}
		list := "{ " + strings.Join(own, ", ") + " }"
		inside = append(inside, device+f.nft+" saddr != @"+pods+" drop", device+f.nft+" saddr "+list+" drop", device+f.nft+" daddr != "+list+" drop")
	}
	chain("postrouting", knftables.NATType, knftables.PostroutingHook, knftables.SNATPriority, translate...)
	chain("tunnel-ends", knftables.FilterType, knftables.PreroutingHook, knftables.RawPriority, ends...)
	chain("tunnel-inside", knftables.FilterType, knftables.PreroutingHook, knftables.RawPriority, inside...)
	if err := nft.Run(ctx, tx); err != nil {
		return fmt.Errorf("nftables: rules of the pod network: %w", err)
	}
	n.lines = lines
	n.trust.Written(begun)
	return nil
}

// touched says whether somebody else may have changed the table since it was written.
func (n *Network) touched() bool {
	ctx, cancel := context.WithTimeout(context.Background(), rulesTimeout)
	defer cancel()
	return n.trust.Touched(ctx, tables.Of{What: "the pod network", Family: knftables.InetFamily, Name: n.cfg.Table}, func(l *tables.Listing) bool {
		return maps.Equal(l.Rules, n.lines) && len(l.Names["chain"]) == chains && len(l.Names["set"]) == sets
	}, n.log)
}

// chains and sets are how many the table has.
const chains, sets = 3, 6

// family is one of IP's in a table for both.
type family struct {
	name, nft string
	v4        bool
}

// texts are the networks of the family.
func (f family) texts(networks []netip.Prefix) (out []string) {
	for _, p := range networks {
		if p.Addr().Is4() == f.v4 {
			out = append(out, p.String())
		}
	}
	return out
}

// set writes a set of networks or addresses.
func set(tx *knftables.Transaction, name string, f family, elements []string) {
	typ := "ipv6_addr"
	if f.v4 {
		typ = "ipv4_addr"
	}
	tx.Add(&knftables.Set{Name: name, Type: typ, Flags: []knftables.SetFlag{knftables.IntervalFlag}})
	for _, e := range elements {
		tx.Add(&knftables.Element{Set: name, Key: []string{e}})
	}
}

func (n *Network) removeRules() error {
	ctx, cancel := context.WithTimeout(context.Background(), rulesTimeout)
	defer cancel()
	return tables.Remove(ctx, n.cfg.Table, knftables.InetFamily)
}
