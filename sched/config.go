package sched

import (
	"fmt"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/util/version"
)

// Config says how pods are placed. Start from [DefaultConfig].
type Config struct {
	// SchedulerName is the spec.schedulerName of the pods that are placed;
	// pods that name another scheduler are left alone.
	// Default: "default-scheduler".
	SchedulerName string

	// Weights multiply each score, 0 to 100 per node, before they are added.
	Weights Weights

	// HardPodAffinityWeight is the preference, 0 to 100, for nodes where
	// running pods require (not only prefer) affinity to the new pod.
	// Default: 1.
	HardPodAffinityWeight int32

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

	// DisablePreemption leaves running pods alone even when a pod of higher
	// priority fits nowhere. Default: false.
	DisablePreemption bool

	// PreemptionCandidatesPercentage and PreemptionCandidatesMin bound how many
	// nodes are examined for victims: the larger of the share of the nodes
	// where evictions could help and the absolute number. Default: 10 and 100.
	PreemptionCandidatesPercentage int32
	PreemptionCandidatesMin        int32

	// MaxPods ends a call after this many pods were tried, so that a long queue
	// is committed in portions; [Plan.Remaining] counts the rest. 0: no limit.
	// Default: 0.
	MaxPods int

	// MaxVictimSearches ends a call after this many pods looked for victims on
	// nodes that have any, which in large clusters takes milliseconds. The
	// caller leaves pods that failed aside for a while ([Input.Skip]), lest the
	// next call search for the same ones. 0: no limit. Default: 64.
	MaxVictimSearches int

	// Version is the Kubernetes version whose node features pods may require.
	// Default: 1.37.
	Version *version.Version
}

// Weights are the multipliers of the scores. A weight of 0 leaves a score out.
type Weights struct {
	TaintToleration  int64 // default 3
	NodeAffinity     int64 // default 2
	TopologySpread   int64 // default 2
	PodAffinity      int64 // default 2
	LeastAllocated   int64 // default 1
	BalancedResource int64 // default 1
	ImageLocality    int64 // default 1
}

// DefaultConfig returns upstream's defaults.
func DefaultConfig() Config {
	return Config{
		SchedulerName: corev1.DefaultSchedulerName,
		Weights: Weights{
			TaintToleration:  3,
			NodeAffinity:     2,
			TopologySpread:   2,
			PodAffinity:      2,
			LeastAllocated:   1,
			BalancedResource: 1,
			ImageLocality:    1,
		},
		HardPodAffinityWeight:          1,
		PreemptionCandidatesPercentage: 10,
		PreemptionCandidatesMin:        100,
		MaxVictimSearches:              64,
		Version:                        version.MajorMinor(1, 37),
	}
}

// Validate returns an error that names the first field with an impossible value.
func (c Config) Validate() error {
	if c.SchedulerName == "" {
		return fmt.Errorf("sched: Config.SchedulerName is empty; start from DefaultConfig()")
	}
	if c.Version == nil {
		return fmt.Errorf("sched: Config.Version is nil; start from DefaultConfig()")
	}
	for _, f := range []struct {
		name      string
		value     int64
		low, high int64
	}{
		{"Weights.TaintToleration", c.Weights.TaintToleration, 0, 1e6},
		{"Weights.NodeAffinity", c.Weights.NodeAffinity, 0, 1e6},
		{"Weights.TopologySpread", c.Weights.TopologySpread, 0, 1e6},
		{"Weights.PodAffinity", c.Weights.PodAffinity, 0, 1e6},
		{"Weights.LeastAllocated", c.Weights.LeastAllocated, 0, 1e6},
		{"Weights.BalancedResource", c.Weights.BalancedResource, 0, 1e6},
		{"Weights.ImageLocality", c.Weights.ImageLocality, 0, 1e6},
		{"HardPodAffinityWeight", int64(c.HardPodAffinityWeight), 0, 100},
		{"PercentageOfNodesToScore", int64(c.PercentageOfNodesToScore), 0, 100},
		{"PreemptionCandidatesPercentage", int64(c.PreemptionCandidatesPercentage), 0, 100},
		{"PreemptionCandidatesMin", int64(c.PreemptionCandidatesMin), 0, 1e9},
		{"MaxPods", int64(c.MaxPods), 0, 1e9},
		{"MaxVictimSearches", int64(c.MaxVictimSearches), 0, 1e9},
	} {
		if f.value < f.low || f.value > f.high {
			return fmt.Errorf("sched: Config.%s is %d; want %d to %d", f.name, f.value, f.low, f.high)
		}
	}
	for i, s := range c.DefaultSpread {
		at := fmt.Sprintf("sched: Config.DefaultSpread[%d]", i)
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

// defaultSpread returns the constraints of pods without their own, and whether
// they are upstream's: those tolerate nodes that lack a topology label.
func (c *Config) defaultSpread() (constraints []corev1.TopologySpreadConstraint, system bool) {
	if c.DefaultSpread != nil {
		return c.DefaultSpread, false
	}
	return []corev1.TopologySpreadConstraint{
		{TopologyKey: corev1.LabelHostname, MaxSkew: 3, WhenUnsatisfiable: corev1.ScheduleAnyway},
		{TopologyKey: corev1.LabelTopologyZone, MaxSkew: 5, WhenUnsatisfiable: corev1.ScheduleAnyway},
	}, true
}
