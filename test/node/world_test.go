package node

import (
	"fmt"
	"log/slog"
	"maps"
	"math/rand/v2"
	"net/netip"
	"slices"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	"k8s.io/apimachinery/pkg/types"

	"timonel/agent/podnet"
	"timonel/dispatch/network/policy"
	"timonel/dispatch/network/policy/oracle"
	"timonel/network/feed"
	"timonel/network/feed/wire"
	"timonel/network/netlab"
	pb "timonel/proto/timonel/v1"
)

// world is a cluster that changes at random: after so many steps of a seed it is the same for
// all who look.
type world struct {
	*oracle.World
	dice  oracle.Dice
	fold  *policy.Fold
	told  *policy.Follower
	pods  map[slot]*corev1.Pod
	peers map[string]podnet.Peer
	names []netip.Addr
	steps int64
}

// slot is where a pod may be: the number of its node and its own.
type slot struct{ node, n int }

// slots are those of the node that is tested, n1, and of another.
var slots = []slot{{1, 2}, {1, 3}, {1, 4}, {1, 5}, {2, 2}, {2, 3}, {2, 4}}

func (s slot) addresses() []netip.Addr {
	return []netip.Addr{netip.AddrFrom4([4]byte{10, 244, byte(s.node), byte(s.n)}), netip.AddrFrom16([16]byte{0: 0xfd, 3: byte(s.node), 15: byte(s.n)})}
}

func newWorld(seed uint64) *world {
	w := &world{
		World: oracle.NewWorld(),
		dice: oracle.Dice{Rand: rand.New(rand.NewPCG(seed, 0)), Blocks: []networkingv1.IPBlock{
			{CIDR: "10.244.1.0/29", Except: []string{"10.244.1.2/31"}}, {CIDR: "10.244.2.0/30"}, {CIDR: "fd00:1::/126"}, {CIDR: "0.0.0.0/0", Except: []string{"10.244.2.0/24"}},
		}},
		fold: policy.New(policy.Config{Bytes: 64 << 20, Logger: slog.New(slog.DiscardHandler)}),
		pods: map[slot]*corev1.Pod{}, peers: map[string]podnet.Peer{},
	}
	w.peers["n2"] = podnet.Peer{Name: "n2", Addresses: []string{"198.51.100.2", "2001:db8:2::2"}, CIDRs: []string{"10.244.2.0/24", "fd00:2::/64"}}
	w.told = w.fold.Follow("n1")
	w.told.List(func(*wire.Digest) wire.Set { return wire.All() })
	w.fold.Update(0, func(t *policy.Txn) {
		for _, name := range []string{"x", "y"} {
			w.namespace(t, name)
		}
		for _, s := range slots {
			w.pod(t, s)
		}
	})
	return w
}

func (w *world) namespace(t *policy.Txn, name string) {
	w.Namespaces[name] = oracle.NamespaceObject(name, w.dice.Labels())
	t.SetNamespace(w.Namespaces[name])
}

// pod makes a pod in the place of the one that was there, or of none.
func (w *world) pod(t *policy.Txn, at slot) {
	namespace, name := oracle.Pick(w.dice, "x", "y"), fmt.Sprintf("pod-%d-%d", at.node, at.n)
	p := oracle.PodObject(namespace, name, fmt.Sprint("n", at.node), w.dice.Labels())
	if w.dice.IntN(2) == 0 {
		for i := range p.Spec.Containers[0].Ports {
			p.Spec.Containers[0].Ports[i].HostPort = int32(8000 + at.n)
			p.Spec.Containers[0].Ports[i].HostIP = oracle.Pick(w.dice, "", "127.0.0.1", netlab.NodeIP, netlab.NodeIP6)
		}
	}
	p.UID, p.Status.Phase = types.UID(fmt.Sprint(name, "-", w.steps)), corev1.PodRunning
	for _, ip := range at.addresses() {
		p.Status.PodIPs = append(p.Status.PodIPs, corev1.PodIP{IP: ip.String()})
	}
	w.pods[at] = p
	w.Pods[types.NamespacedName{Namespace: namespace, Name: name}] = p
	t.SetPod(p)
}

func (w *world) removePod(t *policy.Txn, at slot) {
	if p := w.pods[at]; p != nil {
		delete(w.pods, at)
		delete(w.Pods, types.NamespacedName{Namespace: p.Namespace, Name: p.Name})
		t.RemovePod(p.Namespace, p.Name)
	}
}

// step changes something, and puts into a store what a node is told of it.
func (w *world) step(to *feed.Txn) {
	w.steps++
	for range w.dice.IntN(4) {
		netlab.RandomService(w.dice.Rand, to)
	}
	w.fold.Update(w.steps, func(t *policy.Txn) {
		namespace, name := oracle.Pick(w.dice, "x", "y"), fmt.Sprint("np", w.dice.IntN(3))
		at := oracle.Pick(w.dice, slots...)
		switch w.dice.IntN(8) {
		case 0:
			w.namespace(t, namespace)
		case 1:
			w.removePod(t, at)
		case 2, 3:
			w.removePod(t, at)
			w.pod(t, at)
		case 4:
			delete(w.Policies, types.NamespacedName{Namespace: namespace, Name: name})
			t.Remove(namespace, name)
		default:
			p := w.dice.Policy(namespace, name)
			w.Policies[types.NamespacedName{Namespace: namespace, Name: name}] = p
			t.Set(policy.Compile(p))
		}
	})
	switch w.dice.IntN(8) {
	case 0:
		p := podnet.Peer{Name: fmt.Sprint("p", w.dice.IntN(2)), Addresses: []string{oracle.Pick(w.dice, "198.51.100.3", "198.51.100.4", "203.0.113.200", "192.0.2.77")}}
		p.CIDRs = []string{oracle.Pick(w.dice, "10.244.3.0/24", "10.244.4.0/24", "fd00:3::/64", "10.244.2.0/25")}
		w.peers[p.Name] = p
	case 1:
		delete(w.peers, fmt.Sprint("p", w.dice.IntN(2)))
	case 2:
		w.names = []netip.Addr{netip.MustParseAddr("10.96.0.10"), netip.MustParseAddr("fd96::a")}[:w.dice.IntN(3)]
	case 3:
		ip := oracle.Pick(w.dice, "192.0.2.64", "192.0.2.65")
		if w.dice.IntN(3) == 0 {
			to.RemoveAddress(ip)
		} else {
			to.SetAddress(&pb.AddressHolder{Address: ip, NodeName: oracle.Pick(w.dice, "n1", "n2", ""), Number: uint64(w.steps)})
		}
	}
	w.tell(to)
}

// tell puts into a store what has changed of policies.
func (w *world) tell(to *feed.Txn) {
	told, ok := w.told.Take()
	if !ok {
		return
	}
	for _, item := range told.Items {
		o, err := wire.Decode(item)
		switch {
		case err != nil:
			panic(err)
		case o.Policy != nil:
			to.SetPolicy(o.Policy)
		case o.Group != nil:
			to.SetGroup(o.Group)
		case o.Pod != nil:
			to.SetPod(o.Pod)
		}
	}
	for _, k := range told.Gone {
		switch key := wire.KeyOf(k); key.Kind {
		case pb.NetworkKind_NETWORK_KIND_POLICY:
			to.RemovePolicy(feed.Name{Namespace: key.Namespace, Name: key.Name})
		case pb.NetworkKind_NETWORK_KIND_GROUP:
			to.RemoveGroup(key.Name)
		case pb.NetworkKind_NETWORK_KIND_POD:
			to.RemovePod(feed.Name{Namespace: key.Namespace, Name: key.Name})
		}
	}
	to.SetTold(told.Revision)
}

// others are the other nodes.
func (w *world) others() (out []podnet.Peer) {
	for _, name := range slices.Sorted(maps.Keys(w.peers)) {
		out = append(out, w.peers[name])
	}
	return out
}

// may says whether policies let a pod talk to another.
func (w *world) may(from, to slot, family int, protocol corev1.Protocol, port uint16) bool {
	a, b := w.pods[from], w.pods[to]
	return from == to ||
		(from.node != 1 || w.Allowed(a, false, to.addresses()[family], protocol, port)) &&
			(to.node != 1 || w.Allowed(b, true, from.addresses()[family], protocol, port))
}
