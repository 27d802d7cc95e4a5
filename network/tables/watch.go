package tables

import (
	"context"
	"encoding/binary"
	"fmt"
	"sync"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
	"sigs.k8s.io/knftables"
)

// Watcher knows whether anybody else has changed nftables: the kernel numbers each
// transaction of a network namespace, and ours are known. All that write there share one,
// or they would take each other for somebody else.
type Watcher struct {
	mu         sync.Mutex
	running    int    // transactions of ours
	ours       uint32 // that ended well since
	generation uint32 // was read
	known      bool
	others     uint64
}

// look sees what has happened since the last look, and returns how often somebody else has
// changed something. What happens beside a transaction of ours is seen after it.
func (w *Watcher) look() uint64 {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.see()
	return w.others
}

// see is look. w.mu is held.
func (w *Watcher) see() {
	if w.running > 0 {
		return
	}
	g, err := generation()
	if err != nil || w.known && g != w.generation+w.ours {
		w.others++
	}
	w.generation, w.ours, w.known = g, 0, err == nil
}

// Watch returns an nft whose transactions are known to be ours.
func (w *Watcher) Watch(nft knftables.Interface) knftables.Interface {
	return &watched{Interface: nft, w: w}
}

// watched is a way to one table.
type watched struct {
	knftables.Interface
	w     *Watcher
	count uint64 // of its transactions; w.mu guards it
}

func (n *watched) Run(ctx context.Context, tx *knftables.Transaction) error {
	n.w.mu.Lock()
	n.w.see()
	n.w.running++
	n.w.mu.Unlock()
	err := n.Interface.Run(ctx, tx)
	n.w.mu.Lock()
	defer n.w.mu.Unlock()
	n.count++
	n.w.running--
	if err == nil {
		n.w.ours++
	}
	n.w.see()
	return err
}

func (n *watched) ran() uint64 {
	n.w.mu.Lock()
	defer n.w.mu.Unlock()
	return n.count
}

// generation is the number of the last transaction of this network namespace.
func generation() (uint32, error) {
	r := nl.NewNetlinkRequest(unix.NFNL_SUBSYS_NFTABLES<<8|unix.NFT_MSG_GETGEN, 0)
	r.AddData(&nl.Nfgenmsg{NfgenFamily: unix.AF_UNSPEC, Version: nl.NFNETLINK_V0})
	msgs, err := r.Execute(unix.NETLINK_NETFILTER, 0)
	if err != nil {
		return 0, fmt.Errorf("nftables: ask for the generation: %w", err)
	}
	for _, m := range msgs {
		if len(m) < nl.SizeofNfgenmsg {
			continue
		}
		attrs, err := nl.ParseRouteAttr(m[nl.SizeofNfgenmsg:])
		if err != nil {
			return 0, fmt.Errorf("nftables: generation: %w", err)
		}
		for _, a := range attrs {
			if a.Attr.Type&nl.NLA_TYPE_MASK == unix.NFTA_GEN_ID && len(a.Value) >= 4 {
				return binary.BigEndian.Uint32(a.Value), nil
			}
		}
	}
	return 0, fmt.Errorf("nftables: the kernel does not say its generation")
}

// rule is one of a table, as the kernel knows it.
type rule struct {
	chain  string
	handle uint64
}

// rules lists those of a table.
func rules(family knftables.Family, table string) ([]rule, error) {
	r := nl.NewNetlinkRequest(unix.NFNL_SUBSYS_NFTABLES<<8|unix.NFT_MSG_GETRULE, unix.NLM_F_DUMP)
	number := map[knftables.Family]uint8{
		knftables.IPv4Family: unix.NFPROTO_IPV4, knftables.IPv6Family: unix.NFPROTO_IPV6, knftables.InetFamily: unix.NFPROTO_INET, knftables.BridgeFamily: unix.NFPROTO_BRIDGE,
	}
	r.AddData(&nl.Nfgenmsg{NfgenFamily: number[family], Version: nl.NFNETLINK_V0})
	r.AddData(nl.NewRtAttr(unix.NFTA_RULE_TABLE, nl.ZeroTerminated(table)))
	msgs, err := r.Execute(unix.NETLINK_NETFILTER, 0)
	if err != nil {
		return nil, fmt.Errorf("nftables: list rules: %w", err)
	}
	var out []rule
	for _, m := range msgs {
		if len(m) < nl.SizeofNfgenmsg {
			continue
		}
		attrs, err := nl.ParseRouteAttr(m[nl.SizeofNfgenmsg:])
		if err != nil {
			return nil, fmt.Errorf("nftables: list rules: %w", err)
		}
		var one rule
		of := ""
		for _, a := range attrs {
			switch a.Attr.Type & nl.NLA_TYPE_MASK {
			case unix.NFTA_RULE_TABLE:
				of = unix.ByteSliceToString(a.Value)
			case unix.NFTA_RULE_CHAIN:
				one.chain = unix.ByteSliceToString(a.Value)
			case unix.NFTA_RULE_HANDLE:
				if len(a.Value) >= 8 {
					one.handle = binary.BigEndian.Uint64(a.Value)
				}
			}
		}
		if of == table {
			out = append(out, one)
		}
	}
	return out, nil
}
