package workload_test

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
	"testing"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
	"pgregory.net/rapid"

	"timonel/reconcile"
	"timonel/reconcile/storytest"
	"timonel/reconcile/workload"
	"timonel/state/objects"
)

// TestStatefulSetKeepsItsPromises lets users edit a StatefulSet and its pods run,
// fail, become unready and vanish, in random interleavings with the reconciler. At
// every moment a pod is created only where none of its name is; an ordered set
// creates one only when those below it serve, and deletes from the top; a rolling
// update leaves what is below the partition, and gives up no more serving pods than
// may be unavailable. In the end all pods are what the set asks for.
func TestStatefulSetKeepsItsPromises(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		w := storytest.NewWorld(t)
		s := storytest.New(w, workload.StatefulSet{})
		s.Shuffle = func(n int) int { return rapid.IntRange(0, n-1).Draw(t, "work") }
		set := statefulSet(t)
		w.Add(set)
		s.Before = func(c reconcile.Request) { keepsPromises(t, w, c) }

		for range 90 {
			switch rapid.IntRange(0, 11).Draw(t, "who") {
			case 0:
				editStatefulSet(t, w)
			case 1:
				disturb(t, w)
			case 2, 3, 4, 5:
				oneStatefulAgent(t, w)
			default:
				s.Step()
			}
		}
		for range 400 {
			for s.Step() {
			}
			if !oneStatefulAgent(t, w) {
				wantSettled(t, w)
				return
			}
		}
		t.Fatalf("no end:\n%s", s.Show(""))
	})
}

func statefulSet(t *rapid.T) *appsv1.StatefulSet {
	replicas, partition, limit := int32(rapid.IntRange(0, 5).Draw(t, "replicas")), int32(rapid.IntRange(0, 3).Draw(t, "partition")), int32(1)
	unavailable := intstr.FromInt32(int32(rapid.IntRange(1, 3).Draw(t, "maxUnavailable")))
	return &appsv1.StatefulSet{
		ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: "web"},
		Spec: appsv1.StatefulSetSpec{
			Replicas: &replicas, RevisionHistoryLimit: &limit, ServiceName: "web",
			PodManagementPolicy: rapid.SampledFrom([]appsv1.PodManagementPolicyType{appsv1.OrderedReadyPodManagement, appsv1.ParallelPodManagement}).Draw(t, "policy"),
			Ordinals:            &appsv1.StatefulSetOrdinals{Start: int32(rapid.IntRange(0, 2).Draw(t, "start"))},
			Selector:            &metav1.LabelSelector{MatchLabels: web},
			UpdateStrategy: appsv1.StatefulSetUpdateStrategy{
				Type:          appsv1.RollingUpdateStatefulSetStrategyType,
				RollingUpdate: &appsv1.RollingUpdateStatefulSetStrategy{Partition: &partition, MaxUnavailable: &unavailable},
			},
			Template: corev1.PodTemplateSpec{
				ObjectMeta: metav1.ObjectMeta{Labels: web},
				Spec:       corev1.PodSpec{Containers: []corev1.Container{{Name: "c", Image: "v1"}}},
			},
		},
	}
}

func theSet(w *storytest.World) *appsv1.StatefulSet {
	set, _ := w.Snapshot().StatefulSets().Get("default", "web")
	return set
}

// editStatefulSet changes the template, the number of replicas or the partition.
func editStatefulSet(t *rapid.T, w *storytest.World) {
	spec := map[string]any{}
	switch rapid.IntRange(0, 2).Draw(t, "edit") {
	case 0:
		spec["template"] = map[string]any{"spec": map[string]any{"containers": []any{map[string]any{
			"name": "c", "image": fmt.Sprintf("v%d", rapid.IntRange(1, 3).Draw(t, "image")), "resources": map[string]any{},
		}}}}
	case 1:
		spec["replicas"] = rapid.Int64Range(0, 5).Draw(t, "replicas")
	case 2:
		spec["updateStrategy"] = map[string]any{"rollingUpdate": map[string]any{"partition": rapid.Int64Range(0, 3).Draw(t, "partition")}}
	}
	w.Edit(reconcile.StatefulSetsResource, "default", "web", func(obj map[string]any) {
		storytest.MergeJSON(obj, map[string]any{"spec": spec})
	})
}

// disturb does to a pod what users and nodes do.
func disturb(t *rapid.T, w *storytest.World) {
	pods := slices.Collect(w.Snapshot().Pods().All())
	if len(pods) == 0 {
		return
	}
	pod := pods[rapid.IntRange(0, len(pods)-1).Draw(t, "pod")]
	switch rapid.IntRange(0, 3).Draw(t, "how") {
	case 0:
		w.SetStatus(reconcile.PodsResource, pod.Namespace, pod.Name, map[string]any{"phase": "Failed", "conditions": []any{}})
	case 1:
		w.SetStatus(reconcile.PodsResource, pod.Namespace, pod.Name, map[string]any{"conditions": []any{map[string]any{"type": "Ready", "status": "False"}}})
	case 2: // its node is gone, and it is removed without one
		w.EndPod(pod.Namespace, pod.Name)
	case 3:
		if err := w.Write(t.Context(), reconcile.Delete(reconcile.PodsResource, pod)); err != nil {
			t.Fatalf("delete %s: %v", pod.Name, err)
		}
	}
}

// oneStatefulAgent does for one pod what its agent does next, and says whether there
// was anything to do.
func oneStatefulAgent(t *rapid.T, w *storytest.World) bool {
	var busy []*corev1.Pod
	for pod := range w.Snapshot().Pods().All() {
		if pod.DeletionTimestamp != nil || !objects.PodEnded(pod) && reconcile.ReadyCondition(pod) == nil {
			busy = append(busy, pod)
		}
	}
	if len(busy) == 0 {
		return false
	}
	pod := busy[rapid.IntRange(0, len(busy)-1).Draw(t, "pod")]
	if pod.DeletionTimestamp == nil {
		w.Edit(reconcile.PodsResource, pod.Namespace, pod.Name, func(obj map[string]any) {
			storytest.MergeJSON(obj, map[string]any{"spec": map[string]any{"nodeName": "a1"}})
		})
	}
	agent(w, pod)
	return true
}

func ordinalOf(t *rapid.T, pod string) int {
	n, err := strconv.Atoi(strings.TrimPrefix(pod, "web-"))
	if err != nil {
		t.Fatalf("pod %s has no ordinal", pod)
	}
	return n
}

func keepsPromises(t *rapid.T, w *storytest.World, c reconcile.Request) {
	if c.Resource != reconcile.PodsResource || c.Verb != reconcile.VerbCreate && c.Verb != reconcile.VerbDelete {
		return
	}
	set, pods := theSet(w), w.Snapshot().Pods()
	first := int(set.Spec.Ordinals.Start)
	end := first + int(*set.Spec.Replicas)
	n := ordinalOf(t, c.Name)
	wanted := n >= first && n < end
	ordered := set.Spec.PodManagementPolicy == appsv1.OrderedReadyPodManagement
	unavailable := 0
	for i := first; i < end; i++ {
		if pod, ok := pods.Get("default", fmt.Sprint("web-", i)); !ok || !available(pod) {
			unavailable++
			if ordered && i < n && c.Verb == reconcile.VerbCreate {
				t.Fatalf("%s, but web-%d does not serve", c, i)
			}
		}
	}
	pod, exists := pods.Get("default", c.Name)
	if c.Verb == reconcile.VerbCreate {
		switch {
		case exists:
			t.Fatalf("%s, but one is there", c)
		case !wanted:
			t.Fatalf("%s, but the set asks for %d to %d", c, first, end-1)
		}
		revision := c.Object.(*corev1.Pod).Labels[appsv1.StatefulSetRevisionLabel]
		if n < first+int(*set.Spec.UpdateStrategy.RollingUpdate.Partition) && set.Status.CurrentRevision != "" && revision != set.Status.CurrentRevision {
			t.Fatalf("%s of revision %s, but it is below the partition of %s", c, revision, set.Status.CurrentRevision)
		}
		return
	}
	switch {
	case !exists || objects.PodEnded(pod):
	case wanted:
		if n < first+int(*set.Spec.UpdateStrategy.RollingUpdate.Partition) {
			t.Fatalf("%s, but it is below the partition", c)
		}
		if most := set.Spec.UpdateStrategy.RollingUpdate.MaxUnavailable.IntValue(); available(pod) && unavailable+1 > most {
			t.Fatalf("%s, but %d of the others do not serve and %d may", c, unavailable, most)
		}
	case ordered:
		for other := range pods.All() {
			if m := ordinalOf(t, other.Name); m > n && (m < first || m >= end) {
				t.Fatalf("%s, but %s is still there", c, other.Name)
			}
		}
	}
}

// wantSettled checks what there is once nothing is left to do.
func wantSettled(t *rapid.T, w *storytest.World) {
	set := theSet(w)
	first, n := int(set.Spec.Ordinals.Start), int(*set.Spec.Replicas)
	var names []string
	for i := range n {
		names = append(names, fmt.Sprint("web-", first+i))
	}
	image := set.Spec.Template.Spec.Containers[0].Image
	var updated int32
	for pod := range w.Snapshot().Pods().All() {
		if len(names) == 0 || pod.Name != names[0] {
			t.Fatalf("pod %s is there, want next of %v", pod.Name, names)
		}
		names = names[1:]
		ofUpdate := podRevision(pod) == set.Status.UpdateRevision
		if ofUpdate {
			updated++
		}
		if ordinalOf(t, pod.Name) >= first+int(*set.Spec.UpdateStrategy.RollingUpdate.Partition) && !ofUpdate {
			t.Fatalf("pod %s is still of %s", pod.Name, podRevision(pod))
		}
		if runs := pod.Spec.Containers[0].Image; ofUpdate && runs != image {
			t.Fatalf("pod %s of %s runs %s, not %s", pod.Name, podRevision(pod), runs, image)
		}
		if _, ok := w.Snapshot().ControllerRevisions().Get("default", podRevision(pod)); !ok {
			t.Fatalf("the revision of pod %s is gone", pod.Name)
		}
	}
	if len(names) > 0 {
		t.Fatalf("pods %v are not there", names)
	}
	st := set.Status
	if st.Replicas != int32(n) || st.ReadyReplicas != int32(n) || st.AvailableReplicas != int32(n) || st.UpdatedReplicas != updated || st.ObservedGeneration != set.Generation {
		t.Fatalf("status %+v of %d pods, %d updated", st, n, updated)
	}
	revisions := 0
	for range w.Snapshot().ControllerRevisions().All() {
		revisions++
	}
	if most := 2 + n + int(*set.Spec.RevisionHistoryLimit); revisions > most {
		t.Fatalf("%d revisions, but a history of %d", revisions, *set.Spec.RevisionHistoryLimit)
	}
}

func podRevision(pod *corev1.Pod) string { return pod.Labels[appsv1.StatefulSetRevisionLabel] }
