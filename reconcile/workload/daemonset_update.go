package workload

import (
	"fmt"
	"maps"
	"slices"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
)

// surges says whether a node may have two pods while they are replaced.
func (d *daemons) surges() bool {
	n, err := d.limit(func(r *appsv1.RollingUpdateDaemonSet) *intstr.IntOrString { return r.MaxSurge }, 1)
	return err == nil && n > 0
}

// limit returns a limit of the rolling update for so many nodes, 0 if there is none.
func (d *daemons) limit(of func(*appsv1.RollingUpdateDaemonSet) *intstr.IntOrString, nodes int) (int, error) {
	s := &d.ds.Spec.UpdateStrategy
	if s.Type != appsv1.RollingUpdateDaemonSetStrategyType || s.RollingUpdate == nil || of(s.RollingUpdate) == nil {
		return 0, nil
	}
	return intstr.GetScaledValueFromIntOrPercent(of(s.RollingUpdate), nodes, true)
}

// update takes a step of a rolling update. It is called when every node has what it is
// to have, whatever the template.
func (d *daemons) update() error {
	desired := 0
	nodes := map[string]bool{}
	for name := range d.onNode {
		nodes[name] = true
	}
	for _, node := range d.nodes {
		if d.fits[node.Name].run {
			nodes[node.Name] = true
			desired++
		}
	}
	unavailable, err := d.limit(func(r *appsv1.RollingUpdateDaemonSet) *intstr.IntOrString { return r.MaxUnavailable }, desired)
	if err != nil {
		return fmt.Errorf("daemon set %s/%s: spec.updateStrategy.rollingUpdate.maxUnavailable: %w", d.ds.Namespace, d.ds.Name, err)
	}
	surge, err := d.limit(func(r *appsv1.RollingUpdateDaemonSet) *intstr.IntOrString { return r.MaxSurge }, desired)
	if err != nil {
		return fmt.Errorf("daemon set %s/%s: spec.updateStrategy.rollingUpdate.maxSurge: %w", d.ds.Namespace, d.ds.Name, err)
	}
	if unavailable == 0 && surge == 0 {
		unavailable = 1 // no update would ever go on
	}
	order := slices.Sorted(maps.Keys(nodes))
	if surge == 0 {
		d.replace(order, unavailable)
	} else {
		d.surge(order, surge, desired)
	}
	return nil
}

// generations returns a node's pod of the newest template and its older one. It is not
// ok if there are several of one, which are not the update's to sort out.
func (d *daemons) generations(node string) (fresh, old *corev1.Pod, ok bool) {
	for _, pod := range alive(d.onNode[node]) {
		of := &old
		if d.updated(pod) {
			of = &fresh
		}
		if *of != nil {
			return nil, nil, false
		}
		*of = pod
	}
	return fresh, old, true
}

// replace deletes old pods, so that others take their places: those that are not
// available, and others as long as no more than so many nodes are without an available
// pod.
func (d *daemons) replace(nodes []string, maxUnavailable int) {
	unavailable := 0
	var remove, candidates []*corev1.Pod
	for _, node := range nodes {
		fresh, old, ok := d.generations(node)
		switch {
		case !ok, (fresh == nil) == (old == nil): // none, or more than are to be
			unavailable++
		case fresh != nil:
			if !d.available(fresh) {
				unavailable++
			}
		case !d.available(old):
			remove = append(remove, old)
			unavailable++
		default:
			candidates = append(candidates, old)
		}
	}
	d.sync(append(remove, candidates[:min(len(candidates), max(0, maxUnavailable-unavailable))]...), nil, nil)
}

// surge creates pods beside old ones: where those are not available, and beside others
// on as many nodes as may have two. An old pod goes when the one beside it is available;
// one that is not meant for its node any more goes when enough others are.
func (d *daemons) surge(nodes []string, maxSurge, desired int) {
	surging, available := 0, 0
	var remove, misplaced []*corev1.Pod
	var allowed, candidates []string
	for _, node := range nodes {
		fresh, old, ok := d.generations(node)
		if !ok {
			surging++
			continue
		}
		oldAvailable := old != nil && d.available(old)
		if oldAvailable || old == nil && fresh != nil && d.available(fresh) {
			available++
		}
		switch {
		case old == nil:
		case fresh != nil:
			if d.available(fresh) {
				remove = append(remove, old)
			} else {
				surging++
			}
		case !d.fits[node].run && !oldAvailable:
			remove = append(remove, old)
		case !d.fits[node].run:
			misplaced = append(misplaced, old)
		case !oldAvailable:
			allowed = append(allowed, node)
		default:
			candidates = append(candidates, node)
		}
	}
	remove = append(remove, misplaced[:min(len(misplaced), max(0, available-desired))]...)
	d.sync(remove, append(allowed, candidates[:min(len(candidates), max(0, maxSurge-surging))]...), nil)
}
