package profiles

import (
	"slices"

	"k8s.io/apimachinery/pkg/util/sets"
	"k8s.io/apimachinery/pkg/util/validation/field"
	"k8s.io/kubernetes/pkg/scheduler/apis/config"
	"k8s.io/kubernetes/pkg/scheduler/framework/plugins/names"

	"timonel/sched"
)

// The extension points that matter here, by their names in the file.
const (
	preEnqueue = "preEnqueue"
	queueSort  = "queueSort"
	preFilter  = "preFilter"
	filter     = "filter"
	postFilter = "postFilter"
	preScore   = "preScore"
	score      = "score"
	reserve    = "reserve"
	preBind    = "preBind"
	bind       = "bind"
)

// plugin is what upstream's plugin does, and what of sched does the same.
type plugin struct {
	// points are where it takes part.
	points []string
	// must: nothing is placed, or nothing as it should be, without it.
	must bool
	// refuses: its preFilter refuses pods, so that its filter alone cannot be left out.
	refuses bool
	filter  sched.Filters
	// weight is that of its score.
	weight func(*sched.Weights) *int64
}

// known are upstream's plugins but for those whose features are off.
var known = map[string]plugin{
	names.SchedulingGates:      {points: []string{preEnqueue}, must: true},
	names.PrioritySort:         {points: []string{queueSort}, must: true},
	names.DefaultBinder:        {points: []string{bind}, must: true},
	names.DefaultPreemption:    {points: []string{preEnqueue, postFilter}},
	names.NodeName:             {points: []string{filter}}, // a pod that names its node is never placed
	names.NodeUnschedulable:    {points: []string{filter}, filter: sched.FilterNodeUnschedulable},
	names.TaintToleration:      {points: []string{filter, preScore, score}, filter: sched.FilterTaintToleration, weight: func(w *sched.Weights) *int64 { return &w.TaintToleration }},
	names.NodeAffinity:         {points: []string{preFilter, filter, preScore, score}, refuses: true, filter: sched.FilterNodeAffinity, weight: func(w *sched.Weights) *int64 { return &w.NodeAffinity }},
	names.NodePorts:            {points: []string{preFilter, filter}, filter: sched.FilterNodePorts},
	names.NodeResourcesFit:     {points: []string{preFilter, filter, preScore, score}, filter: sched.FilterNodeResourcesFit, weight: func(w *sched.Weights) *int64 { return &w.Fit }},
	names.VolumeRestrictions:   {points: []string{preFilter, filter}, refuses: true, filter: sched.FilterVolumeRestrictions},
	names.NodeVolumeLimits:     {points: []string{preFilter, filter}, filter: sched.FilterNodeVolumeLimits},
	names.VolumeZone:           {points: []string{preFilter, filter}, refuses: true, filter: sched.FilterVolumeZone},
	names.PodTopologySpread:    {points: []string{preFilter, filter, preScore, score}, filter: sched.FilterPodTopologySpread, weight: func(w *sched.Weights) *int64 { return &w.TopologySpread }},
	names.InterPodAffinity:     {points: []string{preFilter, filter, preScore, score}, filter: sched.FilterInterPodAffinity, weight: func(w *sched.Weights) *int64 { return &w.PodAffinity }},
	names.NodeDeclaredFeatures: {points: []string{preFilter, filter}, filter: sched.FilterNodeDeclaredFeatures},
	names.ImageLocality:        {points: []string{score}, weight: func(w *sched.Weights) *int64 { return &w.ImageLocality }},

	names.NodeResourcesBalancedAllocation: {points: []string{preScore, score}, weight: func(w *sched.Weights) *int64 { return &w.BalancedResource }},
	names.VolumeBinding: {points: []string{preFilter, filter, reserve, preBind, preScore, score}, must: true,
		weight: func(w *sched.Weights) *int64 { return &w.VolumeBinding }},
	names.DynamicResources: {points: []string{preEnqueue, preFilter, filter, postFilter, score, reserve, preBind}, refuses: true,
		filter: sched.FilterDynamicResources, weight: func(w *sched.Weights) *int64 { return &w.DynamicResources }},
}

// scoring says whether a point is of scores, without which a plugin that must be there
// still does what it must.
func scoring(point string) bool { return point == preScore || point == score }

// point is one extension point of a profile.
type point struct {
	name string
	set  config.PluginSet
}

func points(p *config.Plugins) []point {
	return []point{
		{preEnqueue, p.PreEnqueue}, {queueSort, p.QueueSort}, {preFilter, p.PreFilter}, {filter, p.Filter}, {postFilter, p.PostFilter},
		{preScore, p.PreScore}, {score, p.Score}, {reserve, p.Reserve}, {"permit", p.Permit}, {preBind, p.PreBind}, {bind, p.Bind},
		{"postBind", p.PostBind}, {"placementGenerate", p.PlacementGenerate}, {"placementScore", p.PlacementScore}, {"podGroupPostFilter", p.PodGroupPostFilter},
	}
}

// enabled returns the plugins that take part at each point, with their weights: those
// that are named there, and those of multiPoint that are not disabled there.
func enabled(p *config.Plugins, at *field.Path) (on map[string]map[string]int64, errs field.ErrorList) {
	on = map[string]map[string]int64{}
	check := func(at *field.Path, i int, name, point string) bool {
		what, ok := known[name]
		at = at.Child("enabled").Index(i).Child("name")
		switch {
		case !ok:
			errs = append(errs, field.NotSupported(at, name, sets.List(sets.KeySet(known))))
		case point != "" && !slices.Contains(what.points, point):
			errs = append(errs, field.Invalid(at, name, "this plugin takes no part at this extension point"))
		default:
			return true
		}
		return false
	}
	for i, e := range p.MultiPoint.Enabled {
		check(at.Child("multiPoint"), i, e.Name, "")
	}
	for _, pt := range points(p) {
		plugins, disabled := map[string]int64{}, sets.New[string]()
		for _, d := range pt.set.Disabled {
			disabled.Insert(d.Name)
		}
		for i, e := range pt.set.Enabled {
			if !check(at.Child(pt.name), i, e.Name, pt.name) {
				continue
			}
			if _, twice := plugins[e.Name]; twice {
				errs = append(errs, field.Duplicate(at.Child(pt.name, "enabled").Index(i).Child("name"), e.Name))
			}
			plugins[e.Name] = int64(e.Weight)
		}
		seen := sets.New[string]()
		for i, e := range p.MultiPoint.Enabled {
			if _, explicit := plugins[e.Name]; explicit && !seen.Has(e.Name) ||
				disabled.HasAny("*", e.Name) || !slices.Contains(known[e.Name].points, pt.name) {
				continue
			}
			if seen.Has(e.Name) {
				errs = append(errs, field.Duplicate(at.Child("multiPoint", "enabled").Index(i).Child("name"), e.Name))
			}
			seen.Insert(e.Name)
			plugins[e.Name] = int64(e.Weight)
		}
		on[pt.name] = plugins
	}
	return on, errs
}

// apply makes of the plugins that are enabled what they are in sched.
func apply(p *config.Plugins, at *field.Path, out *sched.Profile) (errs field.ErrorList) {
	on, errs := enabled(p, at)
	if len(errs) > 0 {
		return errs
	}
	has := func(point, name string) bool {
		_, ok := on[point][name]
		return ok
	}
	for _, name := range sets.List(sets.KeySet(known)) {
		what := known[name]
		takesPart := func(point string) bool { return slices.Contains(what.points, point) }
		for _, point := range what.points {
			if what.must && !scoring(point) && !has(point, name) {
				errs = append(errs, field.Forbidden(at.Child(point), "plugin "+name+" cannot be left out; enable it here, or take it out of disabled"))
			}
		}
		if what.filter != 0 {
			before, itself := has(preFilter, name), has(filter, name)
			switch {
			case takesPart(preFilter) && itself && !before, itself != before && what.refuses:
				errs = append(errs, field.Forbidden(at.Child(preFilter), "plugin "+name+" is enabled or disabled here and in filter alike; use multiPoint for both"))
			case !itself:
				out.Without |= what.filter
			}
		}
		if what.weight == nil {
			continue
		}
		weight, scores := on[score][name]
		switch {
		case !scores:
			*what.weight(&out.Weights) = 0
		case takesPart(preScore) && !has(preScore, name):
			errs = append(errs, field.Forbidden(at.Child(preScore), "plugin "+name+" is disabled here and enabled in score; disable it there"))
		default:
			*what.weight(&out.Weights) = max(weight, 1)
		}
	}
	out.DisablePreemption = !has(postFilter, names.DefaultPreemption)
	if has(postFilter, names.DefaultPreemption) && !has(preEnqueue, names.DefaultPreemption) {
		errs = append(errs, field.Forbidden(at.Child(preEnqueue), "plugin "+names.DefaultPreemption+" is disabled here and enabled in postFilter; use multiPoint for both"))
	}
	return errs
}
