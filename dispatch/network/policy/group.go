package policy

import (
	"bytes"
	"cmp"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"net/netip"
	"slices"

	"google.golang.org/protobuf/proto"

	"timonel/network/feed/wire"
	pb "timonel/proto/timonel/v1"
)

// maxPart is how many elements a part of a group has at most.
const maxPart = 256

// spec says what a group is.
type spec struct {
	of ref
	// Of a group of ports: those of this name and protocol, of members within the block.
	protocol, port string
	within         *block
}

// block is the addresses of a CIDR without some.
type block struct {
	cidr   netip.Prefix
	except []netip.Prefix
}

func (b *block) has(ip netip.Addr) bool {
	return b == nil || b.cidr.Contains(ip) && !slices.ContainsFunc(b.except, func(p netip.Prefix) bool { return p.Contains(ip) })
}

// name is that of the group, equal on every controller.
func (s spec) name() string {
	text := s.of.scopeKey() + "\x00" + s.of.pods.String()
	if s.port != "" {
		text += "\x00" + s.protocol + "\x00" + s.port
	}
	if s.within != nil {
		text += fmt.Sprint("\x00", s.within.cidr, s.within.except)
	}
	sum := sha256.Sum256([]byte(text))
	return hex.EncodeToString(sum[:12])
}

// element is an address, or a port at an address.
type element struct {
	ip       netip.Addr
	protocol string // empty: an address alone
	port     uint16
}

func (e element) compare(other element) int {
	return cmp.Or(e.ip.Compare(other.ip), cmp.Compare(e.protocol, other.protocol), cmp.Compare(e.port, other.port))
}

// hash tells an element's part. It is the same on every controller.
func (e element) hash() uint64 {
	h := uint64(14695981039346656037) // FNV-1a
	add := func(b byte) { h = (h ^ uint64(b)) * 1099511628211 }
	for _, b := range e.ip.As16() {
		add(b)
	}
	for i := range len(e.protocol) {
		add(e.protocol[i])
	}
	add(byte(e.port >> 8))
	add(byte(e.port))
	// The first bits decide, and FNV stirs the last.
	h = (h ^ h>>33) * 0xff51afd7ed558ccd
	h = (h ^ h>>33) * 0xc4ceb9fe1a85ec53
	return h ^ h>>33
}

// group is the addresses, or ports of a name, of the pods of a selection.
type group struct {
	name      string
	spec      spec
	of        *chosen
	refs      map[*policy]struct{}
	root      part
	dead      []string            // parts that may be no more
	told      map[string]*content // of each part, by its bits
	withheld  bool
	needs     int64 // bytes, when it is withheld
	followers map[*Follower]struct{}
}

// elements appends what a pod is in the group.
func (g *group) elements(to []element, of *facts) []element {
	if of == nil {
		return to
	}
	for _, ip := range of.members {
		switch {
		case !g.spec.within.has(ip):
		case g.spec.port == "":
			to = append(to, element{ip: ip})
		default:
			for _, port := range of.ports {
				if port.name == g.spec.port && port.protocol == g.spec.protocol {
					to = append(to, element{ip, port.protocol, port.number})
				}
			}
		}
	}
	return to
}

// change puts what a pod is now into a group, and takes what it was out.
func (f *Fold) change(g *group, old, next *facts) {
	var a, b [4]element
	was, is := g.elements(a[:0], old), g.elements(b[:0], next)
	if slices.Equal(was, is) {
		return
	}
	for _, e := range was {
		g.remove(e)
	}
	for _, e := range is {
		g.root.add(e, e.hash(), 0)
	}
	f.dirtyGroups[g] = struct{}{}
}

// part is all elements whose hashes begin with some bits. It is one message when it has
// few, and else two halves: that follows from the elements alone.
type part struct {
	count  int
	dirty  bool
	halves *[2]part
	leaf   []element // in order; one that two pods have is there twice
}

func half(hash uint64, depth int) int { return int(hash >> (63 - depth) & 1) }

func (p *part) add(e element, hash uint64, depth int) {
	p.count++
	p.dirty = true
	if p.halves != nil {
		p.halves[half(hash, depth)].add(e, hash, depth+1)
		return
	}
	i, _ := slices.BinarySearchFunc(p.leaf, e, element.compare)
	p.leaf = slices.Insert(p.leaf, i, e)
	if len(p.leaf) <= maxPart || depth == 64 {
		return
	}
	p.halves = &[2]part{{dirty: true}, {dirty: true}}
	for _, e := range p.leaf {
		hash := e.hash()
		p.halves[half(hash, depth)].add(e, hash, depth+1)
	}
	p.leaf = nil
}

func (g *group) remove(e element) {
	hash := e.hash()
	for depth, p := 0, &g.root; ; depth++ {
		p.count--
		p.dirty = true
		if p.halves == nil {
			if i, ok := slices.BinarySearchFunc(p.leaf, e, element.compare); ok {
				p.leaf = slices.Delete(p.leaf, i, i+1)
			}
			return
		}
		if p.count > maxPart {
			p = &p.halves[half(hash, depth)]
			continue
		}
		// The halves are one again. They have no halves themselves, but for what is
		// taken out now.
		p.leaf = g.gather(p, nil, bits(hash, depth))
		slices.SortFunc(p.leaf, element.compare)
		p.halves = nil
		if i, ok := slices.BinarySearchFunc(p.leaf, e, element.compare); ok {
			p.leaf = slices.Delete(p.leaf, i, i+1)
		}
		return
	}
}

// gather appends all elements of a part, whose halves are to be no more.
func (g *group) gather(p *part, to []element, bits string) []element {
	if p.halves == nil {
		return append(to, p.leaf...)
	}
	for i := range p.halves {
		below := bits + string(rune('0'+i))
		g.dead = append(g.dead, below)
		to = g.gather(&p.halves[i], to, below)
	}
	return to
}

// bits are the first of a hash, readable.
func bits(hash uint64, n int) string { return fmt.Sprintf("%064b", hash)[:n] }

// encode makes messages of the parts that changed, and yields for each that is another
// now, new or no more what it was and what it is.
func (g *group) encode(changed func(old, next *content)) {
	set := func(bits string, next *content) {
		old := g.told[bits]
		switch {
		case old == nil && next == nil, old != nil && next != nil && old.sum == next.sum:
			return
		case next == nil:
			delete(g.told, bits)
		default:
			g.told[bits] = next
		}
		changed(old, next)
	}
	if g.withheld {
		for bits := range g.told {
			if bits != "" {
				set(bits, nil)
			}
		}
		set("", g.message("", nil))
		return
	}
	for _, bits := range g.dead {
		if !g.root.isLeaf(bits) {
			set(bits, nil)
		}
	}
	g.dead = nil
	g.walk(&g.root, "", set)
}

func (g *group) walk(p *part, bits string, set func(string, *content)) {
	if !p.dirty {
		return
	}
	p.dirty = false
	if p.halves == nil {
		set(bits, g.message(bits, p.leaf))
		return
	}
	set(bits, nil)
	g.walk(&p.halves[0], bits+"0", set)
	g.walk(&p.halves[1], bits+"1", set)
}

// soil makes encode look at all parts.
func (p *part) soil() {
	p.dirty = true
	if p.halves != nil {
		p.halves[0].soil()
		p.halves[1].soil()
	}
}

// isLeaf says whether there is a message for some bits.
func (p *part) isLeaf(bits string) bool {
	for i := range len(bits) {
		if p.halves == nil {
			return false
		}
		p = &p.halves[bits[i]-'0']
	}
	return p.halves == nil
}

// message is a part as it goes over the wire.
func (g *group) message(bits string, elements []element) *content {
	m := &pb.NetworkGroup{Of: g.name, Name: g.name + ".x" + bits}
	for i, e := range elements {
		switch {
		case i > 0 && elements[i-1] == e:
		case e.protocol != "":
			m.Targets = append(m.Targets, &pb.NetworkTarget{Address: e.ip.AsSlice(), Protocol: e.protocol, Port: uint32(e.port)})
		case e.ip.Is4():
			m.V4 = append(m.V4, e.ip.AsSlice()...)
		default:
			m.V6 = append(m.V6, e.ip.AsSlice()...)
		}
	}
	m.V4, m.V6 = bytes.Clone(m.V4), bytes.Clone(m.V6)
	return encode(wire.Key{Kind: pb.NetworkKind_NETWORK_KIND_GROUP, Name: m.Name}, m)
}

// content is an item as it goes over the wire. It never changes, and all who are told of
// it share it.
type content struct {
	key    wire.Key
	item   *pb.NetworkItem
	sum    wire.Sum
	bucket int
}

// encode makes an item. What is valid UTF-8, as all that the API accepts is, can be
// encoded.
func encode(key wire.Key, m proto.Message) *content {
	raw, err := proto.MarshalOptions{Deterministic: true}.Marshal(m)
	if err != nil {
		raw = nil
	}
	bucket, sum := wire.SumOf(key, raw)
	return &content{key: key, item: &pb.NetworkItem{Kind: key.Kind, Object: raw}, sum: sum, bucket: bucket}
}

func (c *content) size() int64 {
	if c == nil {
		return 0
	}
	return int64(len(c.item.Object) + c.key.Size() + wire.ItemBytes)
}
