package differential

import (
	"context"
	"fmt"
	"math/rand/v2"
	"strings"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/util/flowcontrol"
	"k8s.io/kubernetes/pkg/controller/daemon"
	"k8s.io/utils/ptr"

	"timonel/reconcile"
	"timonel/reconcile/workload"
)

var daemonSetFamily = family{
	name: "daemonset", seeds: 350, nodes: 3, ours: []reconcile.Reconciler{workload.DaemonSet{}},
	slack: time.Second, nudge: nudgeAt(reconcile.DaemonSetsResource), serve: (*side).serveDaemons, chooses: true,
	upstream: func(ctx context.Context, f informers.SharedInformerFactory, c kubernetes.Interface) ([]func(context.Context), error) {
		d, err := daemon.NewDaemonSetsController(ctx, f.Apps().V1().DaemonSets(), f.Apps().V1().ControllerRevisions(), f.Core().V1().Pods(), f.Core().V1().Nodes(), c,
			flowcontrol.NewBackOff(time.Second, 15*time.Minute))
		if err != nil {
			return nil, err
		}
		return []func(context.Context){func(ctx context.Context) { d.Run(ctx, 1) }}, nil
	},
	scenario: daemonSets,
}

// aim is the node that a pod of a DaemonSet is for, by its affinity.
func aim(p *corev1.Pod) string {
	if a := p.Spec.Affinity; a != nil && a.NodeAffinity != nil && a.NodeAffinity.RequiredDuringSchedulingIgnoredDuringExecution != nil {
		for _, t := range a.NodeAffinity.RequiredDuringSchedulingIgnoredDuringExecution.NodeSelectorTerms {
			for _, f := range t.MatchFields {
				return f.Values[0]
			}
		}
	}
	return ""
}

func aimOf(obj map[string]any) string {
	if obj["kind"] != "Pod" {
		return ""
	}
	var p corev1.Pod
	decode(obj, &p)
	return aim(&p)
}

// serveDaemons lets every pod get on by a step, those of DaemonSets to the nodes they are for.
func (s *side) serveDaemons() {
	going, started, placed := s.pods(terminating), s.pods(func(p *corev1.Pod) bool { return bound(p) || unready(p) }), s.pods(waiting)
	for _, p := range started {
		s.report(p, corev1.PodRunning, true, nil)
	}
	for _, p := range placed {
		s.bindAimed(p)
	}
	for _, p := range going {
		s.vanish(p)
	}
}

// bindAimed binds a pod to the node that it is for, if that is there.
func (s *side) bindAimed(p *corev1.Pod) {
	if node := aim(p); node != "" && s.Find(reconcile.NodesResource, "", node) != nil {
		s.bind(p, node)
	}
}

// daemonStrategy returns how a DaemonSet is updated, and how that reads.
func daemonStrategy(r *rand.Rand) (appsv1.DaemonSetUpdateStrategy, string) {
	if r.IntN(6) == 0 {
		return appsv1.DaemonSetUpdateStrategy{Type: appsv1.OnDeleteDaemonSetStrategyType}, "on delete"
	}
	n := []intstr.IntOrString{intstr.FromInt32(1), intstr.FromInt32(2), intstr.FromInt32(3), intstr.FromString("10%"), intstr.FromString("50%"), intstr.FromString("100%")}[r.IntN(6)]
	if r.IntN(2) == 0 {
		return appsv1.DaemonSetUpdateStrategy{Type: appsv1.RollingUpdateDaemonSetStrategyType, RollingUpdate: &appsv1.RollingUpdateDaemonSet{MaxSurge: &n, MaxUnavailable: ptr.To(intstr.FromInt32(0))}}, n.String() + " more"
	}
	return appsv1.DaemonSetUpdateStrategy{Type: appsv1.RollingUpdateDaemonSetStrategyType, RollingUpdate: &appsv1.RollingUpdateDaemonSet{MaxUnavailable: &n, MaxSurge: ptr.To(intstr.FromInt32(0))}}, n.String() + " less"
}

var nodeTaints = []corev1.Taint{
	{Key: "dedicated", Value: "db", Effect: corev1.TaintEffectNoSchedule},
	{Key: "dedicated", Value: "db", Effect: corev1.TaintEffectNoExecute},
	{Key: "dedicated", Value: "web", Effect: corev1.TaintEffectPreferNoSchedule},
	{Key: corev1.TaintNodeUnreachable, Effect: corev1.TaintEffectNoExecute},
	{Key: corev1.TaintNodeUnschedulable, Effect: corev1.TaintEffectNoSchedule},
	{Key: corev1.TaintNodeNetworkUnavailable, Effect: corev1.TaintEffectNoSchedule},
}

var daemonTolerations = [][]corev1.Toleration{
	nil, nil,
	{{Key: "dedicated", Operator: corev1.TolerationOpEqual, Value: "db", Effect: corev1.TaintEffectNoSchedule}},
	{{Key: "dedicated", Operator: corev1.TolerationOpExists}},
	{{Operator: corev1.TolerationOpExists}},
	{{Key: corev1.TaintNodeUnreachable, Operator: corev1.TolerationOpExists, Effect: corev1.TaintEffectNoExecute, TolerationSeconds: ptr.To[int64](20)}},
}

// nodeSteps are what happens to nodes.
var nodeSteps = []func(r *rand.Rand) step{
	func(r *rand.Rand) step {
		n, zone := r.IntN(5), []string{"a", "b"}[r.IntN(2)]
		return step{what: fmt.Sprintf("node n%d is there, in zone %s", n, zone), do: func(s *side) { s.addNode(n, zone) }}
	},
	func(r *rand.Rand) step {
		n := r.IntN(5)
		return step{what: fmt.Sprintf("node n%d goes, and its pods", n), do: func(s *side) {
			name := fmt.Sprint("n", n)
			gone := s.pods(func(p *corev1.Pod) bool { return p.Spec.NodeName == name })
			if s.Find(reconcile.NodesResource, "", name) != nil {
				s.must(reconcile.Request{Verb: reconcile.VerbDelete, Resource: reconcile.NodesResource, Name: name})
			}
			for _, p := range gone { // as the collector of pods does
				s.vanish(p)
			}
		}}
	},
	func(r *rand.Rand) step {
		n, t, on := r.IntN(5), nodeTaints[r.IntN(len(nodeTaints))], r.IntN(3) > 0
		return step{what: fmt.Sprintf("node n%d has the taint %s: %v", n, t.ToString(), on), do: func(s *side) {
			s.editNode(n, func(node *corev1.Node) {
				node.Spec.Taints = nil
				if on {
					node.Spec.Taints = []corev1.Taint{t}
				}
			})
		}}
	},
	func(r *rand.Rand) step {
		n, zone := r.IntN(5), []string{"a", "b"}[r.IntN(2)]
		return step{what: fmt.Sprintf("node n%d is in zone %s", n, zone), do: func(s *side) {
			s.editNode(n, func(node *corev1.Node) { node.Labels["zone"] = zone })
		}}
	},
}

func (s *side) addNode(n int, zone string) {
	name := fmt.Sprint("n", n)
	if s.Find(reconcile.NodesResource, "", name) == nil {
		s.create(&corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name, Labels: map[string]string{"zone": zone, corev1.LabelHostname: name}}})
	}
}

func (s *side) editNode(n int, change func(*corev1.Node)) {
	editIn(s, reconcile.NodesResource, "", fmt.Sprint("n", n), change)
}

func daemonSets(r *rand.Rand) []step {
	set := reconcile.DaemonSetsResource
	zoned := []map[string]string{nil, nil, {"zone": "a"}, {"zone": "b"}, {"zone": "c"}}
	make := func(r *rand.Rand) step {
		how, text := daemonStrategy(r)
		spec := appsv1.DaemonSetSpec{
			MinReadySeconds: int32(max(0, r.IntN(5)-2) * 15), RevisionHistoryLimit: ptr.To(int32(r.IntN(4))),
			UpdateStrategy: how, Selector: &metav1.LabelSelector{MatchLabels: app}, Template: template("v0"),
		}
		spec.Template.Spec.Tolerations = daemonTolerations[r.IntN(len(daemonTolerations))]
		spec.Template.Spec.NodeSelector = zoned[r.IntN(len(zoned)-1)]
		if r.IntN(6) == 0 {
			spec.Template.Spec.HostNetwork = true
			text += ", in the network of its host"
		}
		text = fmt.Sprintf("ready for %d seconds, %d old revisions, %s, tolerates %v, on %v", spec.MinReadySeconds, *spec.RevisionHistoryLimit, text, spec.Template.Spec.Tolerations, spec.Template.Spec.NodeSelector)
		return step{what: "DaemonSet web: " + text, do: func(s *side) {
			if s.Find(set, ns, "web") == nil {
				s.create(&appsv1.DaemonSet{ObjectMeta: named("web"), Spec: *spec.DeepCopy()})
			}
		}}
	}
	change := func(what string, do func(*appsv1.DaemonSet)) step {
		return step{what: what, do: func(s *side) { edit(s, set, "web", do) }}
	}
	roll := func(r *rand.Rand) step {
		v := fmt.Sprint("v", r.IntN(5))
		return change("template of "+v, func(d *appsv1.DaemonSet) { d.Spec.Template.Spec.Containers[0].Image = v })
	}
	serve := func(*rand.Rand) step { return step{what: "pods get on", do: (*side).serveDaemons} }
	own := []func(r *rand.Rand) step{roll, roll, roll, serve, serve, serve, serve, make,
		nodeSteps[0], nodeSteps[1], nodeSteps[2], nodeSteps[2], nodeSteps[3],
		func(r *rand.Rand) step {
			how, text := daemonStrategy(r)
			return change(text, func(d *appsv1.DaemonSet) { d.Spec.UpdateStrategy = how })
		},
		func(r *rand.Rand) step {
			n := int32(r.IntN(3) * 20)
			return change(fmt.Sprintf("ready for %d seconds", n), func(d *appsv1.DaemonSet) { d.Spec.MinReadySeconds = n })
		},
		func(r *rand.Rand) step {
			z := zoned[r.IntN(len(zoned))]
			return change(fmt.Sprintf("on %v", z), func(d *appsv1.DaemonSet) { d.Spec.Template.Spec.NodeSelector = z })
		},
		func(r *rand.Rand) step {
			t := daemonTolerations[r.IntN(len(daemonTolerations))]
			return change(fmt.Sprintf("tolerates %v", t), func(d *appsv1.DaemonSet) { d.Spec.Template.Spec.Tolerations = t })
		},
		func(r *rand.Rand) step {
			n := int32(r.IntN(3))
			return change(fmt.Sprintf("%d old revisions", n), func(d *appsv1.DaemonSet) { d.Spec.RevisionHistoryLimit = &n })
		},
		func(r *rand.Rand) step { return deletion(r, set, "web") },
		revisionGoes, revisionIsFreed,
	}
	first := step{"nodes n0, n1 in zone a and n2 in zone b are there", func(s *side) {
		for i := range 3 {
			s.addNode(i, string("aab"[i]))
		}
	}, time.Second}
	out := append([]step{first}, scenario(r, make(r), own)...)
	for i, s := range out {
		switch {
		case s.what == "pods get on":
			out[i].do = (*side).serveDaemons
		case strings.HasPrefix(s.what, "get node"):
			out[i].what, out[i].do = "are placed: all pods", func(s *side) {
				for _, p := range s.pods(waiting) {
					s.bindAimed(p)
				}
			}
		}
	}
	return leaveOut(out, "somebody makes the pod free-", "daemonsets web is deleted, Foreground", "controllers may not")
}
