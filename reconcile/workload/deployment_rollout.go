package workload

import (
	"cmp"
	"math"
	"slices"
	"strconv"

	appsv1 "k8s.io/api/apps/v1"
	"k8s.io/apimachinery/pkg/util/intstr"

	"timonel/reconcile"
	"timonel/state/objects"
)

// isRolling says whether the strategy is RollingUpdate.
func (r *rollout) isRolling() bool {
	return r.d.Spec.Strategy.Type == appsv1.RollingUpdateDeploymentStrategyType
}

// fences resolves maxSurge (rounded up) and maxUnavailable (rounded down). When
// both come to nothing the rollout could never move, and one pod may be unavailable.
func (r *rollout) fences() (surge, unavailable int32) {
	if !r.isRolling() {
		return 0, 0
	}
	var s, u *intstr.IntOrString
	if ru := r.d.Spec.Strategy.RollingUpdate; ru != nil {
		s, u = ru.MaxSurge, ru.MaxUnavailable
	}
	wanted := int(r.wanted())
	scaled := func(v *intstr.IntOrString, up bool) int {
		if v == nil {
			return 0
		}
		n, err := intstr.GetScaledValueFromIntOrPercent(v, wanted, up)
		if err != nil || n < 0 {
			return 0 // the API's validation lets no such value in
		}
		return n
	}
	surgeN, unavailableN := scaled(s, true), scaled(u, false)
	if surgeN == 0 && unavailableN == 0 {
		unavailableN = 1
	}
	return int32(surgeN), int32(unavailableN)
}

// maxSurge is how many pods there may be beyond the wanted.
func (r *rollout) maxSurge() int32 {
	surge, _ := r.fences()
	return surge
}

// maxUnavailable is how many of the wanted pods may be unavailable.
func (r *rollout) maxUnavailable() int32 {
	if r.wanted() == 0 {
		return 0
	}
	_, unavailable := r.fences()
	return min(unavailable, r.wanted())
}

// total sums up a number of each ReplicaSet.
func total(sets []*appsv1.ReplicaSet, of func(*appsv1.ReplicaSet) int32) int32 {
	var sum int32
	for _, rs := range sets {
		sum += of(rs)
	}
	return sum
}

func specReplicas(rs *appsv1.ReplicaSet) int32      { return *rs.Spec.Replicas }
func statusReplicas(rs *appsv1.ReplicaSet) int32    { return rs.Status.Replicas }
func readyReplicas(rs *appsv1.ReplicaSet) int32     { return rs.Status.ReadyReplicas }
func availableReplicas(rs *appsv1.ReplicaSet) int32 { return rs.Status.AvailableReplicas }

// active returns the ReplicaSets that are to have pods.
func active(sets []*appsv1.ReplicaSet) []*appsv1.ReplicaSet {
	var out []*appsv1.ReplicaSet
	for _, rs := range sets {
		if *rs.Spec.Replicas > 0 {
			out = append(out, rs)
		}
	}
	return out
}

// setReplicas gives rs n replicas and says whether that is a change.
func (r *rollout) setReplicas(rs *appsv1.ReplicaSet, n int32) bool {
	if *rs.Spec.Replicas == n {
		return false
	}
	rs.Spec.Replicas = &n
	r.markReplicas(rs)
	return true
}

// markReplicas writes on rs for which size of the Deployment it was last scaled,
// by which a later pass tells a scaling from a rollout.
func (r *rollout) markReplicas(rs *appsv1.ReplicaSet) {
	if rs.Annotations == nil {
		rs.Annotations = map[string]string{}
	}
	rs.Annotations[desiredReplicasAnnotation] = strconv.Itoa(int(r.wanted()))
	rs.Annotations[maxReplicasAnnotation] = strconv.Itoa(int(r.wanted() + r.maxSurge()))
}

// countAnnotation reads one of the two marks.
func countAnnotation(rs *appsv1.ReplicaSet, key string) (int32, bool) {
	n, err := strconv.ParseUint(rs.Annotations[key], 10, 31)
	return int32(n), err == nil
}

// scaling says whether the Deployment's size was changed since its ReplicaSets were last scaled.
func (r *rollout) scaling() bool {
	for _, rs := range active(r.sets) {
		if n, ok := countAnnotation(rs, desiredReplicasAnnotation); ok && n != r.wanted() {
			return true
		}
	}
	return false
}

// grown returns how many replicas the current ReplicaSet may have now.
func (r *rollout) grown() int32 {
	have := *r.current.Spec.Replicas
	if !r.isRolling() {
		return r.wanted()
	}
	room := r.wanted() + r.maxSurge() - total(r.all(), r.occupied)
	if room <= 0 {
		return have
	}
	return have + min(room, r.wanted()-have)
}

// tally is what a ReplicaSet has of pods, counted in the snapshot: its status is
// behind while it creates and deletes.
type tally struct{ active, available int32 }

// pods counts a ReplicaSet's pods.
func (r *rollout) pods(rs *appsv1.ReplicaSet) tally {
	if t, ok := r.tallies[rs]; ok {
		return t
	}
	var t tally
	if rs.UID != "" {
		for pod := range reconcile.OwnedPods(r.in.Snapshot, rs) {
			if !reconcile.PodActive(pod) {
				continue
			}
			t.active++
			if due, ready := reconcile.AvailableAt(pod, rs.Spec.MinReadySeconds); ready && !due.After(r.in.Now) {
				t.available++
			}
		}
	}
	if r.tallies == nil {
		r.tallies = map[*appsv1.ReplicaSet]tally{}
	}
	r.tallies[rs] = t
	return t
}

// occupied is how many pods a ReplicaSet has or is to have, whichever is more: one
// that was told to shrink still has its pods until it has deleted them.
func (r *rollout) occupied(rs *appsv1.ReplicaSet) int32 {
	return max(r.pods(rs).active, *rs.Spec.Replicas)
}

// kept is how many available pods a ReplicaSet has and keeps.
func (r *rollout) kept(rs *appsv1.ReplicaSet) int32 {
	return min(r.pods(rs).available, *rs.Spec.Replicas)
}

// rolling moves replicas from the old ReplicaSets to the current one, within maxSurge and maxUnavailable.
func (r *rollout) rolling() {
	r.syncRevision(true)
	if r.current == nil {
		return
	}
	if r.created {
		return // its size is decided already, and its pods come first
	}
	if have := *r.current.Spec.Replicas; have != r.wanted() {
		n := r.wanted()
		if have < n {
			n = r.grown()
		}
		if r.setReplicas(r.current, n) {
			return
		}
	}
	if r.shrinkOld() {
		return
	}
	if r.complete(&r.d.Status) {
		r.cleanUp()
	}
}

// shrinkOld takes replicas from the old ReplicaSets, as many as availability
// allows: first those that are not available anyway, the oldest set first.
func (r *rollout) shrinkOld() bool {
	old := active(r.old)
	if len(old) == 0 {
		return false
	}
	slices.SortFunc(old, olderSet)
	minAvailable := r.wanted() - r.maxUnavailable()
	pending := *r.current.Spec.Replicas - r.kept(r.current)
	room := total(r.all(), specReplicas) - minAvailable - pending
	if room <= 0 {
		return false
	}

	var shrunk bool
	for _, rs := range old {
		n := min(room, *rs.Spec.Replicas-r.kept(rs))
		if n <= 0 {
			continue
		}
		r.setReplicas(rs, *rs.Spec.Replicas-n)
		room -= n
		shrunk = true
	}

	spare := min(room, total(r.all(), r.kept)-minAvailable)
	for _, rs := range old {
		n := min(spare, *rs.Spec.Replicas)
		if n <= 0 {
			continue
		}
		r.setReplicas(rs, *rs.Spec.Replicas-n)
		spare -= n
		shrunk = true
	}
	return shrunk
}

// recreate ends all old pods before the first new one is made.
func (r *rollout) recreate() {
	r.syncRevision(false)
	var shrunk bool
	for _, rs := range active(r.old) {
		shrunk = r.setReplicas(rs, 0) || shrunk
	}
	if shrunk || r.oldPodsRun() {
		return
	}
	if r.current == nil {
		r.syncRevision(true)
		if r.current == nil {
			return
		}
	}
	if !r.created {
		r.setReplicas(r.current, r.wanted())
	}
	if r.complete(&r.d.Status) {
		r.cleanUp()
	}
}

// oldPodsRun says whether an old ReplicaSet has, or says that it has, pods that have not ended.
func (r *rollout) oldPodsRun() bool {
	if total(r.old, statusReplicas) > 0 {
		return true
	}
	for _, rs := range r.old {
		for pod := range reconcile.OwnedPods(r.in.Snapshot, rs) {
			if !objects.PodEnded(pod) {
				return true
			}
		}
	}
	return false
}

// scale brings the ReplicaSets to a new size of the Deployment, or keeps them in
// proportion while it is paused in the middle of a rollout.
func (r *rollout) scale() {
	sets := active(r.all())
	switch len(sets) {
	case 0:
		switch {
		case r.current != nil:
			r.setReplicas(r.current, r.wanted())
		case len(r.old) > 0:
			r.setReplicas(slices.MaxFunc(r.old, olderSet), r.wanted())
		}
		return
	case 1:
		r.setReplicas(sets[0], r.wanted())
		return
	}
	if r.saturated() {
		for _, rs := range active(r.old) {
			r.setReplicas(rs, 0)
		}
		return
	}
	if !r.isRolling() {
		return
	}

	var allowed int32
	if r.wanted() > 0 {
		allowed = r.wanted() + r.maxSurge()
	}
	add := allowed - total(sets, specReplicas)
	// The largest set comes first. Of equal ones the newest gains first, and the oldest loses first.
	slices.SortFunc(sets, func(a, b *appsv1.ReplicaSet) int {
		if c := cmp.Compare(*b.Spec.Replicas, *a.Spec.Replicas); c != 0 {
			return c
		}
		if add > 0 {
			return olderSet(b, a)
		}
		return olderSet(a, b)
	})
	sizes := make([]int32, len(sets))
	var added int32
	for i, rs := range sets {
		part := r.proportion(rs, add, added)
		sizes[i] = *rs.Spec.Replicas + part
		added += part
	}
	sizes[0] = max(0, sizes[0]+add-added)
	for i, rs := range sets {
		rs.Spec.Replicas = &sizes[i]
		r.markReplicas(rs)
	}
}

// saturated says whether the current ReplicaSet already is all that the Deployment wants, and available.
func (r *rollout) saturated() bool {
	if r.current == nil {
		return false
	}
	desired, ok := countAnnotation(r.current, desiredReplicasAnnotation)
	return ok && desired == r.wanted() && *r.current.Spec.Replicas == r.wanted() && r.current.Status.AvailableReplicas == r.wanted()
}

// proportion is rs's share of add replicas (negative to take away), of which added are given already.
func (r *rollout) proportion(rs *appsv1.ReplicaSet, add, added int32) int32 {
	if add == 0 || add == added {
		return 0
	}
	have := *rs.Spec.Replicas
	share := -have
	if r.wanted() > 0 {
		was, ok := countAnnotation(rs, maxReplicasAnnotation)
		if !ok || was == 0 {
			was = r.d.Status.Replicas
		}
		if was == 0 {
			return 0
		}
		share = int32(math.Round(float64(have)*float64(r.wanted()+r.maxSurge())/float64(was))) - have
	}
	if add > 0 {
		return min(share, add-added)
	}
	return max(share, add-added)
}
