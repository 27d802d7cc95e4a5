package sched

import (
	"context"
	"encoding/json"
	"errors"
	"testing"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	policyv1 "k8s.io/api/policy/v1"
	storagev1 "k8s.io/api/storage/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/kubernetes/scheme"

	"timonel/state"
	"timonel/state/objects"
)

// store is a state machine whose objects a cache follows.
type store struct {
	*state.Store
	cache *objects.Cache
}

func newStore(t *testing.T) *store {
	t.Helper()
	s := &store{Store: state.New(state.Options{})}
	s.cache = objects.NewCache(s.Store)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.cache.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; !errors.Is(err, context.Canceled) {
			t.Errorf("cache: %v", err)
		}
	})
	return s
}

var storagePlaces = map[string]string{
	"Node": "minions/", "Pod": "pods/", "ReplicaSet": "replicasets/", "Namespace": "namespaces/", "Service": "services/specs/",
	"StatefulSet": "statefulsets/", "ReplicationController": "controllers/", "PersistentVolumeClaim": "persistentvolumeclaims/",
	"PersistentVolume": "persistentvolumes/", "StorageClass": "storageclasses/", "CSINode": "csinodes/", "CSIDriver": "csidrivers/",
	"PodDisruptionBudget": "poddisruptionbudgets/", "CSIStorageCapacity": "csistoragecapacities/", "VolumeAttachment": "volumeattachments/",
}

// put stores objects as the API server does and waits for the cache.
func (s *store) put(t *testing.T, list ...runtime.Object) {
	t.Helper()
	var txn state.Txn
	for _, o := range list {
		kinds, _, err := scheme.Scheme.ObjectKinds(o)
		if err != nil {
			t.Fatal(err)
		}
		o = o.DeepCopyObject()
		o.GetObjectKind().SetGroupVersionKind(kinds[0])
		value, err := json.Marshal(o)
		if err != nil {
			t.Fatal(err)
		}
		m := o.(metav1.Object)
		key := objects.DefaultPrefix + storagePlaces[kinds[0].Kind]
		if m.GetNamespace() != "" {
			key += m.GetNamespace() + "/"
		}
		txn.Changes = append(txn.Changes, state.Change{Key: key + m.GetName(), Value: value})
	}
	s.apply(t, txn)
}

func (s *store) apply(t *testing.T, txn state.Txn) {
	t.Helper()
	r := s.ApplyBatch([]state.Entry{{Command: txn.Marshal()}})[0]
	if r.Err != nil {
		t.Fatal(r.Err)
	}
	if err := s.cache.WaitRevision(t.Context(), r.Revision); err != nil {
		t.Fatal(err)
	}
}

// TestPlannerFollowsTheStore plans from a real store through its cache.
func TestPlannerFollowsTheStore(t *testing.T) {
	t.Parallel()
	s := newStore(t)
	p, err := NewPlanner(DefaultConfig())
	if err != nil {
		t.Fatal(err)
	}
	if p.Len() != 0 {
		t.Error("pods pending before anything was followed")
	}
	revision := int64(0)
	plan := func() Plan {
		t.Helper()
		changes, err := s.cache.Changes(t.Context(), revision)
		if err != nil {
			t.Fatal(err)
		}
		revision = changes.Snapshot.Revision()
		p.Follow(changes, epoch)
		plan, err := p.Plan(epoch, 1, nil)
		if err != nil {
			t.Fatal(err)
		}
		anew, err := Schedule(DefaultConfig(), Input{Now: epoch, Seed: 1, Snapshot: changes.Snapshot})
		if err != nil || describePlan(anew) != describePlan(plan) {
			t.Fatalf("planner:\n%s\nbuilt anew (%v):\n%s", describePlan(plan), err, describePlan(anew))
		}
		return plan
	}

	pod := simplePod("web-1", "cpu", "3")
	s.put(t, pod)
	if got := describePlan(plan()); got != "Unschedulable web-1: no nodes available to schedule pods\n" {
		t.Errorf("without nodes: %s", got)
	}
	s.put(t, makeNode("a1"))
	got := plan()
	if len(got.Bindings) != 1 || p.Len() != 1 {
		t.Fatalf("with a node: %s%d pending", describePlan(got), p.Len())
	}
	bound := got.Bindings[0].Pod.DeepCopy()
	bound.Spec.NodeName = "a1"
	s.put(t, bound, simplePod("web-2", "cpu", "3"))
	checkFailure(t, plan(), "1 Insufficient cpu")
	s.apply(t, state.Txn{Changes: []state.Change{{Key: objects.DefaultPrefix + "pods/default/web-1", Delete: true}}})
	if got := plan(); len(got.Bindings) != 1 || got.Bindings[0].Pod.Name != "web-2" {
		t.Errorf("after web-1 went: %s", describePlan(got))
	}
	s.apply(t, state.Txn{Changes: []state.Change{{Key: objects.DefaultPrefix + "minions/a1", Delete: true}}})
	if got := plan(); len(got.Failures) != 1 {
		t.Errorf("after the node went: %s", describePlan(got))
	}
}

// TestFromObjects reads back one object of each kind.
func TestFromObjects(t *testing.T) {
	t.Parallel()
	s := newStore(t)
	in := metav1.ObjectMeta{Namespace: "default", Name: "o"}
	at := metav1.ObjectMeta{Name: "o"}
	s.put(t,
		&corev1.Node{ObjectMeta: at}, &corev1.Pod{ObjectMeta: in}, &corev1.Namespace{ObjectMeta: at}, &corev1.Service{ObjectMeta: in},
		&appsv1.ReplicaSet{ObjectMeta: in}, &appsv1.StatefulSet{ObjectMeta: in}, &corev1.ReplicationController{ObjectMeta: in},
		&corev1.PersistentVolumeClaim{ObjectMeta: in}, &corev1.PersistentVolume{ObjectMeta: at}, &storagev1.StorageClass{ObjectMeta: at},
		&storagev1.CSINode{ObjectMeta: at}, &storagev1.CSIDriver{ObjectMeta: at}, &policyv1.PodDisruptionBudget{ObjectMeta: in},
		&storagev1.CSIStorageCapacity{ObjectMeta: in}, &storagev1.VolumeAttachment{ObjectMeta: at},
	)
	st := FromObjects(s.cache.Snapshot())
	found := map[string]bool{}
	_, found["Node"] = st.Node("o")
	_, found["Pod"] = st.Pod("default", "o")
	_, found["Namespace"] = st.Namespace("o")
	_, found["ReplicaSet"] = st.ReplicaSet("default", "o")
	_, found["StatefulSet"] = st.StatefulSet("default", "o")
	_, found["ReplicationController"] = st.ReplicationController("default", "o")
	_, found["PersistentVolumeClaim"] = st.PersistentVolumeClaim("default", "o")
	_, found["PersistentVolume"] = st.PersistentVolume("o")
	_, found["StorageClass"] = st.StorageClass("o")
	_, found["CSINode"] = st.CSINode("o")
	_, found["CSIDriver"] = st.CSIDriver("o")
	for range st.ServicesIn("default") {
		found["Service"] = true
	}
	for range st.CSIStorageCapacities() {
		found["CSIStorageCapacity"] = true
	}
	for range st.VolumeAttachments() {
		found["VolumeAttachment"] = true
	}
	for range st.PodDisruptionBudgets() {
		found["PodDisruptionBudget"] = true
	}
	for kind := range storagePlaces {
		if !found[kind] {
			t.Errorf("%s not found", kind)
		}
	}
}

// TestExplain asks why, node by node.
func TestExplain(t *testing.T) {
	t.Parallel()
	small := makeNode("small")
	small.Status.Allocatable[corev1.ResourceCPU] = requests("cpu", "1")["cpu"]
	in := Input{State: newState(makeNode("a"), makeNode("b"), small, running("r", "b", "cpu", "1"), simplePod("p", "cpu", "2"), claimPod("c", "absent"))}
	verdicts, err := Explain(DefaultConfig(), in, "default", "p")
	if err != nil || len(verdicts) != 3 {
		t.Fatal(verdicts, err)
	}
	if a, b, s := verdicts[0], verdicts[1], verdicts[2]; a.Score <= b.Score || a.Scores["Fit"] == 0 || len(s.Reasons) != 1 || s.Reasons[0] != "Insufficient cpu" {
		t.Errorf("%+v", verdicts)
	}
	for name, want := range map[string]string{
		"r": "pod default/r is on node b already",
		"x": "pod default/x does not exist or is finished",
		"c": `no node fits: persistentvolumeclaim "absent" not found`,
	} {
		if _, err := Explain(DefaultConfig(), in, "default", name); err == nil || err.Error() != want {
			t.Errorf("%s: %v; want %s", name, err, want)
		}
	}
}
