package sched

import (
	"fmt"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
)

// Profile is one way to place pods: those that name it. Start from [DefaultProfile].
type Profile struct {
	// SchedulerName is the spec.schedulerName of the pods that are placed so.
	// Default: "default-scheduler".
	SchedulerName string

	// Without are the filters that are not asked. Default: none.
	Without Filters

	// Weights multiply each score, 0 to 100 per node, before they are added.
	Weights Weights

	// Fit says how nodes are scored by what is free on them. Default: [LeastAllocated]
	// of CPU and memory, both of weight 1.
	Fit FitScore

	// Balanced are the resources whose shares in use are to be alike. Default: CPU and
	// memory.
	Balanced []corev1.ResourceName

	// IgnoredResources are extended resources that pods get on any node; those whose
	// names begin with one of IgnoredResourceGroups and a slash are ignored too.
	IgnoredResources      []string
	IgnoredResourceGroups []string

	// AddedAffinity is what all pods ask of nodes besides what each asks for itself.
	AddedAffinity *corev1.NodeAffinity

	// HardPodAffinityWeight is the preference, 0 to 100, for nodes where
	// running pods require (not only prefer) affinity to the new pod.
	// Default: 1.
	HardPodAffinityWeight int32

	// IgnorePreferredTermsOfExistingPods leaves the terms of running pods out of the
	// score of a pod that prefers no pods itself. Default: false.
	IgnorePreferredTermsOfExistingPods bool

	// PercentageOfNodesToScore ends the search for feasible nodes when this
	// share of all nodes, and at least 100, were found. 0 adapts: 50 % at 100
	// nodes down to 10 % at 5,000, never below 5 %. Default: 0.
	PercentageOfNodesToScore int32

	// DefaultSpread holds the constraints of pods that have none of their own;
	// the selectors are derived from the Services, ReplicaSet, StatefulSet or
	// ReplicationController the pod belongs to, so LabelSelector must be nil.
	// Nil means upstream's: ScheduleAnyway over hostname (skew 3) and zone
	// (skew 5). Empty and not nil means none.
	DefaultSpread []corev1.TopologySpreadConstraint

	// VolumeShape scores nodes by how much of the volumes that a pod's claims would be
	// bound to there is requested. Default: the less the better.
	VolumeShape []UtilizationPoint

	// DeviceBindingTimeout is how long a pod waits for its devices to be made ready (their
	// BindingConditions) before others are tried. Default: 10 min.
	DeviceBindingTimeout time.Duration

	// DisablePreemption leaves running pods alone even when a pod of higher
	// priority fits nowhere. Default: false.
	DisablePreemption bool

	// PreemptionCandidatesPercentage and PreemptionCandidatesMin bound how many
	// nodes are examined for victims: the larger of the share of the nodes
	// where evictions could help and the absolute number. Default: 10 and 100.
	PreemptionCandidatesPercentage int32
	PreemptionCandidatesMin        int32
}

// Filters is a set of filters, each upstream's plugin of that name. That of VolumeBinding
// is always asked: nobody else binds the claims that wait for a pod's node.
type Filters uint32

// The filters, in the order in which they are asked.
const (
	FilterNodeUnschedulable Filters = 1 << iota
	FilterTaintToleration
	FilterNodeAffinity
	FilterNodePorts
	FilterNodeResourcesFit
	FilterVolumeRestrictions
	FilterNodeVolumeLimits
	FilterVolumeZone
	FilterPodTopologySpread
	FilterInterPodAffinity
	FilterDynamicResources
	FilterNodeDeclaredFeatures

	allFilters = 1<<iota - 1
)

// Weights are the multipliers of the scores. A weight of 0 leaves a score out.
type Weights struct {
	TaintToleration  int64 // default 3
	NodeAffinity     int64 // default 2
	TopologySpread   int64 // default 2
	PodAffinity      int64 // default 2
	Fit              int64 // default 1
	BalancedResource int64 // default 1
	ImageLocality    int64 // default 1
	VolumeBinding    int64 // default 1
	DynamicResources int64 // default 2
}

// FitScore says how nodes are scored by what is free on them.
type FitScore struct {
	Strategy  Strategy
	Resources []WeightedResource
	// Shape is the score by utilization, of the strategy RequestedToCapacityRatio alone.
	Shape []UtilizationPoint
}

// Strategy is how what is free on a node makes a score.
type Strategy string

// The strategies: nodes with much free are preferred, or with little, or as a shape says.
const (
	LeastAllocated           Strategy = "LeastAllocated"
	MostAllocated            Strategy = "MostAllocated"
	RequestedToCapacityRatio Strategy = "RequestedToCapacityRatio"
)

// WeightedResource is a resource with its weight among others, 1 to 100.
type WeightedResource struct {
	Name   corev1.ResourceName
	Weight int64
}

// UtilizationPoint is the score, 0 to 100, at a utilization, in percent. Between two
// points the score is on the line from one to the other.
type UtilizationPoint struct{ Utilization, Score int64 }

// DefaultProfile returns upstream's default profile.
func DefaultProfile() Profile {
	return Profile{
		SchedulerName: corev1.DefaultSchedulerName,
		Weights: Weights{
			TaintToleration:  3,
			NodeAffinity:     2,
			TopologySpread:   2,
			PodAffinity:      2,
			Fit:              1,
			BalancedResource: 1,
			ImageLocality:    1,
			VolumeBinding:    1,
			DynamicResources: 2,
		},
		Fit:                            FitScore{Strategy: LeastAllocated, Resources: []WeightedResource{{corev1.ResourceCPU, 1}, {corev1.ResourceMemory, 1}}},
		Balanced:                       []corev1.ResourceName{corev1.ResourceCPU, corev1.ResourceMemory},
		VolumeShape:                    []UtilizationPoint{{0, maxScore}, {100, 0}},
		HardPodAffinityWeight:          1,
		DeviceBindingTimeout:           10 * time.Minute,
		PreemptionCandidatesPercentage: 10,
		PreemptionCandidatesMin:        100,
	}
}

func (p *Profile) validate(at string) error {
	if p.SchedulerName == "" {
		return fmt.Errorf("sched: %s.SchedulerName is empty; start from DefaultProfile()", at)
	}
	if p.DeviceBindingTimeout < time.Second {
		return fmt.Errorf("sched: %s.DeviceBindingTimeout is %s; want at least 1s", at, p.DeviceBindingTimeout)
	}
	if p.Without&^allFilters != 0 {
		return fmt.Errorf("sched: %s.Without has unknown filters %#x", at, p.Without&^allFilters)
	}
	fields := []numericField{
		{"Weights.TaintToleration", p.Weights.TaintToleration, 0, 1e6},
		{"Weights.NodeAffinity", p.Weights.NodeAffinity, 0, 1e6},
		{"Weights.TopologySpread", p.Weights.TopologySpread, 0, 1e6},
		{"Weights.PodAffinity", p.Weights.PodAffinity, 0, 1e6},
		{"Weights.Fit", p.Weights.Fit, 0, 1e6},
		{"Weights.BalancedResource", p.Weights.BalancedResource, 0, 1e6},
		{"Weights.ImageLocality", p.Weights.ImageLocality, 0, 1e6},
		{"Weights.VolumeBinding", p.Weights.VolumeBinding, 0, 1e6},
		{"Weights.DynamicResources", p.Weights.DynamicResources, 0, 1e6},
		{"HardPodAffinityWeight", int64(p.HardPodAffinityWeight), 0, 100},
		{"PercentageOfNodesToScore", int64(p.PercentageOfNodesToScore), 0, 100},
		{"PreemptionCandidatesPercentage", int64(p.PreemptionCandidatesPercentage), 0, 100},
		{"PreemptionCandidatesMin", int64(p.PreemptionCandidatesMin), 0, 1e9},
	}
	for i, r := range p.Fit.Resources {
		fields = append(fields, numericField{fmt.Sprintf("Fit.Resources[%d].Weight", i), r.Weight, 1, 100})
	}
	if err := inRange(at, fields); err != nil {
		return err
	}
	switch p.Fit.Strategy {
	case LeastAllocated, MostAllocated:
		if len(p.Fit.Shape) > 0 {
			return fmt.Errorf("sched: %s.Fit.Shape is set; it is of %s alone", at, RequestedToCapacityRatio)
		}
	case RequestedToCapacityRatio:
		if err := validateShape(at+".Fit.Shape", p.Fit.Shape); err != nil {
			return err
		}
	default:
		return fmt.Errorf("sched: %s.Fit.Strategy is %q; want %s, %s or %s", at, p.Fit.Strategy, LeastAllocated, MostAllocated, RequestedToCapacityRatio)
	}
	if err := validateShape(at+".VolumeShape", p.VolumeShape); err != nil {
		return err
	}
	for i, s := range p.DefaultSpread {
		at := fmt.Sprintf("sched: %s.DefaultSpread[%d]", at, i)
		switch {
		case s.TopologyKey == "":
			return fmt.Errorf("%s.TopologyKey is empty; name a node label", at)
		case s.MaxSkew < 1:
			return fmt.Errorf("%s.MaxSkew is %d; want at least 1", at, s.MaxSkew)
		case s.LabelSelector != nil:
			return fmt.Errorf("%s.LabelSelector is set; it is derived from each pod's owners", at)
		case s.WhenUnsatisfiable != corev1.DoNotSchedule && s.WhenUnsatisfiable != corev1.ScheduleAnyway:
			return fmt.Errorf("%s.WhenUnsatisfiable is %q; want DoNotSchedule or ScheduleAnyway", at, s.WhenUnsatisfiable)
		}
	}
	return nil
}

func validateShape(at string, shape []UtilizationPoint) error {
	if len(shape) == 0 {
		return fmt.Errorf("sched: %s is empty; name at least one point", at)
	}
	for i, p := range shape {
		if err := inRange(fmt.Sprintf("%s[%d]", at, i), []numericField{{"Utilization", p.Utilization, 0, 100}, {"Score", p.Score, 0, maxScore}}); err != nil {
			return err
		}
		if i > 0 && shape[i-1].Utilization >= p.Utilization {
			return fmt.Errorf("sched: %s[%d].Utilization is %d; points are in rising order", at, i, p.Utilization)
		}
	}
	return nil
}

// along is the score at a utilization, which is no more than 100.
func along(shape []UtilizationPoint, utilization int64) int64 {
	for i, p := range shape {
		if utilization > p.Utilization {
			continue
		}
		if i == 0 {
			return p.Score
		}
		before := shape[i-1]
		return before.Score + (p.Score-before.Score)*(utilization-before.Utilization)/(p.Utilization-before.Utilization)
	}
	return shape[len(shape)-1].Score
}

// utilized is the score of a share of a whole; what exceeds it counts as all of it.
func utilized(shape []UtilizationPoint, part, whole int64) int64 {
	if whole == 0 || part > whole {
		return along(shape, 100)
	}
	return along(shape, part*100/whole)
}

// asks says whether a filter is asked.
func (p *profile) asks(f Filters) bool { return p.Without&f == 0 }

// ignored says whether pods get an extended resource on any node.
func (p *profile) ignored(name corev1.ResourceName) bool {
	if !p.ignores || !isExtended(name) {
		return false
	}
	group, _, _ := strings.Cut(string(name), "/")
	return slices.Contains(p.IgnoredResources, string(name)) || slices.Contains(p.IgnoredResourceGroups, group)
}

// defaultSpread returns the constraints of pods without their own, and whether
// they are upstream's: those tolerate nodes that lack a topology label.
func (p *Profile) defaultSpread() (constraints []corev1.TopologySpreadConstraint, system bool) {
	if p.DefaultSpread != nil {
		return p.DefaultSpread, false
	}
	return []corev1.TopologySpreadConstraint{
		{TopologyKey: corev1.LabelHostname, MaxSkew: 3, WhenUnsatisfiable: corev1.ScheduleAnyway},
		{TopologyKey: corev1.LabelTopologyZone, MaxSkew: 5, WhenUnsatisfiable: corev1.ScheduleAnyway},
	}, true
}
