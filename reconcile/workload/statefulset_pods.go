package workload

import (
	"cmp"
	"fmt"
	"slices"
	"strconv"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/util/intstr"

	"timonel/reconcile"
	"timonel/state/objects"
)

// firstOrdinal is the ordinal of a set's first pod.
func firstOrdinal(set *appsv1.StatefulSet) int {
	if set.Spec.Ordinals == nil {
		return 0
	}
	return int(set.Spec.Ordinals.Start)
}

func podName(set *appsv1.StatefulSet, ordinal int) string {
	return set.Name + "-" + strconv.Itoa(ordinal)
}

// wantedOrdinal says whether an ordinal is one of those the set asks for.
func wantedOrdinal(set *appsv1.StatefulSet, ordinal int) bool {
	first := firstOrdinal(set)
	return ordinal >= first && ordinal < first+replicaCount(set)
}

func replicaCount(set *appsv1.StatefulSet) int {
	if set.Spec.Replicas == nil {
		return 1
	}
	return int(*set.Spec.Replicas)
}

// podRevision is the name of the revision that a pod is of.
func podRevision(pod *corev1.Pod) string { return pod.Labels[appsv1.StatefulSetRevisionLabel] }

// ordered says whether the set's pods come and go one after another.
func (r *stateful) ordered() bool {
	return r.set.Spec.PodManagementPolicy != appsv1.ParallelPodManagement
}

// partition sorts the pods by whether the set asks for their ordinals. Pods with
// numbers that are no ordinals are left alone.
func (r *stateful) partition(pods []*corev1.Pod) {
	r.replicas = make([]*corev1.Pod, replicaCount(r.set))
	for _, pod := range pods {
		switch _, ordinal := identityOf(pod.Name); {
		case wantedOrdinal(r.set, ordinal):
			r.replicas[ordinal-firstOrdinal(r.set)] = pod
		case ordinal >= 0:
			r.condemned = append(r.condemned, pod)
		}
	}
	slices.SortFunc(r.condemned, func(a, b *corev1.Pod) int {
		_, x := identityOf(a.Name)
		_, y := identityOf(b.Name)
		return cmp.Compare(y, x)
	})
}

func runningAndReady(pod *corev1.Pod) bool {
	return pod.Status.Phase == corev1.PodRunning && reconcile.ReadyCondition(pod) != nil
}

func (r *stateful) available(pod *corev1.Pod) bool {
	return available(r.in, pod, r.set.Spec.MinReadySeconds, &r.result)
}

// unavailable says whether an ordinal's pod does not serve: it is not there, not
// available, or going.
func (r *stateful) unavailable(pod *corev1.Pod) bool {
	return pod == nil || pod.DeletionTimestamp != nil || !r.available(pod)
}

// manage brings the pods nearer to what the set asks for. An error ends the pass.
func (r *stateful) manage() error {
	if t := r.set.Spec.UpdateStrategy.Type; t == appsv1.RecreateStatefulSetStrategyType {
		// Alpha in Kubernetes 1.37, and off there and here.
		err := fmt.Errorf("statefulset %s/%s uses Recreate strategy but feature gate StatefulSetRecreateStrategy is disabled", r.set.Namespace, r.set.Name)
		r.warn("UnknownStrategy", "%v", err)
		return err
	}
	first := r.firstUnavailable()
	for i := range r.replicas {
		if wait := r.keep(i); wait && r.ordered() {
			return nil
		}
	}
	if r.created > 0 && len(r.in.Failed) > 0 {
		return nil // nothing is given up for pods that cannot be made
	}
	owned := false
	for _, pod := range r.condemned {
		owned = r.retain(pod) || owned
	}
	if owned {
		return nil // a claim must have its owner before the owner goes
	}
	for _, pod := range r.condemned {
		if wait := r.condemn(pod, first); wait && r.ordered() {
			return nil
		}
	}
	if r.set.Spec.UpdateStrategy.Type == appsv1.OnDeleteStatefulSetStrategyType {
		return nil
	}
	return r.roll()
}

// firstUnavailable is the pod that holds up an ordered set: of the lowest wanted
// ordinal, or else of the lowest condemned one. It is nil when there is none, or
// when the first is not there.
func (r *stateful) firstUnavailable() *corev1.Pod {
	for _, pod := range r.replicas {
		if r.unavailable(pod) {
			return pod
		}
	}
	for _, pod := range slices.Backward(r.condemned) {
		if r.unavailable(pod) {
			return pod
		}
	}
	return nil
}

// keep does what the i-th replica needs, and says whether an ordered set must wait
// for it before it goes on to the next.
func (r *stateful) keep(i int) (wait bool) {
	pod := r.replicas[i]
	switch {
	case pod == nil:
		r.create(firstOrdinal(r.set) + i)
		return true
	case objects.PodEnded(pod):
		// Whatever its exit code was, by which a pod ends that was evicted too. Its
		// successor comes once it is gone.
		r.delete(pod)
		return true
	case pod.Status.Phase == corev1.PodPending:
		if !r.provide(pod) {
			return true
		}
	}
	if r.ordered() && (pod.DeletionTimestamp != nil || !runningAndReady(pod) || !r.available(pod)) {
		return true
	}
	return r.conform(pod)
}

// create creates the pod of an ordinal, its claims first.
func (r *stateful) create(ordinal int) {
	limit := min(r.burst, MostPods(&r.set.Spec.Template))
	if len(r.in.Failed) > 0 {
		limit = 1 // see whether one goes through before trying them all again
	}
	if r.created >= limit {
		return
	}
	pod := r.newPod(ordinal)
	if _, taken := r.in.Snapshot.Pods().Get(pod.Namespace, pod.Name); taken {
		return // somebody else's pod is in the way; the set is looked at again when it is gone
	}
	if r.staleClaim(pod.Name, ordinal) {
		return // its claim goes with the pod that was here before
	}
	claims, ok := r.missingClaims(pod.Name, ordinal, "Create")
	if !ok {
		r.result.Requests = append(r.result.Requests, claims...)
		return
	}
	r.created++
	create := r.tell(reconcile.Create(reconcile.PodsResource, pod), "Create", pod.Name)
	if len(claims) == 0 {
		r.result.Add(create)
		return
	}
	claims[0].Then = append(claims[1:], create)
	r.result.Add(claims[0])
}

// newPod is the pod of an ordinal, of the revision that the partition gives it.
func (r *stateful) newPod(ordinal int) *corev1.Pod {
	revision := r.update.Name
	if r.keepsCurrent(ordinal) {
		revision = r.current.Name
	}
	pod := PodFromTemplate(r.set, reconcile.StatefulSetKind, r.templates[revision], podName(r.set, ordinal))
	pod.Labels = withLabels(pod.Labels, r.identity(ordinal))
	pod.Labels[appsv1.StatefulSetRevisionLabel] = revision
	pod.Spec.Hostname = pod.Name
	pod.Spec.Subdomain = r.set.Spec.ServiceName
	pod.Spec.Volumes = r.volumes(pod.Spec.Volumes, ordinal)
	return pod
}

// keepsCurrent says whether a new pod is of the current revision and not of the update.
func (r *stateful) keepsCurrent(ordinal int) bool {
	rolling := r.set.Spec.UpdateStrategy.RollingUpdate
	switch {
	case rolling != nil:
		return ordinal < firstOrdinal(r.set)+partitionOf(rolling)
	case r.set.Spec.UpdateStrategy.Type == appsv1.RollingUpdateStatefulSetStrategyType:
		return ordinal < firstOrdinal(r.set)+int(r.set.Status.CurrentReplicas)
	}
	return false
}

func partitionOf(rolling *appsv1.RollingUpdateStatefulSetStrategy) int {
	if rolling == nil || rolling.Partition == nil {
		return 0
	}
	return int(*rolling.Partition)
}

// identity is the labels by which a pod is known.
func (r *stateful) identity(ordinal int) map[string]string {
	return map[string]string{
		appsv1.StatefulSetPodNameLabel: podName(r.set, ordinal),
		appsv1.PodIndexLabel:           strconv.Itoa(ordinal),
	}
}

// conform gives a pod back its identity and its claims' volumes, and its claims the
// owners that the set's policy says. It says whether the pod itself is to change.
func (r *stateful) conform(pod *corev1.Pod) bool {
	_, ordinal := identityOf(pod.Name)
	named := pod.Labels[appsv1.StatefulSetPodNameLabel] == pod.Name && pod.Name == podName(r.set, ordinal)
	stored := r.hasVolumes(pod, ordinal)
	if named && stored {
		r.retain(pod)
		return false
	}
	var before []reconcile.Request
	if !stored {
		claims, ok := r.missingClaims(pod.Name, ordinal, "Update")
		if !ok {
			r.result.Requests = append(r.result.Requests, claims...)
			return true
		}
		before = claims
	}
	r.retain(pod)
	updated := pod.DeepCopy()
	updated.Labels = withLabels(updated.Labels, r.identity(ordinal))
	updated.Spec.Volumes = r.volumes(updated.Spec.Volumes, ordinal)
	update := r.tell(reconcile.Update(reconcile.PodsResource, updated), "Update", pod.Name)
	if len(before) > 0 {
		before[0].Then = append(before[1:], update)
		update = before[0]
	}
	r.result.Add(update)
	return true
}

// condemn deletes a pod that is not asked for, and says whether an ordered set must
// wait before it goes on to the next.
func (r *stateful) condemn(pod, firstUnavailable *corev1.Pod) (wait bool) {
	switch {
	case pod.DeletionTimestamp != nil:
		return true
	case r.ordered() && pod != firstUnavailable && !objects.PodEnded(pod) && (!runningAndReady(pod) || !r.available(pod)):
		return true // it may become ready yet; one that has ended never does, and upstream waits for it for ever
	}
	r.delete(pod)
	return true
}

// roll gives up pods of other revisions than the update's, from the highest ordinal
// down to the partition, no more than may be unavailable.
func (r *stateful) roll() error {
	rolling := r.set.Spec.UpdateStrategy.RollingUpdate
	budget, err := maxUnavailable(r.set)
	if err != nil {
		return err
	}
	lowest := partitionOf(rolling)
	outdated := func(pod *corev1.Pod) bool {
		return pod != nil && podRevision(pod) != r.update.Name && pod.DeletionTimestamp == nil
	}
	for _, pod := range r.replicas {
		if r.unavailable(pod) {
			budget--
		}
	}
	if !r.ordered() {
		// Pods that do not serve anyway cost nothing, and come first: else the budget
		// goes to good pods while bad ones of the old revision stay.
		for i := len(r.replicas) - 1; i >= lowest; i-- {
			if pod := r.replicas[i]; outdated(pod) && !r.available(pod) {
				r.delete(pod)
			}
		}
	}
	for i := len(r.replicas) - 1; i >= lowest && budget > 0; i-- {
		if pod := r.replicas[i]; outdated(pod) && (r.ordered() || r.available(pod)) {
			r.delete(pod)
			budget--
		}
	}
	return nil
}

// maxUnavailable is how many pods of a rolling update may be unavailable: 1 at least.
func maxUnavailable(set *appsv1.StatefulSet) (int, error) {
	rolling := set.Spec.UpdateStrategy.RollingUpdate
	if rolling == nil || rolling.MaxUnavailable == nil {
		return 1, nil
	}
	n, err := intstr.GetScaledValueFromIntOrPercent(rolling.MaxUnavailable, replicaCount(set), false)
	if err != nil {
		return 0, fmt.Errorf("stateful set %s/%s: spec.updateStrategy.rollingUpdate.maxUnavailable: %w", set.Namespace, set.Name, err)
	}
	return max(1, n), nil
}
