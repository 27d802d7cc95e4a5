package differential

import (
	"context"
	"fmt"
	"math/rand/v2"
	"slices"
	"strconv"
	"strings"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"
	"k8s.io/kubernetes/pkg/controller/replicaset"
	"k8s.io/kubernetes/pkg/controller/replication"
	"k8s.io/utils/ptr"

	"timonel/reconcile"
	"timonel/reconcile/workload"
)

var replicaSetFamily = family{
	name: "replicaset", seeds: 440, nodes: 3, ours: []reconcile.Reconciler{workload.ReplicaSet{}},
	upstream: func(ctx context.Context, f informers.SharedInformerFactory, c kubernetes.Interface) ([]func(context.Context), error) {
		r := replicaset.NewReplicaSetController(ctx, f.Apps().V1().ReplicaSets(), f.Core().V1().Pods(), c, replicaset.BurstReplicas)
		return []func(context.Context){func(ctx context.Context) { r.Run(ctx, 1) }}, nil
	},
	scenario: replicaSets,
}

var replicationControllerFamily = family{
	name: "replicationcontroller", seeds: 200, nodes: 1, ours: []reconcile.Reconciler{workload.ReplicationController{}},
	upstream: func(ctx context.Context, f informers.SharedInformerFactory, c kubernetes.Interface) ([]func(context.Context), error) {
		r := replication.NewReplicationManager(ctx, f.Core().V1().Pods(), f.Core().V1().ReplicationControllers(), c, replication.BurstReplicas)
		return []func(context.Context){func(ctx context.Context) { r.Run(ctx, 1) }}, nil
	},
	scenario: replicationControllers,
}

// configMaps are what owns the ReplicaSets: only of those that have an owner does upstream
// look for pods that share a node, see the allowances.
var configMaps = corev1.SchemeGroupVersion.WithResource("configmaps")

// app are the labels of the pods of all scenarios.
var app = map[string]string{"app": "web"}

func template(image string) corev1.PodTemplateSpec {
	return corev1.PodTemplateSpec{
		ObjectMeta: metav1.ObjectMeta{Labels: map[string]string{"app": "web"}},
		Spec:       corev1.PodSpec{Containers: []corev1.Container{{Name: "c", Image: image}}},
	}
}

func named(name string) metav1.ObjectMeta {
	return metav1.ObjectMeta{Namespace: ns, Name: name, Labels: map[string]string{"app": "web"}}
}

// pause returns how long nothing happens after a step.
func pause(r *rand.Rand) time.Duration {
	return []time.Duration{2 * time.Second, 2 * time.Second, 3 * time.Second, 10 * time.Second, 40 * time.Second, 5 * time.Minute}[r.IntN(6)]
}

// anyStep makes a step out of one of those that there are.
func anyStep(r *rand.Rand, steps []func(r *rand.Rand) step) step {
	s := steps[r.IntN(len(steps))](r)
	s.wait = pause(r)
	return s
}

// onPods returns a step that is done to n of some pods, from a place on.
func onPods(r *rand.Rand, what string, which func(*corev1.Pod) bool, do func(s *side, p *corev1.Pod)) step {
	at, n := r.IntN(8), 1+r.IntN(3)
	return step{what: fmt.Sprintf("%s: %d pods from %d", what, n, at), do: func(s *side) {
		for _, p := range pick(s.pods(which), at, n) {
			do(s, p)
		}
	}}
}

// old says whether a pod has run for long enough that it does not count as one that
// failed at once: see workload.holdBack.
func old(p *corev1.Pod) bool { return time.Since(p.CreationTimestamp.Time) > 61*time.Second }

// podSteps are what happens to pods whoever owns them.
var podSteps = []func(r *rand.Rand) step{
	func(*rand.Rand) step { return step{what: "pods get on", do: (*side).serve} },
	func(*rand.Rand) step { return step{what: "pods get on", do: (*side).serve} },
	func(r *rand.Rand) step {
		node := r.IntN(3)
		return onPods(r, fmt.Sprint("get node ", node), waiting, func(s *side, p *corev1.Pod) { s.bind(p, s.node(node)) })
	},
	func(r *rand.Rand) step {
		return onPods(r, "become ready", func(p *corev1.Pod) bool { return bound(p) || unready(p) }, func(s *side, p *corev1.Pod) { s.report(p, corev1.PodRunning, true, nil) })
	},
	func(r *rand.Rand) step {
		return onPods(r, "are not ready", ready, func(s *side, p *corev1.Pod) { s.report(p, corev1.PodRunning, false, nil) })
	},
	func(r *rand.Rand) step {
		return onPods(r, "start again", running, func(s *side, p *corev1.Pod) {
			s.report(p, corev1.PodRunning, true, func(status *corev1.PodStatus) {
				status.ContainerStatuses = []corev1.ContainerStatus{{Name: "c", RestartCount: 1}}
			})
		})
	},
	func(r *rand.Rand) step {
		return onPods(r, "fail", func(p *corev1.Pod) bool { return running(p) && old(p) }, func(s *side, p *corev1.Pod) { s.end(p, corev1.PodFailed, 1) })
	},
	func(r *rand.Rand) step {
		return onPods(r, "end", func(p *corev1.Pod) bool { return running(p) && old(p) }, func(s *side, p *corev1.Pod) { s.end(p, corev1.PodSucceeded, 0) })
	},
	func(r *rand.Rand) step {
		return onPods(r, "are deleted", alive, func(s *side, p *corev1.Pod) { s.remove(reconcile.PodsResource, p.Name, "") })
	},
	func(r *rand.Rand) step {
		return onPods(r, "vanish", anyPod, func(s *side, p *corev1.Pod) { s.vanish(p) })
	},
	func(r *rand.Rand) step {
		return onPods(r, "stop", terminating, func(s *side, p *corev1.Pod) { s.vanish(p) })
	},
	func(r *rand.Rand) step {
		cost := strconv.Itoa([]int{-2, -1, 1, 2}[r.IntN(4)]) // 0 is like none
		return onPods(r, "cost "+cost+" to delete", alive, func(s *side, p *corev1.Pod) {
			edit(s, reconcile.PodsResource, p.Name, func(p *corev1.Pod) {
				p.Annotations = map[string]string{corev1.PodDeletionCost: cost}
			})
		})
	},
	func(r *rand.Rand) step {
		return onPods(r, "lose their label", alive, func(s *side, p *corev1.Pod) {
			edit(s, reconcile.PodsResource, p.Name, func(p *corev1.Pod) { p.Labels["app"] = "free" })
		})
	},
	func(r *rand.Rand) step {
		return onPods(r, "have it again", func(p *corev1.Pod) bool { return p.Labels["app"] == "free" }, func(s *side, p *corev1.Pod) {
			edit(s, reconcile.PodsResource, p.Name, func(p *corev1.Pod) { p.Labels["app"] = "web" })
		})
	},
	func(r *rand.Rand) step {
		n := r.IntN(1000)
		return step{what: fmt.Sprintf("somebody makes the pod free-%d", n), do: func(s *side) {
			name := fmt.Sprint("free-", n)
			if s.Find(reconcile.PodsResource, ns, name) != nil {
				return
			}
			t := template("free")
			s.create(&corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: ns, Name: name, Labels: map[string]string{"app": "web", "free": name}}, Spec: t.Spec})
		}}
	},
}

// disturbances are what happens to controllers.
var disturbances = []func(r *rand.Rand) step{
	func(*rand.Rand) step { return step{what: "the controllers are away", do: (*side).stop} },
	func(*rand.Rand) step {
		return step{what: "the controllers are back", do: func(s *side) {
			if s.away {
				s.start()
			}
		}}
	},
	func(*rand.Rand) step {
		return step{what: "there are other controllers", do: func(s *side) {
			if !s.away {
				s.stop()
				s.start()
			}
		}}
	},
	func(r *rand.Rand) step {
		verb := []reconcile.Verb{reconcile.VerbCreate, reconcile.VerbDelete}[r.IntN(2)]
		return step{what: fmt.Sprintf("controllers may not %s pods", verb), do: func(s *side) {
			s.permit()
			s.Refuse = func(c reconcile.Request) error {
				if c.Verb == verb && c.Resource == reconcile.PodsResource && (c.GracePeriodSeconds == nil || *c.GracePeriodSeconds > 0) {
					return apierrors.NewForbidden(c.Resource.GroupResource(), "x", fmt.Errorf("exceeded quota"))
				}
				return nil
			}
		}}
	},
	func(*rand.Rand) step { return step{what: "controllers may do everything", do: (*side).permit} },
}

// scenario returns some steps after the first.
func scenario(r *rand.Rand, first step, own []func(r *rand.Rand) step) []step {
	first.wait = pause(r)
	out := []step{first}
	for range 4 + r.IntN(14) {
		switch n := r.IntN(100); {
		case n < 40:
			out = append(out, anyStep(r, own))
		case n < 90:
			out = append(out, anyStep(r, podSteps))
		default:
			out = append(out, anyStep(r, disturbances))
		}
	}
	return out
}

// leaveOut leaves out the steps that begin with one of some words: see what is not played.
func leaveOut(steps []step, words ...string) []step {
	return slices.DeleteFunc(steps, func(s step) bool {
		return slices.ContainsFunc(words, func(w string) bool { return strings.HasPrefix(s.what, w) })
	})
}

// deletion returns a step that deletes an object.
func deletion(r *rand.Rand, resource schema.GroupVersionResource, name string) step {
	p := []metav1.DeletionPropagation{metav1.DeletePropagationBackground, metav1.DeletePropagationForeground, metav1.DeletePropagationOrphan}[r.IntN(3)]
	return step{what: fmt.Sprintf("%s %s is deleted, %s", resource.Resource, name, p), do: func(s *side) {
		if !s.away { // or what is made in time and what is collected first is a race
			s.remove(resource, name, p)
		}
	}}
}

func replicaSets(r *rand.Rand) []step {
	make := func(r *rand.Rand) step {
		n, wait := int32(r.IntN(6)), int32(r.IntN(3)*15)
		return step{what: fmt.Sprintf("ReplicaSet web of %d, ready for %d seconds", n, wait), do: func(s *side) {
			if s.Find(reconcile.ReplicaSetsResource, ns, "web") != nil {
				return
			}
			if s.Find(configMaps, ns, "app") == nil {
				s.create(&corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Namespace: ns, Name: "app", UID: "app"}})
			}
			m := named("web")
			m.OwnerReferences = []metav1.OwnerReference{{APIVersion: "v1", Kind: "ConfigMap", Name: "app", UID: "app", Controller: ptr.To(true)}}
			s.create(&appsv1.ReplicaSet{ObjectMeta: m, Spec: appsv1.ReplicaSetSpec{
				Replicas: &n, MinReadySeconds: wait, Selector: &metav1.LabelSelector{MatchLabels: app}, Template: template("v1"),
			}})
		}}
	}
	change := func(what string, do func(*appsv1.ReplicaSet)) step {
		return step{what: what, do: func(s *side) { edit(s, reconcile.ReplicaSetsResource, "web", do) }}
	}
	scale := func(r *rand.Rand) step {
		n := int32(r.IntN(8))
		return change(fmt.Sprintf("scale to %d", n), func(rs *appsv1.ReplicaSet) { rs.Spec.Replicas = ptr.To(n) })
	}
	return scenario(r, make(r), []func(r *rand.Rand) step{scale, scale, scale, make,
		func(r *rand.Rand) step {
			n := int32(r.IntN(3) * 20)
			return change(fmt.Sprintf("ready for %d seconds", n), func(rs *appsv1.ReplicaSet) { rs.Spec.MinReadySeconds = n })
		},
		func(r *rand.Rand) step {
			v := fmt.Sprint("v", r.IntN(4))
			return change("template of "+v, func(rs *appsv1.ReplicaSet) {
				rs.Spec.Template.Spec.Containers[0].Image = v
				rs.Spec.Template.Labels["version"] = v
			})
		},
		func(r *rand.Rand) step { return deletion(r, reconcile.ReplicaSetsResource, "web") },
	})
}

func replicationControllers(r *rand.Rand) []step {
	make := func(r *rand.Rand) step {
		n, wait := int32(r.IntN(6)), int32(r.IntN(3)*15)
		return step{what: fmt.Sprintf("ReplicationController web of %d, ready for %d seconds", n, wait), do: func(s *side) {
			if s.Find(reconcile.ReplicationControllersResource, ns, "web") != nil {
				return
			}
			s.create(&corev1.ReplicationController{ObjectMeta: named("web"), Spec: corev1.ReplicationControllerSpec{
				Replicas: &n, MinReadySeconds: wait, Selector: app, Template: ptr.To(template("v1")),
			}})
		}}
	}
	scale := func(r *rand.Rand) step {
		n := int32(r.IntN(8))
		return step{what: fmt.Sprintf("scale to %d", n), do: func(s *side) {
			edit(s, reconcile.ReplicationControllersResource, "web", func(rc *corev1.ReplicationController) { rc.Spec.Replicas = ptr.To(n) })
		}}
	}
	return scenario(r, make(r), []func(r *rand.Rand) step{scale, scale, make,
		func(r *rand.Rand) step { return deletion(r, reconcile.ReplicationControllersResource, "web") },
	})
}
