// Package wire is what both ends of the network feed agree on: what an item is called,
// how what somebody has is told in 4 KiB, and how large things may be.
package wire

import (
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"net/netip"
	"strings"

	"google.golang.org/protobuf/proto"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"

	pb "timonel/proto/timonel/v1"
)

const (
	// Buckets is how many parts what somebody has is told in.
	Buckets = 256
	// MaxItem bounds one item: an EndpointSlice of a thousand endpoints has some
	// 100 KiB. MaxBatch bounds the items of a batch, but for one that is larger by
	// itself.
	MaxItem  = 1 << 20
	MaxBatch = 256 << 10
	// MaxBytes bounds all items of a cluster.
	MaxBytes = 256 << 20
	// ItemBytes is counted for each item beside its encoding.
	ItemBytes = 128
	// MaxKinds bounds the kinds that an agent asks for.
	MaxKinds = 16
)

// Key names an item.
type Key struct {
	Kind            pb.NetworkKind
	Namespace, Name string
}

// KeyOf is the key that a message names.
func KeyOf(k *pb.NetworkKey) Key { return Key{k.GetKind(), k.GetNamespace(), k.GetName()} }

// Proto is the key as a message.
func (k Key) Proto() *pb.NetworkKey {
	return &pb.NetworkKey{Kind: k.Kind, Namespace: k.Namespace, Name: k.Name}
}

// Size is about what the key takes in a message.
func (k Key) Size() int { return len(k.Namespace) + len(k.Name) + 8 }

// String is for logs.
func (k Key) String() string {
	kind := map[pb.NetworkKind]string{
		pb.NetworkKind_NETWORK_KIND_NODE: "node", pb.NetworkKind_NETWORK_KIND_SERVICE: "service", pb.NetworkKind_NETWORK_KIND_SLICE: "endpointslice",
		pb.NetworkKind_NETWORK_KIND_POLICY: "policy", pb.NetworkKind_NETWORK_KIND_GROUP: "group", pb.NetworkKind_NETWORK_KIND_POD: "pod",
		pb.NetworkKind_NETWORK_KIND_ADDRESS: "address",
	}[k.Kind]
	if kind == "" {
		kind = k.Kind.String()
	}
	if k.Namespace == "" {
		return kind + " " + k.Name
	}
	return kind + " " + k.Namespace + "/" + k.Name
}

// Sum is the digest of one item, or of many: the sum of all of them, in no order.
type Sum [16]byte

// SumOf is the digest of an item and the bucket that it is of.
func SumOf(k Key, object []byte) (bucket int, sum Sum) {
	name := fmt.Appendf(nil, "%d\x00%s\x00%s\x00", k.Kind, k.Namespace, k.Name)
	h := sha256.New()
	h.Write(name)
	bucket = int(h.Sum(nil)[0])
	h.Write(object)
	copy(sum[:], h.Sum(nil))
	return bucket, sum
}

// toggle adds what is not in a sum, and takes away what is.
func (s *Sum) toggle(other Sum) {
	for i := 0; i < len(s); i += 8 {
		binary.NativeEndian.PutUint64(s[i:], binary.NativeEndian.Uint64(s[i:])^binary.NativeEndian.Uint64(other[i:]))
	}
}

// Digest is what somebody has, by buckets.
type Digest struct {
	buckets [Buckets]Sum
	whole   Sum
}

// Toggle adds an item, or takes it away.
func (d *Digest) Toggle(bucket int, sum Sum) {
	d.buckets[bucket].toggle(sum)
	d.whole.toggle(sum)
}

// Add is as if all that is in other were added.
func (d *Digest) Add(other *Digest) {
	for i := range d.buckets {
		d.buckets[i].toggle(other.buckets[i])
	}
	d.whole.toggle(other.whole)
}

// Whole is the digest of all.
func (d *Digest) Whole() Sum { return d.whole }

// AddWhole is the digest of all that is in either.
func (s Sum) AddWhole(other Sum) Sum {
	s.toggle(other)
	return s
}

// Marshal is the digest of each bucket, for NetworkHave.
func (d *Digest) Marshal() []byte {
	out := make([]byte, 0, Buckets*len(Sum{}))
	for _, s := range d.buckets {
		out = append(out, s[:]...)
	}
	return out
}

// Unmarshal reads what Marshal wrote; nothing is a digest of nothing.
func Unmarshal(raw []byte) (*Digest, error) {
	d := &Digest{}
	if len(raw) == 0 {
		return d, nil
	}
	if want := Buckets * len(Sum{}); len(raw) != want {
		return nil, fmt.Errorf("buckets: %d bytes, want %d or none", len(raw), want)
	}
	for i := range d.buckets {
		copy(d.buckets[i][:], raw[i*len(Sum{}):])
		d.whole.toggle(d.buckets[i])
	}
	return d, nil
}

// Set is some of the buckets.
type Set [Buckets / 8]byte

// Differing are the buckets in which two digests differ.
func (d *Digest) Differing(other *Digest) (out Set, any bool) {
	for i := range d.buckets {
		if d.buckets[i] != other.buckets[i] {
			out[i/8] |= 1 << (i % 8)
			any = true
		}
	}
	return out, any
}

// All is every bucket.
func All() (out Set) {
	for i := range out {
		out[i] = 0xff
	}
	return out
}

// Has says whether a bucket is one of them.
func (s *Set) Has(bucket int) bool { return s[bucket/8]&(1<<(bucket%8)) != 0 }

// SetOf reads NetworkBatch.list.
func SetOf(raw []byte) (out Set, err error) {
	if len(raw) != len(out) {
		return out, fmt.Errorf("list: %d bytes, want %d", len(raw), len(out))
	}
	copy(out[:], raw)
	return out, nil
}

// OfPolicies says whether items of a kind change together, with a revision.
func OfPolicies(kind pb.NetworkKind) bool {
	switch kind {
	case pb.NetworkKind_NETWORK_KIND_POLICY, pb.NetworkKind_NETWORK_KIND_GROUP, pb.NetworkKind_NETWORK_KIND_POD:
		return true
	}
	return false
}

// GroupOf is the group that a part's name is of, "" when it is no part's name.
func GroupOf(part string) string { return part[:max(strings.LastIndexByte(part, '.'), 0)] }

// Object is a decoded item.
type Object struct {
	Key     Key
	Node    *pb.NodeRoute
	Service *corev1.Service
	Slice   *discoveryv1.EndpointSlice
	Policy  *pb.NetworkPolicyItem
	Group   *pb.NetworkGroup
	Pod     *pb.NetworkPod
	Address *pb.AddressHolder
}

// Decode reads an item. What it does not know is refused: it was not asked for.
func Decode(item *pb.NetworkItem) (o Object, err error) {
	raw := item.GetObject()
	o.Key.Kind = item.GetKind()
	clusterWide := o.Key.Kind == pb.NetworkKind_NETWORK_KIND_NODE
	switch o.Key.Kind {
	case pb.NetworkKind_NETWORK_KIND_NODE:
		o.Node = &pb.NodeRoute{}
		if err = proto.Unmarshal(raw, o.Node); err == nil {
			o.Key.Name = o.Node.GetNodeName()
		}
	case pb.NetworkKind_NETWORK_KIND_SERVICE:
		o.Service = &corev1.Service{}
		if err = o.Service.Unmarshal(raw); err == nil {
			o.Key.Namespace, o.Key.Name = o.Service.Namespace, o.Service.Name
		}
	case pb.NetworkKind_NETWORK_KIND_SLICE:
		o.Slice = &discoveryv1.EndpointSlice{}
		if err = o.Slice.Unmarshal(raw); err == nil {
			o.Key.Namespace, o.Key.Name = o.Slice.Namespace, o.Slice.Name
		}
	case pb.NetworkKind_NETWORK_KIND_POLICY:
		o.Policy = &pb.NetworkPolicyItem{}
		if err = proto.Unmarshal(raw, o.Policy); err == nil {
			o.Key.Namespace, o.Key.Name = o.Policy.GetNamespace(), o.Policy.GetName()
			clusterWide = o.Policy.GetTier() != pb.NetworkPolicyItem_NAMESPACE
		}
	case pb.NetworkKind_NETWORK_KIND_GROUP:
		o.Group, clusterWide = &pb.NetworkGroup{}, true
		if err = proto.Unmarshal(raw, o.Group); err == nil {
			o.Key.Name = o.Group.GetName()
			err = checkGroup(o.Group)
		}
	case pb.NetworkKind_NETWORK_KIND_POD:
		o.Pod = &pb.NetworkPod{}
		if err = proto.Unmarshal(raw, o.Pod); err == nil {
			o.Key.Namespace, o.Key.Name = o.Pod.GetNamespace(), o.Pod.GetName()
		}
	case pb.NetworkKind_NETWORK_KIND_ADDRESS:
		o.Address, clusterWide = &pb.AddressHolder{}, true
		if err = proto.Unmarshal(raw, o.Address); err == nil {
			o.Key.Name = o.Address.GetAddress()
			if ip, wrong := netip.ParseAddr(o.Key.Name); wrong != nil || ip.Zone() != "" || ip.String() != o.Key.Name {
				err = fmt.Errorf("%q is not an address", o.Key.Name)
			}
		}
	default:
		err = fmt.Errorf("unknown kind %d", item.GetKind())
	}
	switch {
	case err != nil:
		return Object{}, fmt.Errorf("decode a network item: %w", err)
	case !plain(o.Key.Name) || clusterWide != (o.Key.Namespace == "") || !clusterWide && !plain(o.Key.Namespace):
		return Object{}, fmt.Errorf("decode a network item: %q is no name of an object", o.Key.String())
	}
	return o, nil
}

// checkGroup says what of a part of a group cannot be.
func checkGroup(g *pb.NetworkGroup) error {
	if of := g.GetOf(); of == "" || GroupOf(g.GetName()) != of {
		return fmt.Errorf("%q is no part of group %q", g.GetName(), of)
	}
	if len(g.GetV4())%4 != 0 || len(g.GetV6())%16 != 0 {
		return fmt.Errorf("group %q has %d bytes of IPv4 and %d of IPv6 addresses", g.GetName(), len(g.GetV4()), len(g.GetV6()))
	}
	for _, t := range g.GetTargets() {
		if n := len(t.GetAddress()); n != 4 && n != 16 || t.GetPort() == 0 || t.GetPort() > 65535 {
			return fmt.Errorf("group %q has a target %x:%d", g.GetName(), t.GetAddress(), t.GetPort())
		}
	}
	return nil
}

// plain says whether a name is one that the API gives.
func plain(name string) bool {
	if name == "" || len(name) > 253 {
		return false
	}
	for i := range len(name) {
		if c := name[i]; c <= ' ' || c == '/' || c >= 0x7f {
			return false
		}
	}
	return true
}
