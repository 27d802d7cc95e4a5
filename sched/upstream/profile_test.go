package upstream

import (
	corev1 "k8s.io/api/core/v1"
	configv1 "k8s.io/kube-scheduler/config/v1"
	"k8s.io/kubernetes/pkg/scheduler/apis/config"
	"k8s.io/kubernetes/pkg/scheduler/apis/config/latest"
	"k8s.io/kubernetes/pkg/scheduler/apis/config/scheme"
	"k8s.io/kubernetes/pkg/scheduler/framework/plugins/names"
	"pgregory.net/rapid"
)

// drawConfig draws a file's content with one profile: plugins left out, weights, and
// arguments of all that take some.
func drawConfig(t *rapid.T) *config.KubeSchedulerConfiguration {
	profile := configv1.KubeSchedulerProfile{Plugins: &configv1.Plugins{}}
	p, without := profile.Plugins, map[string]bool{}
	for _, name := range []string{
		names.NodeUnschedulable, names.TaintToleration, names.NodeAffinity, names.NodePorts, names.NodeResourcesFit, names.VolumeRestrictions,
		names.NodeVolumeLimits, names.VolumeZone, names.PodTopologySpread, names.InterPodAffinity, names.DynamicResources, names.NodeDeclaredFeatures,
		names.NodeResourcesBalancedAllocation, names.ImageLocality,
	} {
		if one(t, 10, "without "+name) {
			p.MultiPoint.Disabled = append(p.MultiPoint.Disabled, configv1.Plugin{Name: name})
			without[name] = true
		}
	}
	for _, name := range []string{
		names.TaintToleration, names.NodeAffinity, names.NodeResourcesFit, names.PodTopologySpread, names.InterPodAffinity,
		names.NodeResourcesBalancedAllocation, names.ImageLocality, names.VolumeBinding, names.DynamicResources,
	} {
		switch choice := rapid.IntRange(0, 9).Draw(t, "score of "+name); {
		case choice == 0:
			p.Score.Disabled = append(p.Score.Disabled, configv1.Plugin{Name: name})
		case choice == 1 && !without[name]:
			weight := int32(rapid.IntRange(0, 9).Draw(t, "weight"))
			p.Score.Enabled = append(p.Score.Enabled, configv1.Plugin{Name: name, Weight: &weight})
		}
	}
	for _, name := range []string{names.PodTopologySpread, names.InterPodAffinity, names.NodeResourcesFit, names.NodePorts} {
		if one(t, 10, "no filter "+name) {
			p.Filter.Disabled = append(p.Filter.Disabled, configv1.Plugin{Name: name})
		}
	}
	c := &configv1.KubeSchedulerConfiguration{Profiles: []configv1.KubeSchedulerProfile{profile}}
	scheme.Scheme.Default(c)
	defaults, err := latest.Default() // a conversion's result, whose arguments can be drawn anew
	if err != nil {
		t.Fatal(err)
	}
	out := &config.KubeSchedulerConfiguration{}
	if err := scheme.Scheme.Convert(c, out, nil); err != nil {
		t.Fatal(err)
	}
	out.APIVersion = defaults.APIVersion
	for i := range out.Profiles[0].PluginConfig {
		drawArgs(t, out.Profiles[0].PluginConfig[i].Args)
	}
	return out
}

func drawArgs(t *rapid.T, args any) {
	if rapid.Bool().Draw(t, "default arguments") {
		return
	}
	// Points of a shape, in rising order.
	shape := func() (out []config.UtilizationShapePoint) {
		for at := rapid.Int32Range(0, 40).Draw(t, "utilization"); at <= 100; at += rapid.Int32Range(10, 60).Draw(t, "further") {
			out = append(out, config.UtilizationShapePoint{Utilization: at, Score: rapid.Int32Range(0, 10).Draw(t, "score")})
		}
		return out
	}
	switch args := args.(type) {
	case *config.NodeResourcesFitArgs:
		if one(t, 3, "ignored") {
			args.IgnoredResources = []string{"example.com/gpu"}
		}
		if one(t, 3, "ignored group") {
			args.IgnoredResourceGroups = []string{"example.com"}
		}
		args.ScoringStrategy.Type = rapid.SampledFrom([]config.ScoringStrategyType{config.LeastAllocated, config.MostAllocated, config.RequestedToCapacityRatio}).Draw(t, "strategy")
		args.ScoringStrategy.Resources = nil
		for _, name := range []string{"cpu", "memory", "ephemeral-storage", "example.com/gpu", "pods"} {
			if rapid.Bool().Draw(t, name) {
				args.ScoringStrategy.Resources = append(args.ScoringStrategy.Resources, config.ResourceSpec{Name: name, Weight: rapid.Int64Range(1, 9).Draw(t, "weight")})
			}
		}
		if len(args.ScoringStrategy.Resources) == 0 {
			args.ScoringStrategy.Resources = []config.ResourceSpec{{Name: "memory", Weight: 1}}
		}
		if args.ScoringStrategy.Type == config.RequestedToCapacityRatio {
			args.ScoringStrategy.RequestedToCapacityRatio = &config.RequestedToCapacityRatioParam{Shape: shape()}
		}
	case *config.NodeResourcesBalancedAllocationArgs:
		args.Resources = nil
		for _, name := range []string{"cpu", "memory", "ephemeral-storage", "example.com/gpu"} {
			if rapid.Bool().Draw(t, name) {
				args.Resources = append(args.Resources, config.ResourceSpec{Name: name, Weight: 1})
			}
		}
		if len(args.Resources) == 0 {
			args.Resources = []config.ResourceSpec{{Name: "cpu", Weight: 1}}
		}
	case *config.PodTopologySpreadArgs:
		args.DefaultingType = config.ListDefaulting
		for _, key := range []string{corev1.LabelTopologyZone, corev1.LabelHostname} {
			if rapid.Bool().Draw(t, key) {
				args.DefaultConstraints = append(args.DefaultConstraints, corev1.TopologySpreadConstraint{TopologyKey: key, MaxSkew: rapid.Int32Range(1, 3).Draw(t, "skew"),
					WhenUnsatisfiable: rapid.SampledFrom([]corev1.UnsatisfiableConstraintAction{corev1.DoNotSchedule, corev1.ScheduleAnyway}).Draw(t, "else")})
			}
		}
	case *config.InterPodAffinityArgs:
		args.HardPodAffinityWeight = rapid.Int32Range(0, 100).Draw(t, "hard weight")
		args.IgnorePreferredTermsOfExistingPods = rapid.Bool().Draw(t, "ignore preferred")
	case *config.NodeAffinityArgs:
		term := corev1.NodeSelectorTerm{MatchExpressions: []corev1.NodeSelectorRequirement{{Key: "disk", Operator: corev1.NodeSelectorOpIn, Values: []string{"ssd"}}}}
		args.AddedAffinity = &corev1.NodeAffinity{PreferredDuringSchedulingIgnoredDuringExecution: []corev1.PreferredSchedulingTerm{{Weight: 3, Preference: term}}}
		if rapid.Bool().Draw(t, "required") {
			args.AddedAffinity.RequiredDuringSchedulingIgnoredDuringExecution = &corev1.NodeSelector{NodeSelectorTerms: []corev1.NodeSelectorTerm{term}}
		}
	case *config.VolumeBindingArgs:
		args.Shape = shape()
	}
}
