package sched

import (
	"fmt"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/util/version"
	"k8s.io/component-helpers/scheduling/corev1/nodeaffinity"
	"k8s.io/dynamic-resource-allocation/cel"
)

// Config says how pods are placed. Start from [DefaultConfig].
type Config struct {
	// Profiles are the ways to place pods, by the spec.schedulerName of the pods
	// that each is for; pods that name none of them are left alone.
	// Default: one, [DefaultProfile].
	Profiles []Profile

	// FirstBackoff and LastBackoff bound for how long a pod that could not be placed
	// is left alone though something may have cured it: it doubles from try to try.
	// Default: 1 s and 10 s.
	FirstBackoff, LastBackoff time.Duration

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

	// Devices are the features of dynamic resource allocation. Default: as upstream's.
	Devices Devices
}

// DefaultConfig returns upstream's defaults.
func DefaultConfig() Config {
	return Config{
		Profiles:     []Profile{DefaultProfile()},
		FirstBackoff: time.Second, LastBackoff: 10 * time.Second,
		MaxVictimSearches: 64,
		Version:           version.MajorMinor(1, 37),
		Devices:           defaultDevices(),
	}
}

// Validate returns an error that names the first field with an impossible value.
func (c Config) Validate() error {
	_, err := c.compile()
	return err
}

func (c Config) validate() error {
	if len(c.Profiles) == 0 {
		return fmt.Errorf("sched: Config.Profiles is empty; start from DefaultConfig()")
	}
	if c.Version == nil {
		return fmt.Errorf("sched: Config.Version is nil; start from DefaultConfig()")
	}
	if c.FirstBackoff <= 0 || c.LastBackoff < c.FirstBackoff {
		return fmt.Errorf("sched: Config.FirstBackoff is %s and LastBackoff %s; want more than 0, and the last no less than the first", c.FirstBackoff, c.LastBackoff)
	}
	if err := inRange("Config", []numericField{
		{"MaxPods", int64(c.MaxPods), 0, 1e9},
		{"MaxVictimSearches", int64(c.MaxVictimSearches), 0, 1e9},
	}); err != nil {
		return err
	}
	names := map[string]int{}
	for i := range c.Profiles {
		at := fmt.Sprintf("Config.Profiles[%d]", i)
		if err := c.Profiles[i].validate(at); err != nil {
			return err
		}
		name := c.Profiles[i].SchedulerName
		if other, taken := names[name]; taken {
			return fmt.Errorf("sched: %s.SchedulerName is %q, as that of Profiles[%d]; names are unique", at, name, other)
		}
		names[name] = i
	}
	return nil
}

// numericField is a field that holds a number from low to high.
type numericField struct {
	name      string
	value     int64
	low, high int64
}

func inRange(at string, fields []numericField) error {
	for _, f := range fields {
		if f.value < f.low || f.value > f.high {
			return fmt.Errorf("sched: %s.%s is %d; want %d to %d", at, f.name, f.value, f.low, f.high)
		}
	}
	return nil
}

// compiled is a Config that is valid, with what follows from it.
type compiled struct {
	Config
	profiles map[string]*profile // by scheduler name
	// cel keeps the selectors of devices that were compiled last.
	cel *cel.Cache
}

// keepSelectors is how many selectors of devices are kept compiled.
const keepSelectors = 128

// profile is a Profile with what follows from it.
type profile struct {
	Profile
	// addedRequired and addedPreferred are AddedAffinity's; nil: none.
	addedRequired  *nodeaffinity.NodeSelector
	addedPreferred *nodeaffinity.PreferredSchedulingTerms
	// ignores: some resources are not looked at.
	ignores bool
	// plainFit: free resources are scored as by default, which has a shortcut.
	plainFit bool
}

// compile validates a Config.
func (c Config) compile() (*compiled, error) {
	if err := c.validate(); err != nil {
		return nil, err
	}
	out := &compiled{Config: c, profiles: make(map[string]*profile, len(c.Profiles)), cel: cel.NewCache(keepSelectors, cel.Features{
		EnableConsumableCapacity: c.Devices.ConsumableCapacity,
		EnableListTypeAttributes: c.Devices.ListTypeAttributes,
	})}
	for i := range c.Profiles {
		p := &profile{Profile: c.Profiles[i]}
		p.ignores = len(p.IgnoredResources)+len(p.IgnoredResourceGroups) > 0
		p.plainFit = p.Fit.Strategy == LeastAllocated && len(p.Fit.Resources) == 2 &&
			p.Fit.Resources[0] == WeightedResource{corev1.ResourceCPU, 1} && p.Fit.Resources[1] == WeightedResource{corev1.ResourceMemory, 1}
		if a := p.AddedAffinity; a != nil {
			at := fmt.Sprintf("sched: Config.Profiles[%d].AddedAffinity", i)
			var err error
			if ns := a.RequiredDuringSchedulingIgnoredDuringExecution; ns != nil {
				if p.addedRequired, err = nodeaffinity.NewNodeSelector(ns); err != nil {
					return nil, fmt.Errorf("%s.RequiredDuringSchedulingIgnoredDuringExecution: %w", at, err)
				}
			}
			if terms := a.PreferredDuringSchedulingIgnoredDuringExecution; len(terms) > 0 {
				if p.addedPreferred, err = nodeaffinity.NewPreferredSchedulingTerms(terms); err != nil {
					return nil, fmt.Errorf("%s.PreferredDuringSchedulingIgnoredDuringExecution: %w", at, err)
				}
			}
		}
		out.profiles[p.SchedulerName] = p
	}
	return out, nil
}

// of returns the profile of a pod; nil: it is another scheduler's.
func (c *compiled) of(pod *corev1.Pod) *profile { return c.profiles[pod.Spec.SchedulerName] }
