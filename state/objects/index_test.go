package objects

import (
	"fmt"
	"maps"
	"slices"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"pgregory.net/rapid"

	"timonel/state"
)

// drawObject draws an object that is in some of the indexes.
func drawObject(t *rapid.T) (key string, o runtime.Object) {
	labels := map[string]string{}
	for _, k := range []string{"app", "tier"} {
		if v := rapid.SampledFrom([]string{"", "x", "y"}).Draw(t, k); v != "" {
			labels[k] = v
		}
	}
	namespace := rapid.SampledFrom([]string{"a", "ab"}).Draw(t, "namespace")
	name := fmt.Sprintf("o%d", rapid.IntRange(0, 3).Draw(t, "name"))
	meta := metav1.ObjectMeta{Namespace: namespace, Name: name, UID: types.UID(rapid.SampledFrom([]string{"u1", "u2"}).Draw(t, "uid") + namespace + name), Labels: labels}
	switch rapid.IntRange(0, 3).Draw(t, "kind") {
	case 3:
		svc := &corev1.Service{TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "Service"}, ObjectMeta: meta}
		svc.UID = types.UID("service" + namespace + name)
		svc.Spec.Type = rapid.SampledFrom([]corev1.ServiceType{corev1.ServiceTypeClusterIP, corev1.ServiceTypeLoadBalancer}).Draw(t, "type")
		return DefaultPrefix + "services/specs/" + namespace + "/" + name, svc
	case 0:
		meta.Namespace, meta.UID = "", types.UID("node"+name)
		n := &corev1.Node{TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "Node"}, ObjectMeta: meta}
		if s := rapid.SampledFrom([]corev1.ConditionStatus{"", corev1.ConditionTrue, corev1.ConditionFalse}).Draw(t, "ready"); s != "" {
			n.Status.Conditions = []corev1.NodeCondition{{Type: corev1.NodeReady, Status: s}}
		}
		for _, k := range []string{corev1.LabelTopologyZone, corev1.LabelTopologyRegion} {
			if v := rapid.SampledFrom([]string{"", "z", "zz"}).Draw(t, k); v != "" {
				n.Labels[k] = v
			}
		}
		return DefaultPrefix + "minions/" + name, n
	}
	p := &corev1.Pod{TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "Pod"}, ObjectMeta: meta}
	p.Spec.NodeName = rapid.SampledFrom([]string{"", "o1", "o2"}).Draw(t, "node")
	p.Status.Phase = rapid.SampledFrom([]corev1.PodPhase{corev1.PodRunning, corev1.PodFailed, corev1.PodSucceeded}).Draw(t, "phase")
	if rapid.Bool().Draw(t, "deleting") {
		p.DeletionTimestamp = &metav1.Time{}
	}
	if rapid.Bool().Draw(t, "owned") {
		controller := rapid.Bool().Draw(t, "controlled")
		p.OwnerReferences = []metav1.OwnerReference{{UID: "rs", Controller: &controller}}
	}
	return podKey(namespace, name), p
}

// told is what a snapshot's indexes say, by question.
func told(s *Snapshot) map[string][]string {
	out := map[string][]string{}
	for _, ns := range []string{"a", "ab"} {
		for p := range s.OrphanPods(ns) {
			out["orphans "+ns] = append(out["orphans "+ns], p.Name)
		}
	}
	for p := range s.EndedPods() {
		out["ended"] = append(out["ended"], p.Namespace+p.Name)
	}
	for svc := range s.LoadBalancers() {
		out["balancers"] = append(out["balancers"], svc.Namespace+svc.Name)
	}
	for n := range s.UnreadyNodes() {
		out["unready"] = append(out["unready"], n.Name)
	}
	slices.Sort(out["unready"])
	for _, region := range []string{"", "z", "zz"} {
		for _, zone := range []string{"", "z", "zz"} {
			of := Zone(&corev1.Node{ObjectMeta: metav1.ObjectMeta{Labels: map[string]string{corev1.LabelTopologyZone: zone, corev1.LabelTopologyRegion: region}}})
			for n := range s.NodesInZone(of) {
				out["zone "+of] = append(out["zone "+of], n.Name)
			}
			if n := s.NodesInZoneLen(of); n != len(out["zone "+of]) {
				out["zone "+of] = append(out["zone "+of], fmt.Sprintf("counted as %d", n))
			}
			for n := range s.UnreadyNodesInZone(of) {
				out["unready in "+of] = append(out["unready in "+of], n.Name)
			}
		}
	}
	for uid := range map[types.UID]bool{"rs": true} {
		for m := range s.OwnedBy(uid) {
			out["owned"] = append(out["owned"], m.Key)
		}
	}
	maps.DeleteFunc(out, func(_ string, v []string) bool { return len(v) == 0 })
	return out
}

// looked is what looking at every object says.
func looked(s *Snapshot) map[string][]string {
	out := map[string][]string{}
	add := func(question, answer string) { out[question] = append(out[question], answer) }
	for p := range s.Pods().All() {
		if metav1.GetControllerOf(p) == nil {
			add("orphans "+p.Namespace, p.Name)
		}
		if p.DeletionTimestamp == nil && p.Status.Phase != corev1.PodRunning {
			add("ended", p.Namespace+p.Name)
		}
		if len(p.OwnerReferences) > 0 {
			add("owned", podKey(p.Namespace, p.Name))
		}
	}
	for svc := range s.Services().All() {
		if svc.Spec.Type == corev1.ServiceTypeLoadBalancer {
			add("balancers", svc.Namespace+svc.Name)
		}
	}
	for n := range s.Nodes().All() {
		add("zone "+Zone(n), n.Name)
		if len(n.Status.Conditions) == 0 || n.Status.Conditions[0].Status != corev1.ConditionTrue {
			add("unready", n.Name)
			add("unready in "+Zone(n), n.Name)
		}
	}
	return out
}

// TestIndexesEqualLookingAtEverything checks that, whatever changes come, the indexes of
// a snapshot say what looking at every object says, and what those of a cache say that
// is filled anew; and that an older snapshot goes on saying what it said.
func TestIndexesEqualLookingAtEverything(t *testing.T) {
	t.Parallel()
	tb := t
	rapid.Check(t, func(t *rapid.T) {
		c := NewCache(state.New(state.Options{}))
		var old *Snapshot
		var was map[string][]string
		for i := range rapid.IntRange(1, 30).Draw(t, "changes") {
			key, o := drawObject(t)
			kv := &state.KV{Key: key, ModRevision: int64(i + 1), Value: encode(tb, o)}
			c.apply(key, kv, rapid.IntRange(0, 3).Draw(t, "deleted") == 0)
			if old == nil && rapid.Bool().Draw(t, "keep") {
				old = c.freeze(int64(i + 1))
				was = told(old)
			}
		}
		s := c.freeze(100)
		got, want := told(s), looked(s)
		if fmt.Sprint(got) != fmt.Sprint(want) {
			t.Fatalf("the indexes say\n%v\nand looking at everything\n%v", got, want)
		}
		anew := NewCache(state.New(state.Options{}))
		for m := range s.Metas().All() {
			anew.apply(m.Key, &state.KV{Key: m.Key, ModRevision: m.Revision, Value: encode(tb, m.Object)}, false)
		}
		fresh := anew.freeze(100)
		if again := told(fresh); fmt.Sprint(again) != fmt.Sprint(got) {
			t.Fatalf("followed:\n%v\nbuilt anew:\n%v", got, again)
		}
		if old != nil && fmt.Sprint(told(old)) != fmt.Sprint(was) {
			t.Fatal("an older snapshot has changed")
		}
	})
}
