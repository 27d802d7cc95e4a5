package differential

import (
	"context"
	"fmt"
	"math/rand/v2"

	appsv1 "k8s.io/api/apps/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"
	"k8s.io/kubernetes/pkg/controller/deployment"
	"k8s.io/kubernetes/pkg/controller/replicaset"
	"k8s.io/utils/ptr"

	"timonel/reconcile"
	"timonel/reconcile/workload"
)

var deploymentFamily = family{
	name: "deployment", seeds: 150, nodes: 1, ours: []reconcile.Reconciler{workload.Deployment{}, workload.ReplicaSet{}},
	upstream: func(ctx context.Context, f informers.SharedInformerFactory, c kubernetes.Interface) ([]func(context.Context), error) {
		d, err := deployment.NewDeploymentController(ctx, f.Apps().V1().Deployments(), f.Apps().V1().ReplicaSets(), f.Core().V1().Pods(), c)
		if err != nil {
			return nil, err
		}
		r := replicaset.NewReplicaSetController(ctx, f.Apps().V1().ReplicaSets(), f.Core().V1().Pods(), c, replicaset.BurstReplicas)
		return []func(context.Context){func(ctx context.Context) { d.Run(ctx, 1) }, func(ctx context.Context) { r.Run(ctx, 1) }}, nil
	},
	scenario: deployments,
}

// share returns a number or a percentage.
func share(r *rand.Rand) *intstr.IntOrString {
	return ptr.To([]intstr.IntOrString{intstr.FromInt32(0), intstr.FromInt32(1), intstr.FromInt32(2), intstr.FromString("25%"), intstr.FromString("50%"), intstr.FromString("100%")}[r.IntN(6)])
}

func strategy(r *rand.Rand) appsv1.DeploymentStrategy {
	if r.IntN(4) == 0 {
		return appsv1.DeploymentStrategy{Type: appsv1.RecreateDeploymentStrategyType}
	}
	surge, unavailable := share(r), share(r)
	if surge.IntValue() == 0 && surge.Type == intstr.Int && unavailable.Type == intstr.Int && unavailable.IntValue() == 0 {
		surge = ptr.To(intstr.FromInt32(1)) // the API refuses none of both
	}
	return appsv1.DeploymentStrategy{
		Type:          appsv1.RollingUpdateDeploymentStrategyType,
		RollingUpdate: &appsv1.RollingUpdateDeployment{MaxSurge: surge, MaxUnavailable: unavailable},
	}
}

func reads(s appsv1.DeploymentStrategy) string {
	if s.RollingUpdate == nil {
		return string(s.Type)
	}
	return fmt.Sprintf("%s of %s more and %s less", s.Type, s.RollingUpdate.MaxSurge, s.RollingUpdate.MaxUnavailable)
}

func deployments(r *rand.Rand) []step {
	make := func(r *rand.Rand) step {
		n, wait, limit, deadline, how := int32(r.IntN(8)), int32(r.IntN(3)*15), int32(r.IntN(4)), int32(60+r.IntN(2)*240), strategy(r)
		return step{what: fmt.Sprintf("Deployment web of %d, ready for %d seconds, with %d old sets, a deadline of %d and %s", n, wait, limit, deadline, reads(how)), do: func(s *side) {
			if s.Find(reconcile.DeploymentsResource, ns, "web") != nil {
				return
			}
			s.create(&appsv1.Deployment{ObjectMeta: named("web"), Spec: appsv1.DeploymentSpec{
				Replicas: &n, MinReadySeconds: wait, RevisionHistoryLimit: &limit, ProgressDeadlineSeconds: &deadline, Strategy: how,
				Selector: &metav1.LabelSelector{MatchLabels: app}, Template: template("v0"),
			}})
		}}
	}
	change := func(what string, do func(*appsv1.Deployment)) step {
		return step{what: what, do: func(s *side) { edit(s, reconcile.DeploymentsResource, "web", do) }}
	}
	scale := func(r *rand.Rand) step {
		n := int32(r.IntN(12))
		return change(fmt.Sprintf("scale to %d", n), func(d *appsv1.Deployment) { d.Spec.Replicas = ptr.To(n) })
	}
	roll := func(r *rand.Rand) step {
		v := fmt.Sprint("v", r.IntN(5))
		return change("template of "+v, func(d *appsv1.Deployment) { d.Spec.Template.Spec.Containers[0].Image = v })
	}
	serve := func(*rand.Rand) step { return step{what: "pods get on", do: (*side).serve} }
	return leaveOut(scenario(r, make(r), []func(r *rand.Rand) step{scale, scale, roll, roll, roll, serve, serve, serve, make,
		func(r *rand.Rand) step {
			paused := r.IntN(2) == 0
			return change(fmt.Sprint("paused ", paused), func(d *appsv1.Deployment) { d.Spec.Paused = paused })
		},
		func(r *rand.Rand) step {
			how := strategy(r)
			return change(reads(how), func(d *appsv1.Deployment) { d.Spec.Strategy = how })
		},
		func(r *rand.Rand) step {
			n := int32(r.IntN(3) * 20)
			return change(fmt.Sprintf("ready for %d seconds", n), func(d *appsv1.Deployment) { d.Spec.MinReadySeconds = n })
		},
		func(r *rand.Rand) step {
			n := int32(61 + r.IntN(100))
			return change(fmt.Sprintf("a deadline of %d", n), func(d *appsv1.Deployment) { d.Spec.ProgressDeadlineSeconds = &n })
		},
		func(r *rand.Rand) step {
			n := r.IntN(4)
			return change(fmt.Sprintf("back to revision %d", n), func(d *appsv1.Deployment) {
				d.Annotations = map[string]string{appsv1.DeprecatedRollbackTo: fmt.Sprint(n)}
			})
		},
		func(r *rand.Rand) step { return deletion(r, reconcile.DeploymentsResource, "web") },
	}), "controllers may not", "the controllers are away")
}
