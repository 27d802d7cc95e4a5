package feed

import (
	"iter"

	"timonel/network/feed/wire"
	pb "timonel/proto/timonel/v1"
)

// What a View has of policies is whole: each policy that a pod names is there, and each
// group that a policy names, with all its parts, as the controllers had it at the
// revision Told.

// Told is the revision of the cluster's state as of which the view's policies are; 0 when
// no controller has told of any.
func (v *View) Told() int64 { return v.told }

// Pod says which policies hold for a pod of this node, nil when there are none.
func (v *View) Pod(n Name) *pb.NetworkPod {
	p, _ := v.pods.Get(n.key())
	return p
}

// Pods are those of this node for which a policy holds, in the order of their names.
func (v *View) Pods() iter.Seq[*pb.NetworkPod] {
	return func(yield func(*pb.NetworkPod) bool) {
		v.pods.Scan(func(_ string, p *pb.NetworkPod) bool { return yield(p) })
	}
}

// Policy returns a policy that holds for a pod of this node, nil when there is none of that
// name. The namespace of the cluster's is empty.
func (v *View) Policy(namespace, name string) *pb.NetworkPolicyItem {
	p, _ := v.policies.Get(Name{namespace, name}.key())
	return p
}

// Policies are all of them, in the order of their names, the cluster's first.
func (v *View) Policies() iter.Seq[*pb.NetworkPolicyItem] {
	return func(yield func(*pb.NetworkPolicyItem) bool) {
		v.policies.Scan(func(_ string, p *pb.NetworkPolicyItem) bool { return yield(p) })
	}
}

// Group returns the parts of a group that a rule names, in an order of their own, and
// whether there is such a group: one with nobody in it has an empty part.
func (v *View) Group(name string) (parts []*pb.NetworkGroup, ok bool) {
	v.groups.Ascend(name+".", func(part string, g *pb.NetworkGroup) bool {
		if wire.GroupOf(part) != name {
			return false
		}
		parts = append(parts, g)
		return true
	})
	return parts, len(parts) > 0
}

// SetPolicy puts a policy, which is the store's from now on.
func (t *Txn) SetPolicy(p *pb.NetworkPolicyItem) {
	name := Name{p.GetNamespace(), p.GetName()}
	t.view.policies.Set(name.key(), p)
	t.touch(policyChanged, name)
}

// RemovePolicy removes a policy if it is there.
func (t *Txn) RemovePolicy(name Name) {
	if _, ok := t.view.policies.Delete(name.key()); ok {
		t.touch(policyChanged, name)
	}
}

// SetGroup puts a part of a group, which is the store's from now on.
func (t *Txn) SetGroup(g *pb.NetworkGroup) {
	t.view.groups.Set(g.GetName(), g)
	t.touch(groupChanged, Name{Name: g.GetOf()})
}

// RemoveGroup removes a part of a group, by the part's name, if it is there.
func (t *Txn) RemoveGroup(part string) {
	if g, ok := t.view.groups.Delete(part); ok {
		t.touch(groupChanged, Name{Name: g.GetOf()})
	}
}

// SetPod puts a pod, which is the store's from now on.
func (t *Txn) SetPod(p *pb.NetworkPod) {
	name := Name{p.GetNamespace(), p.GetName()}
	t.view.pods.Set(name.key(), p)
	t.touch(podChanged, name)
}

// RemovePod removes a pod if it is there.
func (t *Txn) RemovePod(name Name) {
	if _, ok := t.view.pods.Delete(name.key()); ok {
		t.touch(podChanged, name)
	}
}

// SetTold says up to which revision of the state the policies are told.
func (t *Txn) SetTold(revision int64) {
	if t.view.told != revision {
		t.view.told, t.changed, t.told = revision, true, true
	}
}
