package profiles

import (
	"cmp"
	"fmt"
	"reflect"
	"time"

	corev1 "k8s.io/api/core/v1"
	utilerrors "k8s.io/apimachinery/pkg/util/errors"
	"k8s.io/apimachinery/pkg/util/validation/field"
	configv1 "k8s.io/kube-scheduler/config/v1"
	"k8s.io/kubernetes/pkg/scheduler/apis/config"
	"k8s.io/kubernetes/pkg/scheduler/apis/config/latest"
	"k8s.io/kubernetes/pkg/scheduler/apis/config/scheme"
	"k8s.io/kubernetes/pkg/scheduler/apis/config/validation"
	"k8s.io/kubernetes/pkg/scheduler/framework/plugins/names"

	"timonel/sched"
)

// Parse reads the content of a file, YAML or JSON.
func Parse(content []byte) (sched.Config, error) {
	obj, gvk, err := scheme.Codecs.UniversalDecoder().Decode(content, nil, nil)
	if err != nil {
		return sched.Config{}, err
	}
	c, ok := obj.(*config.KubeSchedulerConfiguration)
	if !ok {
		return sched.Config{}, fmt.Errorf("it is of kind %s; want KubeSchedulerConfiguration of %s", gvk.Kind, configv1.SchemeGroupVersion)
	}
	c.APIVersion = gvk.GroupVersion().String()
	return Convert(c)
}

// Convert makes sched's configuration of upstream's, which has its defaults. An error
// names each field that is wrong.
func Convert(c *config.KubeSchedulerConfiguration) (sched.Config, error) {
	out := sched.DefaultConfig()
	if err := validation.ValidateKubeSchedulerConfiguration(c); err != nil {
		return out, err
	}
	var errs field.ErrorList
	if len(c.Extenders) > 0 {
		errs = append(errs, field.Forbidden(field.NewPath("extenders"), "extenders are not called by this scheduler; leave them out"))
	}
	defaults, err := latest.Default()
	if err != nil {
		return out, err
	}
	out.FirstBackoff = time.Duration(c.PodInitialBackoffSeconds) * time.Second
	out.LastBackoff = time.Duration(c.PodMaxBackoffSeconds) * time.Second
	out.Profiles = nil
	for i := range c.Profiles {
		from, at := &c.Profiles[i], field.NewPath("profiles").Index(i)
		p := sched.DefaultProfile()
		p.SchedulerName = from.SchedulerName
		if share := cmp.Or(from.PercentageOfNodesToScore, c.PercentageOfNodesToScore); share != nil {
			p.PercentageOfNodesToScore = *share
		}
		errs = append(errs, apply(from.Plugins, at.Child("plugins"), &p)...)
		for j := range from.PluginConfig {
			errs = append(errs, configure(&from.PluginConfig[j], at.Child("pluginConfig").Index(j), &p, defaults)...)
		}
		out.Profiles = append(out.Profiles, p)
	}
	if len(errs) > 0 {
		return out, utilerrors.Flatten(utilerrors.NewAggregate([]error{errs.ToAggregate()}))
	}
	return out, out.Validate()
}

// configure carries over the arguments of one plugin.
func configure(from *config.PluginConfig, at *field.Path, p *sched.Profile, defaults *config.KubeSchedulerConfiguration) field.ErrorList {
	path := at.Child("args")
	switch args := from.Args.(type) {
	case *config.NodeResourcesFitArgs:
		if err := validation.ValidateNodeResourcesFitArgs(path, args); err != nil {
			return field.ErrorList{field.Invalid(path, from.Name, err.Error())}
		}
		p.IgnoredResources, p.IgnoredResourceGroups = args.IgnoredResources, args.IgnoredResourceGroups
		p.Fit = sched.FitScore{Strategy: sched.Strategy(args.ScoringStrategy.Type)}
		for _, r := range args.ScoringStrategy.Resources {
			p.Fit.Resources = append(p.Fit.Resources, sched.WeightedResource{Name: corev1.ResourceName(r.Name), Weight: r.Weight})
		}
		if ratio := args.ScoringStrategy.RequestedToCapacityRatio; ratio != nil {
			p.Fit.Shape = shape(ratio.Shape)
		}
	case *config.NodeResourcesBalancedAllocationArgs:
		p.Balanced = nil
		for _, r := range args.Resources {
			p.Balanced = append(p.Balanced, corev1.ResourceName(r.Name))
		}
	case *config.PodTopologySpreadArgs:
		if args.DefaultingType == config.ListDefaulting {
			p.DefaultSpread = append([]corev1.TopologySpreadConstraint{}, args.DefaultConstraints...)
		}
	case *config.InterPodAffinityArgs:
		p.HardPodAffinityWeight = args.HardPodAffinityWeight
		p.IgnorePreferredTermsOfExistingPods = args.IgnorePreferredTermsOfExistingPods
	case *config.NodeAffinityArgs:
		p.AddedAffinity = args.AddedAffinity
	case *config.DefaultPreemptionArgs:
		p.PreemptionCandidatesPercentage, p.PreemptionCandidatesMin = args.MinCandidateNodesPercentage, args.MinCandidateNodesAbsolute
	case *config.VolumeBindingArgs:
		p.VolumeShape = shape(args.Shape)
		if !sameTimeout(args, defaults) {
			return field.ErrorList{field.Forbidden(path.Child("bindTimeoutSeconds"), "a pod waits for its volumes for as long as they take; leave it out")}
		}
	case *config.DynamicResourcesArgs:
		if d := args.BindingTimeout; d != nil {
			p.DeviceBindingTimeout = d.Duration
		}
		same := args.DeepCopy()
		for _, d := range defaults.Profiles[0].PluginConfig {
			if d, ok := d.Args.(*config.DynamicResourcesArgs); ok {
				same.BindingTimeout = d.BindingTimeout
			}
		}
		if !isDefault(&config.PluginConfig{Name: from.Name, Args: same}, defaults) {
			return field.ErrorList{field.Forbidden(path.Child("filterTimeout"), "the search for devices is bounded by its steps, not by time; leave it out")}
		}
	default:
		if !isDefault(from, defaults) {
			return field.ErrorList{field.Forbidden(path, "plugin "+from.Name+" takes no arguments here; leave them out")}
		}
	}
	return nil
}

// isDefault says whether a plugin's arguments are those that it has anyway.
func isDefault(from *config.PluginConfig, defaults *config.KubeSchedulerConfiguration) bool {
	for _, d := range defaults.Profiles[0].PluginConfig {
		if d.Name == from.Name {
			return reflect.DeepEqual(d.Args, from.Args)
		}
	}
	return false
}

func sameTimeout(args *config.VolumeBindingArgs, defaults *config.KubeSchedulerConfiguration) bool {
	same := args.DeepCopy()
	for _, d := range defaults.Profiles[0].PluginConfig {
		if d, ok := d.Args.(*config.VolumeBindingArgs); ok {
			same.Shape = d.Shape
		}
	}
	return isDefault(&config.PluginConfig{Name: names.VolumeBinding, Args: same}, defaults)
}

// shape has scores of 0 to 100, the file's are of 0 to 10.
func shape(from []config.UtilizationShapePoint) (out []sched.UtilizationPoint) {
	for _, p := range from {
		out = append(out, sched.UtilizationPoint{Utilization: int64(p.Utilization), Score: 10 * int64(p.Score)})
	}
	return out
}
