package differential

import (
	"context"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"
	"k8s.io/kubernetes/pkg/controller/statefulset"
	"k8s.io/utils/ptr"

	"timonel/reconcile"
	"timonel/reconcile/workload"
)

var statefulSetFamily = family{
	name: "statefulset", seeds: 400, nodes: 3, ours: []reconcile.Reconciler{workload.StatefulSet{}},
	slack: time.Second, nudge: nudgeAt(reconcile.StatefulSetsResource),
	upstream: func(ctx context.Context, f informers.SharedInformerFactory, c kubernetes.Interface) ([]func(context.Context), error) {
		s := statefulset.NewStatefulSetController(ctx, f.Core().V1().Pods(), f.Apps().V1().StatefulSets(), f.Core().V1().PersistentVolumeClaims(), f.Apps().V1().ControllerRevisions(), c)
		return []func(context.Context){func(ctx context.Context) { s.Run(ctx, 1) }}, nil
	},
	scenario: statefulSets,
}

// statefulStrategy returns how a StatefulSet is updated, and how that reads.
func statefulStrategy(r *rand.Rand) (appsv1.StatefulSetUpdateStrategy, string) {
	switch r.IntN(8) {
	case 0:
		return appsv1.StatefulSetUpdateStrategy{Type: appsv1.OnDeleteStatefulSetStrategyType}, "on delete"
	case 1: // neither partition nor budget, which a client leaves out by naming the type alone
		return appsv1.StatefulSetUpdateStrategy{Type: appsv1.RollingUpdateStatefulSetStrategyType}, "rolling"
	}
	partition := int32(max(0, r.IntN(8)-4))
	budget := []intstr.IntOrString{intstr.FromInt32(1), intstr.FromInt32(1), intstr.FromInt32(2), intstr.FromInt32(3), intstr.FromString("10%"), intstr.FromString("50%"), intstr.FromString("100%")}[r.IntN(7)]
	return appsv1.StatefulSetUpdateStrategy{
		Type:          appsv1.RollingUpdateStatefulSetStrategyType,
		RollingUpdate: &appsv1.RollingUpdateStatefulSetStrategy{Partition: &partition, MaxUnavailable: &budget},
	}, fmt.Sprintf("rolling from %d, %s at a time", partition, budget.String())
}

func retention(r *rand.Rand) *appsv1.StatefulSetPersistentVolumeClaimRetentionPolicy {
	either := []appsv1.PersistentVolumeClaimRetentionPolicyType{appsv1.RetainPersistentVolumeClaimRetentionPolicyType, appsv1.DeletePersistentVolumeClaimRetentionPolicyType}
	return &appsv1.StatefulSetPersistentVolumeClaimRetentionPolicy{WhenDeleted: either[r.IntN(2)], WhenScaled: either[r.IntN(2)]}
}

// anyStatefulSet returns the spec of a StatefulSet that the API accepts, and how it reads.
func anyStatefulSet(r *rand.Rand) (appsv1.StatefulSetSpec, string) {
	how, text := statefulStrategy(r)
	spec := appsv1.StatefulSetSpec{
		Replicas: ptr.To(int32(r.IntN(6))), MinReadySeconds: int32(max(0, r.IntN(5)-2) * 15), RevisionHistoryLimit: ptr.To(int32(r.IntN(4))),
		UpdateStrategy: how, ServiceName: "web", Selector: &metav1.LabelSelector{MatchLabels: app}, Template: template("v0"),
	}
	text = fmt.Sprintf("%d replicas, ready for %d seconds, %d old revisions, %s", *spec.Replicas, spec.MinReadySeconds, *spec.RevisionHistoryLimit, text)
	if r.IntN(2) == 0 {
		spec.PodManagementPolicy = appsv1.ParallelPodManagement
		text += ", parallel"
	}
	if r.IntN(3) == 0 {
		spec.Ordinals = &appsv1.StatefulSetOrdinals{Start: int32(1 + r.IntN(3))}
		text += fmt.Sprint(", from ordinal ", spec.Ordinals.Start)
	}
	for i := range max(0, r.IntN(4)-1) {
		name := []string{"data", "log"}[i]
		spec.VolumeClaimTemplates = append(spec.VolumeClaimTemplates, corev1.PersistentVolumeClaim{
			ObjectMeta: metav1.ObjectMeta{Name: name, Labels: map[string]string{"of": name}},
			Spec:       corev1.PersistentVolumeClaimSpec{AccessModes: []corev1.PersistentVolumeAccessMode{corev1.ReadWriteOnce}},
		})
		text += ", a claim " + name
	}
	if len(spec.VolumeClaimTemplates) > 0 && r.IntN(4) > 0 {
		spec.PersistentVolumeClaimRetentionPolicy = retention(r)
		text += fmt.Sprintf(" (%s when deleted, %s when scaled)", spec.PersistentVolumeClaimRetentionPolicy.WhenDeleted, spec.PersistentVolumeClaimRetentionPolicy.WhenScaled)
	}
	return spec, text
}

// claims returns the names of a side's claims.
func (s *side) claims(which func(*corev1.PersistentVolumeClaim) bool) (out []string) {
	for _, obj := range s.All(reconcile.PVCsResource, ns) {
		var c corev1.PersistentVolumeClaim
		if decode(obj, &c); which(&c) {
			out = append(out, c.Name)
		}
	}
	return out
}

// revisions returns the names of a side's ControllerRevisions.
func (s *side) revisions() (out []string) {
	for _, obj := range s.All(reconcile.ControllerRevisionsResource, ns) {
		out = append(out, obj["metadata"].(map[string]any)["name"].(string))
	}
	return out
}

// oneOf returns the element at a place, wherever the list ends.
func oneOf(list []string, at int) string {
	if len(list) == 0 {
		return "none"
	}
	return list[at%len(list)]
}

// held keeps what is deleted from going, as the protection of claims in use does.
const held = "example.org/held"

// claimSteps are what happens to the claims of pods.
var claimSteps = []func(r *rand.Rand) step{
	func(r *rand.Rand) step {
		at := r.IntN(6)
		return step{what: fmt.Sprintf("claim %d is deleted", at), do: func(s *side) {
			s.remove(reconcile.PVCsResource, oneOf(s.claims(func(*corev1.PersistentVolumeClaim) bool { return true }), at), "")
		}}
	},
	func(r *rand.Rand) step {
		at := r.IntN(6)
		return step{what: fmt.Sprintf("claim %d is held and deleted", at), do: func(s *side) {
			name := oneOf(s.claims(func(*corev1.PersistentVolumeClaim) bool { return true }), at)
			edit(s, reconcile.PVCsResource, name, func(c *corev1.PersistentVolumeClaim) { c.Finalizers = []string{held} })
			s.remove(reconcile.PVCsResource, name, "")
		}}
	},
	func(r *rand.Rand) step { return step{what: "claims that are held are let go", do: (*side).release} },
	func(r *rand.Rand) step {
		at := r.IntN(6)
		return step{what: fmt.Sprintf("claim %d is owned by another", at), do: func(s *side) {
			if s.Find(configMaps, ns, "app") == nil {
				s.create(&corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Namespace: ns, Name: "app", UID: "app"}})
			}
			edit(s, reconcile.PVCsResource, oneOf(s.claims(func(*corev1.PersistentVolumeClaim) bool { return true }), at), func(c *corev1.PersistentVolumeClaim) {
				if len(c.OwnerReferences) == 0 {
					c.OwnerReferences = []metav1.OwnerReference{{APIVersion: "v1", Kind: "ConfigMap", Name: "app", UID: "app", Controller: ptr.To(true)}}
				}
			})
		}}
	},
}

// release lets claims go that are held.
func (s *side) release() {
	for _, name := range s.claims(func(c *corev1.PersistentVolumeClaim) bool { return len(c.Finalizers) > 0 && c.DeletionTimestamp != nil }) {
		edit(s, reconcile.PVCsResource, name, func(c *corev1.PersistentVolumeClaim) { c.Finalizers = nil })
	}
}

func revisionGoes(r *rand.Rand) step {
	at := r.IntN(4)
	return step{what: fmt.Sprintf("revision %d is deleted", at), do: func(s *side) {
		s.remove(reconcile.ControllerRevisionsResource, oneOf(s.revisions(), at), "")
	}}
}

func revisionIsFreed(r *rand.Rand) step {
	at := r.IntN(4)
	return step{what: fmt.Sprintf("revision %d is nobody's", at), do: func(s *side) {
		edit(s, reconcile.ControllerRevisionsResource, oneOf(s.revisions(), at), func(c *appsv1.ControllerRevision) { c.OwnerReferences = nil })
	}}
}

func statefulSets(r *rand.Rand) []step {
	set := reconcile.StatefulSetsResource
	make := func(r *rand.Rand) step {
		spec, text := anyStatefulSet(r)
		return step{what: "StatefulSet web: " + text, do: func(s *side) {
			if s.Find(set, ns, "web") == nil {
				s.create(&appsv1.StatefulSet{ObjectMeta: named("web"), Spec: *spec.DeepCopy()})
			}
		}}
	}
	change := func(what string, do func(*appsv1.StatefulSet)) step {
		return step{what: what, do: func(s *side) { edit(s, set, "web", do) }}
	}
	scale := func(r *rand.Rand) step {
		n := int32(r.IntN(8))
		return change(fmt.Sprintf("scale to %d", n), func(s *appsv1.StatefulSet) { s.Spec.Replicas = ptr.To(n) })
	}
	roll := func(r *rand.Rand) step {
		v := fmt.Sprint("v", r.IntN(5))
		return change("template of "+v, func(s *appsv1.StatefulSet) { s.Spec.Template.Spec.Containers[0].Image = v })
	}
	serve := func(*rand.Rand) step { return step{what: "pods get on", do: (*side).serve} }
	own := []func(r *rand.Rand) step{scale, scale, scale, roll, roll, roll, serve, serve, serve, serve, make,
		func(r *rand.Rand) step {
			how, text := statefulStrategy(r)
			return change(text, func(s *appsv1.StatefulSet) { s.Spec.UpdateStrategy = how })
		},
		func(r *rand.Rand) step {
			n := int32(r.IntN(3) * 20)
			return change(fmt.Sprintf("ready for %d seconds", n), func(s *appsv1.StatefulSet) { s.Spec.MinReadySeconds = n })
		},
		func(r *rand.Rand) step {
			n := int32(r.IntN(4))
			return change(fmt.Sprintf("from ordinal %d", n), func(s *appsv1.StatefulSet) { s.Spec.Ordinals = &appsv1.StatefulSetOrdinals{Start: n} })
		},
		func(r *rand.Rand) step {
			p := retention(r)
			return change(fmt.Sprintf("claims: %s when deleted, %s when scaled", p.WhenDeleted, p.WhenScaled), func(s *appsv1.StatefulSet) {
				s.Spec.PersistentVolumeClaimRetentionPolicy = p
			})
		},
		func(r *rand.Rand) step {
			n := int32(r.IntN(3))
			return change(fmt.Sprintf("%d old revisions", n), func(s *appsv1.StatefulSet) { s.Spec.RevisionHistoryLimit = &n })
		},
		func(r *rand.Rand) step {
			v := fmt.Sprint("v", r.IntN(3))
			return change("its template's labels say "+v, func(s *appsv1.StatefulSet) { s.Spec.Template.Labels["version"] = v })
		},
		func(r *rand.Rand) step { return deletion(r, set, "web") },
		func(r *rand.Rand) step {
			return onPods(r, "fail at once", running, func(s *side, p *corev1.Pod) { s.end(p, corev1.PodFailed, 1) })
		},
		func(r *rand.Rand) step {
			return onPods(r, "lose the label of their name", alive, func(s *side, p *corev1.Pod) {
				edit(s, reconcile.PodsResource, p.Name, func(p *corev1.Pod) { delete(p.Labels, appsv1.StatefulSetPodNameLabel) })
			})
		},
		revisionGoes, revisionIsFreed,
		func(r *rand.Rand) step {
			n, matches := r.IntN(6), r.IntN(3) > 0
			return step{what: fmt.Sprintf("somebody makes the pod web-%d, which matches: %v", n, matches), do: func(s *side) {
				name := fmt.Sprint("web-", n)
				if s.Find(reconcile.PodsResource, ns, name) != nil {
					return
				}
				t := template("foreign")
				l := maps.Clone(app)
				if !matches {
					l["app"] = "free"
				}
				s.create(&corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: ns, Name: name, Labels: l}, Spec: t.Spec})
			}}
		},
	}
	own = append(own, claimSteps...)
	out := leaveOut(scenario(r, make(r), own), "statefulsets web is deleted, Foreground")
	has := func(what string) bool {
		return slices.ContainsFunc(out, func(s step) bool { return strings.Contains(s.what, what) })
	}
	parallel := has(", parallel")
	if parallel || has(", a claim") { // see what is not played
		out = leaveOut(out, "lose their label", "somebody makes the pod web-")
	}
	if parallel {
		out = slices.DeleteFunc(out, func(s step) bool { return strings.Contains(s.what, "is held") })
	}
	return append(out, step{"claims that are held are let go", (*side).release, calm})
}
