package policy

import (
	"fmt"
	"log/slog"
	"maps"
	"net/netip"
	"slices"
	"testing"

	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"

	"timonel/dispatch/network/policy/oracle"
	"timonel/network/feed/wire"
	pb "timonel/proto/timonel/v1"
)

var quiet = slog.New(slog.DiscardHandler)

func newFold() *Fold { return New(Config{Bytes: 64 << 20, Logger: quiet}) }

// fill puts all of a world into a fold.
func fill(w *oracle.World, f *Fold, revision int64) {
	f.Update(revision, func(t *Txn) {
		for _, p := range w.Pods {
			t.SetPod(p)
		}
		for _, p := range w.Policies {
			t.Set(Compile(p))
		}
		for _, n := range w.Namespaces {
			t.SetNamespace(n)
		}
	})
}

// node is what a node knows, told as it changes.
type node struct {
	t     testing.TB
	l     *Follower
	items map[wire.Key][]byte
	sum   wire.Sum
	told  int64
}

func follow(t testing.TB, f *Fold, name string) *node {
	n := &node{t: t, l: f.Follow(name), items: map[wire.Key][]byte{}}
	n.apply(n.l.List(func(*wire.Digest) wire.Set { return wire.All() }))
	return n
}

func (n *node) apply(told Told) {
	for _, k := range told.Gone {
		delete(n.items, wire.KeyOf(k))
	}
	for _, item := range told.Items {
		o, err := wire.Decode(item)
		require.NoError(n.t, err)
		n.items[o.Key] = item.Object
	}
	var d wire.Digest
	for k, raw := range n.items {
		b, s := wire.SumOf(k, raw)
		d.Toggle(b, s)
	}
	n.sum, n.told = d.Whole(), told.Revision
	require.Equal(n.t, told.Whole, n.sum, "the digest is of something else than what the node has")
}

// take is what changed since the last, in words.
func (n *node) take() (changed []string) {
	told, ok := n.l.Take()
	if !ok {
		return nil
	}
	for _, i := range told.Items {
		o, err := wire.Decode(i)
		require.NoError(n.t, err)
		changed = append(changed, "set "+o.Key.String())
	}
	for _, k := range told.Gone {
		changed = append(changed, "remove "+wire.KeyOf(k).String())
	}
	n.apply(told)
	slices.Sort(changed)
	return changed
}

func get[T any](n *node, key wire.Key, of func(wire.Object) T) (out T) {
	raw, ok := n.items[key]
	if !ok {
		return out
	}
	o, err := wire.Decode(&pb.NetworkItem{Kind: key.Kind, Object: raw})
	require.NoError(n.t, err)
	return of(o)
}

func (n *node) pod(name Name) *pb.NetworkPod {
	return get(n, wire.Key{Kind: pb.NetworkKind_NETWORK_KIND_POD, Namespace: name.Namespace, Name: name.Name}, func(o wire.Object) *pb.NetworkPod { return o.Pod })
}

func (n *node) policy(name Name) *pb.NetworkPolicyItem {
	return get(n, wire.Key{Kind: pb.NetworkKind_NETWORK_KIND_POLICY, Namespace: name.Namespace, Name: name.Name}, func(o wire.Object) *pb.NetworkPolicyItem { return o.Policy })
}

// group is all elements of a group, and fails when there is none.
func (n *node) group(name string) map[element]bool {
	out, parts := map[element]bool{}, 0
	for key := range n.items {
		if key.Kind != pb.NetworkKind_NETWORK_KIND_GROUP || wire.GroupOf(key.Name) != name {
			continue
		}
		parts++
		g := get(n, key, func(o wire.Object) *pb.NetworkGroup { return o.Group })
		for a := range slices.Chunk(g.V4, 4) {
			ip, _ := netip.AddrFromSlice(a)
			out[element{ip: ip}] = true
		}
		for a := range slices.Chunk(g.V6, 16) {
			ip, _ := netip.AddrFromSlice(a)
			out[element{ip: ip}] = true
		}
		for _, t := range g.Targets {
			ip, _ := netip.AddrFromSlice(t.Address)
			out[element{ip, t.Protocol, uint16(t.Port)}] = true
		}
	}
	require.NotZero(n.t, parts, "a rule names a group that the node has not")
	return out
}

// allows is how a node reads what it was told: whether a pod of its own may talk to, or be
// talked to by, an address at a port. own are the pod's ports by name.
func (n *node) allows(name Name, ingress bool, peer netip.Addr, protocol string, port uint16, own map[string]uint16) bool {
	pod := n.pod(name)
	if pod == nil {
		return true
	}
	isolated := false
	for _, r := range pod.Policies {
		p := n.policy(Name{r.Namespace, r.Name})
		require.NotNil(n.t, p, "a pod names a policy that the node has not")
		rules, here := p.Ingress, p.IngressIsolated
		if !ingress {
			rules, here = p.Egress, p.EgressIsolated
		}
		if !here {
			require.Empty(n.t, rules)
			continue
		}
		isolated = true
		for _, r := range rules {
			if n.holds(r, peer, protocol, port, own) {
				return true
			}
		}
	}
	return !isolated
}

func (n *node) holds(r *pb.NetworkRule, peer netip.Addr, protocol string, port uint16, own map[string]uint16) bool {
	for _, g := range r.Targets {
		if n.group(g)[element{peer, protocol, port}] {
			return true
		}
	}
	who := r.AnyPeer
	for _, g := range r.Groups {
		who = who || n.group(g)[element{ip: peer}]
	}
	for _, b := range r.Blocks {
		in := netip.MustParsePrefix(b.Cidr).Contains(peer)
		for _, e := range b.Except {
			in = in && !netip.MustParsePrefix(e).Contains(peer)
		}
		who = who || in
	}
	what := r.AnyPort
	for _, p := range r.Ports {
		switch {
		case p.Protocol != protocol:
		case p.Name != "":
			what = what || own[p.Protocol+" "+p.Name] == port
		case p.First == 0 && p.Last == 0:
			what = true
		default:
			what = what || uint32(port) >= p.First && uint32(port) <= p.Last
		}
	}
	return who && what
}

// check is whether every node allows what the API's words say, and has what it would have
// if all had come at once.
func check(t testing.TB, w *oracle.World, nodes map[string]*node, whole bool) {
	fresh := newFold()
	fill(w, fresh, 1)
	for name, n := range nodes {
		n.take()
		want := follow(t, fresh, name)
		require.Equal(t, slices.Sorted(maps.Keys(text(want.items))), slices.Sorted(maps.Keys(text(n.items))), "node %s", name)
		require.Equal(t, want.sum, n.sum)
	}
	if !whole {
		return
	}
	for _, p := range w.Pods {
		n := nodes[p.Spec.NodeName]
		if n == nil || p.Spec.HostNetwork {
			continue
		}
		own := map[string]uint16{}
		for _, protocol := range []corev1.Protocol{"TCP", "UDP"} {
			for _, port := range []string{"http", "dns"} {
				own[string(protocol)+" "+port] = oracle.Port(p, protocol, port)
			}
		}
		for i := range 8 {
			for _, ip := range []string{fmt.Sprintf("10.0.0.%d", i), fmt.Sprintf("fd00::%x", i)} {
				peer := netip.MustParseAddr(ip)
				for _, port := range []uint16{53, 80, 8081} {
					for _, protocol := range []corev1.Protocol{"TCP", "UDP", "SCTP"} {
						for _, ingress := range []bool{true, false} {
							want, got := w.Allowed(p, ingress, peer, protocol, port), n.allows(Name{p.Namespace, p.Name}, ingress, peer, string(protocol), port, own)
							if want != got {
								t.Fatalf("pod %s/%s, ingress %v, %s, %s %d: the API says %v, what node %s was told says %v", p.Namespace, p.Name, ingress, peer, protocol, port, want, p.Spec.NodeName, got)
							}
						}
					}
				}
			}
		}
	}
}

func text(items map[wire.Key][]byte) map[string]bool {
	out := make(map[string]bool, len(items))
	for k, raw := range items {
		out[fmt.Sprintf("%s %x", k, raw)] = true
	}
	return out
}
