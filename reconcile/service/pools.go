package service

import (
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/labels"
	"sigs.k8s.io/yaml"

	"timonel/state/objects"
)

// Where administrators say which addresses there are for Services: each key of the
// ConfigMap is a pool.
const (
	PoolsNamespace = "kube-system"
	PoolsName      = "load-balancer-pools"
)

// poolSpec is what a pool is in the ConfigMap, in YAML.
type poolSpec struct {
	// Addresses are networks such as 192.0.2.64/28 and ranges such as
	// 192.0.2.10-192.0.2.20, of either family.
	Addresses []string `json:"addresses"`
	// AutoAssign says whether Services get addresses from here that ask for none.
	// Default true.
	AutoAssign *bool `json:"autoAssign"`
	// Namespaces are those of the Services that may have addresses from here. Default: all.
	Namespaces []string `json:"namespaces"`
	// Nodes is a label selector of the nodes that are on the addresses' segment and may
	// announce them. Default: all.
	Nodes string `json:"nodes"`
}

// pool is addresses for Services.
type pool struct {
	name       string
	blocks     []block
	auto       bool
	namespaces []string
	nodes      labels.Selector
}

// block is addresses in a row.
type block struct {
	first, last netip.Addr
	network     bool // written as one
}

func (b block) contains(ip netip.Addr) bool {
	return ip.Is4() == b.first.Is4() && b.first.Compare(ip) <= 0 && ip.Compare(b.last) <= 0
}

func (b block) String() string {
	if b.first == b.last {
		return b.first.String()
	}
	return b.first.String() + "-" + b.last.String()
}

func (p *pool) contains(ip netip.Addr) bool {
	return slices.ContainsFunc(p.blocks, func(b block) bool { return b.contains(ip) })
}

// serves says whether Services of a namespace may have addresses from the pool.
func (p *pool) serves(namespace string) bool {
	return len(p.namespaces) == 0 || slices.Contains(p.namespaces, namespace)
}

// cursor is how far the addresses of a family in a pool were looked at.
type cursor struct {
	block int
	last  netip.Addr // in that block; zero: none
}

// next returns the next address of a family that is not taken.
func (p *pool) next(v4 bool, c *cursor, taken func(netip.Addr) bool) (netip.Addr, bool) {
	for ; c.block < len(p.blocks); c.block, c.last = c.block+1, (netip.Addr{}) {
		b := p.blocks[c.block]
		if b.first.Is4() != v4 {
			continue
		}
		for c.last != b.last {
			if c.last.IsValid() {
				c.last = c.last.Next()
			} else {
				c.last = b.first
			}
			if !b.avoids(c.last) && !taken(c.last) {
				return c.last, true
			}
		}
	}
	return netip.Addr{}, false
}

// avoids says whether an address is given only to who asks for it: in what was written
// as a network, those that end like the network or broadcast address of a /24, or are the
// routers' anycast address, which some machines do not talk to.
func (b block) avoids(ip netip.Addr) bool {
	if !b.network || b.first == b.last {
		return false
	}
	if ip.Is4() {
		end := ip.As4()[3]
		return end == 0 || end == 255
	}
	return ip == b.first
}

// parseBlock reads a network, a range or one address.
func parseBlock(text string) (block, error) {
	text = strings.TrimSpace(text)
	var b block
	if from, to, ok := strings.Cut(text, "-"); ok {
		var errs [2]error
		b.first, errs[0] = netip.ParseAddr(strings.TrimSpace(from))
		b.last, errs[1] = netip.ParseAddr(strings.TrimSpace(to))
		if err := errors.Join(errs[:]...); err != nil || b.first.Is4() != b.last.Is4() || b.last.Less(b.first) {
			return b, fmt.Errorf("%q is not a range such as 192.0.2.10-192.0.2.20", text)
		}
	} else if strings.Contains(text, "/") {
		p, err := netip.ParsePrefix(text)
		if err != nil || p != p.Masked() {
			return b, fmt.Errorf("%q is not a network such as 192.0.2.64/28", text)
		}
		b.first, b.last, b.network = p.Addr(), lastOf(p), true
	} else {
		ip, err := netip.ParseAddr(text)
		if err != nil {
			return b, fmt.Errorf("%q is no address, no range such as 192.0.2.10-192.0.2.20 and no network such as 192.0.2.64/28", text)
		}
		b.first, b.last = ip, ip
	}
	for _, ip := range []netip.Addr{b.first, b.last} {
		if ip.Zone() != "" || ip.Is4In6() || !ip.IsGlobalUnicast() || ip.Is4() && ip.As4()[0] == 0 || ip.Is4() && ip.As4()[0] >= 240 {
			return b, fmt.Errorf("%q: %s is not an address that a Service can have", text, ip)
		}
	}
	for _, never := range []netip.Prefix{netip.MustParsePrefix("127.0.0.0/8"), netip.MustParsePrefix("169.254.0.0/16"), netip.MustParsePrefix("fe80::/10"), netip.MustParsePrefix("::/16")} {
		if b.contains(never.Addr()) || never.Contains(b.first) {
			return b, fmt.Errorf("%q overlaps %s, where no Service can be", text, never)
		}
	}
	return b, nil
}

// lastOf is the last address of a network.
func lastOf(p netip.Prefix) netip.Addr {
	raw := p.Addr().AsSlice()
	for i := p.Bits(); i < len(raw)*8; i++ {
		raw[i/8] |= 1 << (7 - i%8)
	}
	ip, _ := netip.AddrFromSlice(raw) // as long as an address
	return ip
}

// poolsOf are the pools of a snapshot in the order of their names, and what is wrong with
// those that cannot be used.
func (r Reserved) poolsOf(s *objects.Snapshot) ([]*pool, map[string]error) {
	cm, ok := s.ConfigMaps().Get(PoolsNamespace, PoolsName)
	if !ok || cm.DeletionTimestamp != nil {
		return nil, nil
	}
	return parsePools(cm, r)
}

// Reserved are networks of the cluster, of which no Service gets an address from a pool.
type Reserved struct {
	Pods, Services []netip.Prefix
}

// blocks are those of the networks, in the order of addresses.
func (r Reserved) blocks() (out []placed) {
	for of, networks := range map[string][]netip.Prefix{"the pods' network (--cluster-cidr)": r.Pods, "the Services' network (--service-cidr)": r.Services} {
		for _, n := range networks {
			out = append(out, placed{block{first: n.Masked().Addr(), last: lastOf(n.Masked())}, of})
		}
	}
	slices.SortFunc(out, func(a, b placed) int { return a.first.Compare(b.first) })
	return out
}

// placed is a block and whose it is, in the order of addresses.
type placed struct {
	block
	of string
}

func parsePools(cm *corev1.ConfigMap, r Reserved) (pools []*pool, wrong map[string]error) {
	wrong = map[string]error{}
	all := r.blocks()
	for _, name := range slices.Sorted(maps.Keys(cm.Data)) {
		p, with, err := parsePool(name, cm.Data[name], all)
		if err != nil {
			wrong[name] = err
			continue
		}
		pools, all = append(pools, p), with
	}
	return pools, wrong
}

// parsePool reads a pool, and returns all with its blocks.
func parsePool(name, text string, all []placed) (*pool, []placed, error) {
	var spec poolSpec
	if err := yaml.UnmarshalStrict([]byte(text), &spec); err != nil {
		return nil, nil, fmt.Errorf("it must be YAML such as \"addresses: [192.0.2.64/28]\": %w", err)
	}
	if len(spec.Addresses) == 0 {
		return nil, nil, errors.New("addresses is empty: give networks such as 192.0.2.64/28 or ranges such as 192.0.2.10-192.0.2.20")
	}
	p := &pool{name: name, auto: spec.AutoAssign == nil || *spec.AutoAssign, namespaces: spec.Namespaces}
	var err error
	if p.nodes, err = labels.Parse(spec.Nodes); err != nil {
		return nil, nil, fmt.Errorf("nodes is no label selector such as rack=a: %w", err)
	}
	all = slices.Clone(all)
	for i, text := range spec.Addresses {
		b, err := parseBlock(text)
		if err != nil {
			return nil, nil, fmt.Errorf("addresses[%d]: %w", i, err)
		}
		at, _ := slices.BinarySearchFunc(all, b.first, func(o placed, ip netip.Addr) int { return o.first.Compare(ip) })
		for _, j := range []int{at - 1, at} { // the neighbours: no others can overlap
			if j >= 0 && j < len(all) && (all[j].contains(b.first) || b.contains(all[j].first)) {
				return nil, nil, fmt.Errorf("addresses[%d]: %q overlaps %s of %s", i, text, all[j].block, all[j].of)
			}
		}
		all = slices.Insert(all, at, placed{b, "pool " + name})
		p.blocks = append(p.blocks, b)
	}
	return p, all, nil
}
