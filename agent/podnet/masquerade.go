package podnet

import (
	"context"
	"fmt"
	"net/netip"
	"os/exec"
	"time"

	"sigs.k8s.io/knftables"
)

// masquerade gives packets that leave the cluster the node's address: those
// from this node's pods to anything but pods.
func (n *Network) masquerade(own []string, hops []hop) error {
	if len(own) == 0 {
		return nil
	}
	if _, err := exec.LookPath("nft"); err != nil {
		n.log.Warn("nft is not installed: pods cannot reach addresses outside the cluster; install it with: apt-get install nftables")
		return nil
	}
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	nft, err := knftables.New(knftables.InetFamily, n.cfg.Table)
	if err != nil {
		return fmt.Errorf("nftables: %w", err)
	}
	tx := nft.NewTransaction()
	tx.Add(&knftables.Table{Comment: knftables.PtrTo("pod network of the Timonel agent")})
	const chain = "postrouting"
	tx.Add(&knftables.Chain{
		Name: chain, Type: knftables.PtrTo(knftables.NATType), Hook: knftables.PtrTo(knftables.PostroutingHook), Priority: knftables.PtrTo(knftables.SNATPriority),
	})
	tx.Flush(&knftables.Chain{Name: chain})
	all := append([]string(nil), own...)
	for _, h := range hops {
		all = append(all, h.dst.String())
	}
	for _, set := range []struct{ name, kind, family string }{{"pods4", "ipv4_addr", "ip"}, {"pods6", "ipv6_addr", "ip6"}} {
		v4 := set.family == "ip"
		s := &knftables.Set{Name: set.name, Type: set.kind, Flags: []knftables.SetFlag{knftables.IntervalFlag}}
		tx.Add(s)
		tx.Flush(s)
		seen := map[string]bool{}
		for _, c := range all {
			p, err := netip.ParsePrefix(c)
			if err != nil {
				return fmt.Errorf("pod CIDR %q: %w", c, err)
			}
			if p.Addr().Is4() == v4 && !seen[p.Masked().String()] {
				seen[p.Masked().String()] = true
				tx.Add(&knftables.Element{Set: set.name, Key: []string{p.Masked().String()}})
			}
		}
		for _, c := range own {
			p, err := netip.ParsePrefix(c)
			if err != nil || p.Addr().Is4() != v4 {
				continue
			}
			tx.Add(&knftables.Rule{Chain: chain, Rule: knftables.Concat(
				set.family, "saddr", p.Masked().String(), set.family, "daddr", "!=", "@"+set.name, "masquerade")})
		}
	}
	if err := nft.Run(ctx, tx); err != nil {
		return fmt.Errorf("nftables: address translation for pods: %w", err)
	}
	return nil
}

func (n *Network) unmasquerade() error {
	if _, err := exec.LookPath("nft"); err != nil {
		return nil
	}
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	nft, err := knftables.New(knftables.InetFamily, n.cfg.Table)
	if err != nil {
		return fmt.Errorf("nftables: %w", err)
	}
	tx := nft.NewTransaction()
	tx.Add(&knftables.Table{}) // so that deleting it cannot fail
	tx.Delete(&knftables.Table{})
	if err := nft.Run(ctx, tx); err != nil {
		return fmt.Errorf("nftables: remove table %s: %w", n.cfg.Table, err)
	}
	return nil
}
