package service

import (
	"context"
	"encoding/binary"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"time"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
	"sigs.k8s.io/knftables"
)

// watcher knows whether anybody else has changed nftables: the kernel numbers each
// transaction of a network namespace, and ours are known.
type watcher struct {
	generation uint32
	known      bool
	others     uint64 // grows when somebody else has changed something
	ours       uint64 // grows when we have
}

func (w *watcher) look() {
	g, err := generation()
	if err != nil || w.known && g != w.generation {
		w.others++
	}
	w.generation, w.known = g, err == nil
}

// watch returns an nft whose transactions are known to be ours.
func (w *watcher) watch(nft knftables.Interface) knftables.Interface { return &watched{nft, w} }

type watched struct {
	knftables.Interface
	w *watcher
}

func (n *watched) Run(ctx context.Context, tx *knftables.Transaction) error {
	n.w.look()
	err := n.Interface.Run(ctx, tx)
	n.w.ours++
	if err == nil {
		n.w.generation++
	}
	n.w.look()
	return err
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

// trust is why a table is believed to be as it was left.
type trust struct {
	seen    uint64        // of watcher.others
	watched uint64        // the same, at the last look
	print   string        // of the table when it was surely ours,
	printOf uint64        // which was after so many of watcher.ours; 0: never
	wholeAt time.Time     // when it was last written whole,
	took    time.Duration // and what that took
}

// Somebody else's transaction may have changed elements of a table without another
// trace. Then it is written anew, which packets do not notice, but no more often than
// each of these, so that it takes little of the node's time.
const (
	leastRest = time.Minute
	restTimes = 100
)

// touched says whether a table must be written anew since somebody else changed it.
func (s *side) touched(ctx context.Context, w *watcher, log *slog.Logger) bool {
	w.look()
	s.watched = w.others
	known := s.printOf != 0 && s.printOf == w.ours
	if known && w.others == s.seen {
		return false
	}
	print, whole, err := s.fingerprint(ctx)
	switch {
	case err != nil:
		log.Warn("the table of Services is gone or cannot be read; it is written anew", "family", s.compiler.family.ip, "error", brief(err))
		return true
	case !whole, known && print != s.print:
		log.Warn("somebody else has changed the table of Services; it is written anew", "family", s.compiler.family.ip)
		return true
	}
	s.print, s.printOf = print, w.ours
	return w.others != s.seen && time.Since(s.wholeAt) > max(leastRest, restTimes*s.took)
}

// fingerprint is what of a table costs little to read: its chains, maps and sets, and
// which rules there are. whole says that none is missing and none is too much, as far as
// that is known without what was there before.
func (s *side) fingerprint(ctx context.Context) (print string, whole bool, err error) {
	all, err := s.table.nft.ListAll(ctx)
	if err != nil {
		return "", false, err
	}
	var out []string
	for kind, names := range all {
		for _, n := range names {
			out = append(out, kind+" "+n)
		}
	}
	list, err := rulesOf(s.compiler.family, s.name)
	if err != nil {
		return "", false, err
	}
	rules := map[string]int{}
	for _, r := range list {
		rules[r.chain]++
		out = append(out, fmt.Sprintf("rule %s %d", r.chain, r.handle))
	}
	slices.Sort(out)
	return strings.Join(out, "\n"), s.plausible(all, rules), nil
}

type rule struct {
	chain  string
	handle uint64
}

// rulesOf lists the rules of a table.
func rulesOf(f family, table string) ([]rule, error) {
	r := nl.NewNetlinkRequest(unix.NFNL_SUBSYS_NFTABLES<<8|unix.NFT_MSG_GETRULE, unix.NLM_F_DUMP)
	number := uint8(unix.NFPROTO_IPV4)
	if !f.v4() {
		number = unix.NFPROTO_IPV6
	}
	r.AddData(&nl.Nfgenmsg{NfgenFamily: number, Version: nl.NFNETLINK_V0})
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

// plausible says whether a table has the chains, maps and sets that it must have, with
// as many rules as they must have, and no others. Of a Service's own chains, which have a
// slash in their names, nothing is known.
func (s *side) plausible(all map[string][]string, rules map[string]int) bool {
	want := map[string]int{}
	for _, c := range fixedChains(s.compiler.family, s.around) {
		want[c.name] = len(c.rules)
	}
	for _, h := range hooks {
		want[h.name] = len(ownRules(h.hook, s.compiler.family, s.around)) + len(h.rules)
	}
	for name := range s.table.refs {
		if !strings.Contains(name, "\x00") {
			want[name] = -1
		}
	}
	for _, name := range all["chain"] {
		n, known := want[name]
		_, stale := s.table.stale[name]
		switch {
		case known && n >= 0 && n != rules[name], known && n < 0 && rules[name] == 0, !known && !stale && !strings.Contains(name, "/"):
			return false
		}
		delete(want, name)
	}
	for _, m := range fixedMaps(s.compiler.family) {
		kind := "set"
		if isMap(m.name) {
			kind = "map"
		}
		if !slices.Contains(all[kind], m.name) {
			return false
		}
	}
	return len(want) == 0
}
