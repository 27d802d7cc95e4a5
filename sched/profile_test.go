package sched

import (
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	"k8s.io/apimachinery/pkg/runtime"
)

// Each pod is placed as the profile says that it names, and the pods of no profile are
// left alone.
func TestProfiles(t *testing.T) {
	t.Parallel()
	busy := func(edit func(*corev1.Node)) []runtime.Object {
		a, b := makeNode("a"), makeNode("b")
		a.Labels["disk"], b.Labels["disk"] = "ssd", "hdd"
		if edit != nil {
			edit(a)
		}
		return []runtime.Object{a, b, running("r", "a", "cpu", "2", "memory", "2Gi")}
	}
	required := &corev1.NodeSelector{NodeSelectorTerms: []corev1.NodeSelectorTerm{{MatchExpressions: []corev1.NodeSelectorRequirement{{Key: "disk", Operator: "In", Values: []string{"ssd"}}}}}}
	for name, tc := range map[string]struct {
		profile func(*Profile)
		pod     func(*corev1.Pod)
		objects []runtime.Object
		want    string // node, or a part of the failure
	}{
		"default":        {objects: busy(nil), want: "b"},
		"most allocated": {profile: func(p *Profile) { p.Fit.Strategy = MostAllocated }, objects: busy(nil), want: "a"},
		"as a shape says": {profile: func(p *Profile) {
			p.Fit = FitScore{Strategy: RequestedToCapacityRatio, Resources: p.Fit.Resources, Shape: []UtilizationPoint{{0, 0}, {100, 100}}}
		}, objects: busy(nil), want: "a"},
		"another resource": {profile: func(p *Profile) {
			p.Fit = FitScore{Strategy: MostAllocated, Resources: []WeightedResource{{"example.com/gpu", 5}}}
			p.Weights.BalancedResource = 0
		}, pod: func(p *corev1.Pod) {
			p.Spec.Containers[0].Resources = container("example.com/gpu", "1").Resources
		}, objects: func() []runtime.Object {
			list := busy(func(n *corev1.Node) { n.Status.Allocatable["example.com/gpu"] = resource.MustParse("8") })
			b := list[1].(*corev1.Node)
			b.Status.Allocatable["example.com/gpu"] = resource.MustParse("2")
			return list
		}(), want: "b"},
		"an ignored resource": {profile: func(p *Profile) { p.IgnoredResourceGroups = []string{"example.com"} }, pod: func(p *corev1.Pod) {
			p.Spec.Containers[0].Resources = container("example.com/gpu", "1").Resources
		}, objects: busy(nil), want: "b"},
		"no resource of another group": {profile: func(p *Profile) { p.IgnoredResourceGroups = []string{"example"} }, pod: func(p *corev1.Pod) {
			p.Spec.Containers[0].Resources = container("example.com/gpu", "1").Resources
		}, objects: busy(nil), want: "2 Insufficient example.com/gpu"},
		"without the filter of resources": {profile: func(p *Profile) { p.Without = FilterNodeResourcesFit }, pod: func(p *corev1.Pod) {
			p.Spec.Containers[0].Resources = container("cpu", "100").Resources
		}, objects: busy(nil), want: "b"},
		"without the filter of the mark": {profile: func(p *Profile) { p.Without = FilterNodeUnschedulable; p.Fit.Strategy = MostAllocated },
			objects: busy(func(n *corev1.Node) { n.Spec.Unschedulable = true }), want: "a"},
		"added affinity": {profile: func(p *Profile) {
			p.AddedAffinity = &corev1.NodeAffinity{RequiredDuringSchedulingIgnoredDuringExecution: required}
		}, objects: busy(nil), want: "a"},
		"added affinity, nowhere": {profile: func(p *Profile) {
			p.AddedAffinity = &corev1.NodeAffinity{RequiredDuringSchedulingIgnoredDuringExecution: required}
		}, objects: busy(func(n *corev1.Node) { n.Labels = nil }), want: "2 node(s) didn't match scheduler-enforced node affinity"},
		"preferred by the profile": {profile: func(p *Profile) {
			p.AddedAffinity = &corev1.NodeAffinity{PreferredDuringSchedulingIgnoredDuringExecution: []corev1.PreferredSchedulingTerm{{Weight: 1, Preference: required.NodeSelectorTerms[0]}}}
		}, objects: busy(nil), want: "a"},
		"of no profile": {pod: func(p *corev1.Pod) { p.Spec.SchedulerName = "unknown" }, objects: busy(nil), want: ""},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			pod := simplePod("p", "cpu", "100m", "memory", "100Mi")
			pod.Spec.SchedulerName = "mine"
			if tc.pod != nil {
				tc.pod(pod)
			}
			cfg, mine := DefaultConfig(), DefaultProfile()
			mine.SchedulerName = "mine"
			if tc.profile != nil {
				tc.profile(&mine)
			}
			cfg.Profiles = append(cfg.Profiles, mine)
			plan, err := Schedule(cfg, Input{Now: epoch, State: newState(append(tc.objects, pod)...)})
			if err != nil {
				t.Fatal(err)
			}
			switch {
			case len(plan.Bindings) == 1 && plan.Bindings[0].Node == tc.want:
			case len(plan.Failures) == 1 && tc.want != "" && strings.Contains(plan.Failures[0].Message, tc.want):
			case tc.want == "" && len(plan.Bindings)+len(plan.Failures) == 0:
			default:
				t.Errorf("%+v", plan)
			}
		})
	}
}
