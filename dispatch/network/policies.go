package network

import (
	"net/netip"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"

	"timonel/dispatch/network/policy"
	"timonel/network/feed/wire"
	pb "timonel/proto/timonel/v1"
	"timonel/state/objects"
)

// policyKinds are those that a node is told of its own pods alone. Who wants one must want
// all: one is nothing without the others.
const policyKinds kindSet = 1<<pb.NetworkKind_NETWORK_KIND_POLICY | 1<<pb.NetworkKind_NETWORK_KIND_GROUP | 1<<pb.NetworkKind_NETWORK_KIND_POD

// applyPolicies takes what changed of policies, of whom they are about, and of pods.
func (f *Feed) applyPolicies(changes objects.Changes) int64 {
	return f.policies.Update(changes.Snapshot.Revision(), func(t *policy.Txn) {
		for _, c := range changes.Changed {
			f.applyClusterPolicy(t, c.Meta(), changes.Snapshot.Prefix(), c.New == nil)
			switch o := c.Meta().Object.(type) {
			case *corev1.Node:
				f.applyNode(t, o, c.New == nil)
			case *corev1.Pod:
				if c.New == nil {
					t.RemovePod(o.Namespace, o.Name)
				} else {
					t.SetPod(o)
				}
			case *corev1.Namespace:
				if c.New == nil {
					t.RemoveNamespace(o.Name)
				} else {
					t.SetNamespace(o)
				}
			case *networkingv1.NetworkPolicy:
				if c.New == nil {
					t.Remove(o.Namespace, o.Name)
				} else {
					t.Set(policy.Compile(o))
				}
			}
		}
	})
}

// applyNode takes what cluster-wide policies say of nodes: by their labels, those addresses
// that are their own.
func (f *Feed) applyNode(t *policy.Txn, o *corev1.Node, gone bool) {
	if gone {
		t.RemoveNode(o.Name)
		return
	}
	var addresses []netip.Addr
	if route, _ := f.routes.Route(o.Name); route.GetNodeAddress() != "" {
		if ip, err := netip.ParseAddr(route.GetNodeAddress()); err == nil {
			addresses = []netip.Addr{ip.Unmap()}
		}
	}
	t.SetNode(o.Name, o.Labels, addresses)
}

// applyClusterPolicy takes a ClusterNetworkPolicy; what is none is left alone.
func (f *Feed) applyClusterPolicy(t *policy.Txn, m *objects.Meta, prefix string, gone bool) {
	name, ok := strings.CutPrefix(m.Key, prefix+policy.ClusterPolicies)
	if !ok {
		return
	}
	if gone {
		t.Remove("", name)
		return
	}
	p, wrong, err := policy.CompileCluster(m.JSON)
	if err != nil {
		f.cfg.Logger.Error("a ClusterNetworkPolicy holds for nobody; is its definition another version than v1alpha2 or v1beta1?", "policy", name, "error", err)
		t.Remove("", name)
		return
	}
	if len(wrong) > 0 {
		f.cfg.Logger.Warn("rules of a ClusterNetworkPolicy cannot be carried out: such a rule accepts nothing, or denies all", "policy", name, "rules", wrong)
	}
	t.Set(p)
}

// reloadPolicies makes all as a snapshot has it.
func (f *Feed) reloadPolicies(s *objects.Snapshot) int64 {
	return f.policies.Update(s.Revision(), func(t *policy.Txn) {
		t.Keep(policy.Keep{
			Pod:       func(n policy.Name) bool { _, ok := s.Pods().Get(n.Namespace, n.Name); return ok },
			Namespace: func(name string) bool { _, ok := s.Namespaces().Get("", name); return ok },
			Node:      func(name string) bool { _, ok := s.Nodes().Get("", name); return ok },
			Policy: func(n policy.Name) bool {
				if n.Namespace == "" {
					_, ok := s.Metas().Get(s.Prefix() + policy.ClusterPolicies + n.Name)
					return ok
				}
				_, ok := s.NetworkPolicies().Get(n.Namespace, n.Name)
				return ok
			},
		})
		for m := range s.Metas().WithPrefix(s.Prefix() + policy.ClusterPolicies) {
			f.applyClusterPolicy(t, m, s.Prefix(), false)
		}
		for o := range s.Nodes().All() {
			f.applyNode(t, o, false)
		}
		for o := range s.Namespaces().All() {
			t.SetNamespace(o)
		}
		for o := range s.NetworkPolicies().All() {
			t.Set(policy.Compile(o))
		}
		for o := range s.Pods().All() {
			t.SetPod(o)
		}
	})
}

// fewPolicies is how many policies of a namespace are looked at for one pod. Where there
// are more, the pod waits for the feed to say.
const fewPolicies = 16

// Holding says of pods of one snapshot whether a policy may hold for them.
type Holding struct {
	s          *objects.Snapshot
	cluster    int64 // revision of the newest of those of the cluster; 0: there is none
	namespaces map[string]holders
}

// holders are the policies of a namespace.
type holders struct {
	newest    int64 // revision
	selectors []labels.Selector
	many      bool // more than selectors has
}

// NewHolding looks at a snapshot, at what of it is asked for.
func NewHolding(s *objects.Snapshot) *Holding {
	h := &Holding{s: s, namespaces: make(map[string]holders)}
	for m := range s.Metas().WithPrefix(s.Prefix() + policy.ClusterPolicies) {
		h.cluster = max(h.cluster, m.Revision)
	}
	return h
}

// Since is a revision up to which a node must have been told of policies before it can know
// that none holds for a pod; 0 when none does.
func (h *Holding) Since(pod *corev1.Pod) int64 {
	if pod.Spec.HostNetwork {
		return 0
	}
	in, ok := h.namespaces[pod.Namespace]
	if !ok {
		in = h.look(pod.Namespace)
		h.namespaces[pod.Namespace] = in
	}
	if in.many || slices.ContainsFunc(in.selectors, func(s labels.Selector) bool { return s.Matches(labels.Set(pod.Labels)) }) {
		return max(in.newest, h.cluster, objects.Revision(pod))
	}
	return 0
}

func (h *Holding) look(namespace string) (in holders) {
	in.many = h.cluster > 0 // which of those select is for the feed to say
	if ns, ok := h.s.Namespaces().Get("", namespace); ok && in.many {
		in.newest = objects.Revision(ns)
	}
	for o := range h.s.NetworkPolicies().InNamespace(namespace) {
		in.newest = max(in.newest, objects.Revision(o))
		selector, err := metav1.LabelSelectorAsSelector(&o.Spec.PodSelector)
		if err != nil || len(in.selectors) == fewPolicies {
			in.many = true
			continue
		}
		in.selectors = append(in.selectors, selector)
	}
	return in
}

// Want says that a node waits to be told of policies up to a revision, even if nothing
// changes for it.
func (f *Feed) Want(node string, revision int64) { f.policies.Want(node, revision) }

// follow makes the stream tell of the node's policies, if the agent wants all kinds that
// this takes.
func (s *stream) follow() error {
	switch wants := s.kinds&policyKinds == policyKinds; {
	case wants == (s.policies != nil):
		return nil
	case !wants:
		s.policies.Close()
		s.policies = nil
		return nil
	}
	// Following ends what an older stream of the node follows, so no older one may.
	s.f.mu.Lock()
	defer s.f.mu.Unlock()
	if s.f.streams[s.node] != s {
		return errNewer
	}
	s.policies = s.f.policies.Follow(s.node)
	return nil
}

// moved has a value when there is something of policies to tell.
func (s *stream) moved() <-chan struct{} {
	if s.policies == nil {
		return nil
	}
	return s.policies.Moved()
}

// batches are what is told of policies, whole with the last, which says the revision.
func batches(t policy.Told) (out []*pb.NetworkBatch) {
	b, size := &pb.NetworkBatch{}, 0
	next := func(n int) {
		if size > 0 && size+n > wire.MaxBatch {
			out, b, size = append(out, b), &pb.NetworkBatch{}, 0
		}
		size += n
	}
	for _, item := range t.Items {
		next(len(item.GetObject()) + 8)
		b.Set = append(b.Set, item)
	}
	for _, key := range t.Gone {
		next(wire.KeyOf(key).Size())
		b.Remove = append(b.Remove, key)
	}
	b.Revision = t.Revision
	return append(out, b)
}
