package sched

import (
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	storagev1 "k8s.io/api/storage/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"

	"timonel/state/objects"
)

// A pod with a volume of a driver that can attach one volume to the node.
func attaching(edit func(*storagev1.CSINode)) (claim, volume, node runtime.Object, pod *corev1.Pod) {
	class, one := "csi", int32(1)
	csiNode := &storagev1.CSINode{ObjectMeta: metav1.ObjectMeta{Name: "n"}, Spec: storagev1.CSINodeSpec{Drivers: []storagev1.CSINodeDriver{
		{Name: "d", NodeID: "n", Allocatable: &storagev1.VolumeNodeResources{Count: &one}}}}}
	if edit != nil {
		edit(csiNode)
	}
	pod = simplePod("p", "cpu", "1")
	pod.Spec.Volumes = []corev1.Volume{{Name: "v", VolumeSource: corev1.VolumeSource{PersistentVolumeClaim: &corev1.PersistentVolumeClaimVolumeSource{ClaimName: "mine"}}}}
	return &corev1.PersistentVolumeClaim{
			ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: "mine", Annotations: map[string]string{"pv.kubernetes.io/bind-completed": "yes"}},
			Spec:       corev1.PersistentVolumeClaimSpec{StorageClassName: &class, VolumeName: "mine"},
		}, &corev1.PersistentVolume{ObjectMeta: metav1.ObjectMeta{Name: "mine"}, Spec: corev1.PersistentVolumeSpec{PersistentVolumeSource: corev1.PersistentVolumeSource{
			CSI: &corev1.CSIPersistentVolumeSource{Driver: "d", VolumeHandle: "mine"}}}}, csiNode, pod
}

func attachment(volume string) *storagev1.VolumeAttachment {
	return &storagev1.VolumeAttachment{ObjectMeta: metav1.ObjectMeta{Name: "a"}, Spec: storagev1.VolumeAttachmentSpec{
		Attacher: "d", NodeName: "n", Source: storagev1.VolumeAttachmentSource{PersistentVolumeName: &volume}}}
}

// What is attached to a node takes its place there, though no pod uses it any more; and
// pods keep away from nodes without a driver that they must have.
func TestAttachedVolumes(t *testing.T) {
	t.Parallel()
	yes := true
	other := &corev1.PersistentVolume{ObjectMeta: metav1.ObjectMeta{Name: "other"}, Spec: corev1.PersistentVolumeSpec{PersistentVolumeSource: corev1.PersistentVolumeSource{
		CSI: &corev1.CSIPersistentVolumeSource{Driver: "d", VolumeHandle: "other"}}}}
	driver := &storagev1.CSIDriver{ObjectMeta: metav1.ObjectMeta{Name: "d"}, Spec: storagev1.CSIDriverSpec{PreventPodSchedulingIfMissing: &yes}}
	for name, tc := range map[string]struct {
		node func(*storagev1.CSINode)
		more []runtime.Object
		want string // in the failure; empty: it fits
	}{
		"room": {},
		// As upstream: it is counted as attached and as new.
		"its own volume":     {more: []runtime.Object{attachment("mine")}, want: "1 node(s) exceed max volume count"},
		"another's volume":   {more: []runtime.Object{attachment("other"), other}, want: "1 node(s) exceed max volume count"},
		"a volume that went": {more: []runtime.Object{attachment("other")}},
		"no such driver":     {node: func(n *storagev1.CSINode) { n.Spec.Drivers = nil }},
		"no such driver, and it must be there": {node: func(n *storagev1.CSINode) { n.Spec.Drivers = nil }, more: []runtime.Object{driver},
			want: "1 d CSI driver is not installed on the node"},
		"it must be there, and is": {more: []runtime.Object{driver}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			claim, volume, csiNode, pod := attaching(tc.node)
			plan, err := Schedule(DefaultConfig(), Input{Now: epoch, State: newState(append(tc.more, makeNode("n"), claim, volume, csiNode, pod)...)})
			if err != nil {
				t.Fatal(err)
			}
			if tc.want == "" && len(plan.Bindings) != 1 || tc.want != "" && (len(plan.Failures) != 1 || !strings.Contains(plan.Failures[0].Message, tc.want)) {
				t.Errorf("%+v", plan)
			}
		})
	}
}

// A pod that a volume was in the way of is tried again when that is detached.
func TestDetachingWakes(t *testing.T) {
	t.Parallel()
	claim, volume, csiNode, pod := attaching(nil)
	other := volume.(*corev1.PersistentVolume).DeepCopy()
	other.Name, other.Spec.CSI.VolumeHandle = "other", "other"
	h := volumeHints(objects.Changed{Old: meta(attachment("other"))})
	if len(h) != 1 || h[0].concerns&causeVolumeLimits == 0 {
		t.Fatalf("%+v", h)
	}
	state := newState(makeNode("n"), claim, volume, csiNode, pod, attachment("other"), other)
	cluster := Build(state)
	plan, err := Schedule(DefaultConfig(), Input{Now: epoch, State: state, Cluster: cluster})
	if err != nil || len(plan.Failures) != 1 || plan.Failures[0].Causes&h[0].concerns == 0 {
		t.Fatalf("%+v, %v", plan, err)
	}
	now := epoch
	q, _ := queueOf(t, state, &now)
	q.Tried(plan, now)
	for range q.Ready(now.Add(time.Minute)) {
		t.Fatal("it is tried again though nothing changed")
	}
	q.wake(h[0], now)
	tried := 0
	for range q.Ready(now.Add(time.Minute)) {
		tried++
	}
	if tried != 1 {
		t.Errorf("tried %d times", tried)
	}
}
