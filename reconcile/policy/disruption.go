package policy

import (
	"cmp"
	"fmt"
	"slices"
	"time"

	corev1 "k8s.io/api/core/v1"
	policyv1 "k8s.io/api/policy/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/util/intstr"

	"timonel/reconcile"
	"timonel/state/objects"
)

// deletionTimeout is how long a pod whose eviction was granted counts as gone before
// it is marked for deletion. When that has not happened by then, it will not.
const deletionTimeout = 2 * time.Minute

var (
	budgetKind     = policyv1.SchemeGroupVersion.WithKind("PodDisruptionBudget")
	budgetResource = policyv1.SchemeGroupVersion.WithResource("poddisruptionbudgets")
)

// Disruption keeps the status of PodDisruptionBudgets, by which the API grants
// and refuses evictions, and takes back the announcement of a disruption that did
// not come.
//
// The API counts status.disruptionsAllowed down itself, with each eviction that it
// grants, and notes the pod in status.disruptedPods until it is marked for deletion.
// What is written here is conditional on the version of the budget that was counted
// for, so an eviction granted meanwhile is never forgotten.
type Disruption struct{}

// Name implements Reconciler.
func (Disruption) Name() string { return "disruption-controller" }

// Traits implements Reconciler: an owner's scale is found by its kind.
func (Disruption) Traits() reconcile.Traits { return reconcile.Traits{Kinds: true} }

// All implements Reconciler.
func (Disruption) All(s *objects.Snapshot) []reconcile.Key {
	keys := reconcile.KeysOf(budgetKind, s.PodDisruptionBudgets().All())
	for pod := range s.Pods().All() {
		if announced(pod) != nil {
			keys = append(keys, reconcile.KeyOf(reconcile.PodKind, pod))
		}
	}
	return keys
}

// Keys implements Reconciler: a budget follows itself, its pods, and the scale of
// their owners.
func (Disruption) Keys(c objects.Changed, s *objects.Snapshot) []reconcile.Key {
	m := c.Meta()
	switch {
	case m.GVK.GroupKind() == budgetKind.GroupKind():
		return []reconcile.Key{reconcile.KeyOf(budgetKind, m)}
	case m.GVK.GroupKind() == reconcile.PodKind.GroupKind():
		return podKeys(c, s)
	case m.GVK.GroupKind() == definitionKind:
		return reconcile.KeysOf(budgetKind, s.PodDisruptionBudgets().All()) // it may have another scale
	case m.Namespace != "" && scaled(c):
		return ownerKeys(m, s)
	}
	return nil
}

// podKeys returns the keys that a changed pod concerns: its budgets, if the change is
// one that they count, and itself.
func podKeys(c objects.Changed, s *objects.Snapshot) []reconcile.Key {
	before, now := objects.As[*corev1.Pod](c.Old), objects.As[*corev1.Pod](c.New)
	var keys []reconcile.Key
	if now != nil && announced(now) != nil {
		keys = append(keys, reconcile.KeyOf(reconcile.PodKind, now))
	}
	if before != nil && now != nil && countedAlike(before, now) {
		return keys
	}
	matching := budgetsOf(s, now)
	for _, pdb := range slices.Concat(matching, budgetsOf(s, before)) {
		if key := reconcile.KeyOf(budgetKind, pdb); !slices.Contains(keys, key) {
			keys = append(keys, key)
		}
	}
	if len(matching) > 1 && (before == nil || !equality.Semantic.DeepEqual(before.Labels, now.Labels)) {
		keys = append(keys, reconcile.KeyOf(reconcile.PodKind, now))
	}
	return keys
}

// budgetsOf returns the budgets that select a pod, in order of name; none for nil.
func budgetsOf(s *objects.Snapshot, pod *corev1.Pod) []*policyv1.PodDisruptionBudget {
	if pod == nil {
		return nil
	}
	var out []*policyv1.PodDisruptionBudget
	for pdb := range s.BudgetsNear(pod.Namespace, pod.Labels) {
		if selects(pdb, pod) {
			out = append(out, pdb)
		}
	}
	slices.SortFunc(out, func(a, b *policyv1.PodDisruptionBudget) int { return cmp.Compare(a.Name, b.Name) })
	return out
}

// countedAlike says whether two versions of a pod are the same to every budget.
func countedAlike(a, b *corev1.Pod) bool {
	return a.UID == b.UID && (a.DeletionTimestamp == nil) == (b.DeletionTimestamp == nil) &&
		(reconcile.ReadyCondition(a) == nil) == (reconcile.ReadyCondition(b) == nil) &&
		equality.Semantic.DeepEqual(a.Labels, b.Labels) &&
		equality.Semantic.DeepEqual(metav1.GetControllerOfNoCopy(a), metav1.GetControllerOfNoCopy(b))
}

// selects says whether a pod is the budget's. An empty selector selects every pod, none
// selects none, and a broken one none.
func selects(pdb *policyv1.PodDisruptionBudget, pod *corev1.Pod) bool {
	selector, err := metav1.LabelSelectorAsSelector(pdb.Spec.Selector)
	return err == nil && selector.Matches(labels.Set(pod.Labels))
}

// Reconcile implements Reconciler.
func (Disruption) Reconcile(in reconcile.Input, key reconcile.Key) (reconcile.Result, error) {
	if key.Kind == reconcile.PodKind.Kind {
		return reconcilePod(in, key), nil
	}
	pdb, ok := in.Snapshot.PodDisruptionBudgets().Get(key.Namespace, key.Name)
	if !ok {
		return reconcile.Result{}, nil
	}
	var result reconcile.Result
	status, err := budgetStatus(in, pdb, &result)
	if err != nil {
		if in.Kinds == nil {
			return reconcile.Result{}, nil // what the API serves is not known yet, and wakes all keys
		}
		// Nothing may be evicted by a number that is not known to be true any more.
		status = *pdb.Status.DeepCopy()
		status.DisruptionsAllowed = 0
		setCondition(in, &status, metav1.ConditionFalse, policyv1.SyncFailedReason, err.Error())
	}
	if equality.Semantic.DeepEqual(status, pdb.Status) {
		return result, nil
	}
	updated := pdb.DeepCopy()
	updated.Status = status
	result.Add(reconcile.UpdateStatus(budgetResource, updated))
	return result, nil
}

// budgetStatus counts the budget's pods and says what the status is to be.
func budgetStatus(in reconcile.Input, pdb *policyv1.PodDisruptionBudget, result *reconcile.Result) (policyv1.PodDisruptionBudgetStatus, error) {
	event := func(kind, reason, format string, args ...any) {
		result.Events = append(result.Events, *reconcile.NewEvent(budgetKind, pdb, kind, reason, format, args...))
	}
	selector, err := metav1.LabelSelectorAsSelector(pdb.Spec.Selector)
	if err != nil {
		event(corev1.EventTypeWarning, "NoPods", "Failed to get pods: %v", err)
		return policyv1.PodDisruptionBudgetStatus{}, err
	}
	var pods []*corev1.Pod
	for pod := range in.Snapshot.PodsSelected(pdb.Namespace, selector) {
		pods = append(pods, pod)
	}
	slices.SortFunc(pods, func(a, b *corev1.Pod) int { return cmp.Compare(a.Name, b.Name) })
	if len(pods) == 0 {
		event(corev1.EventTypeNormal, "NoPods", "No matching pods found")
	}
	expected, desired, unmanaged, err := expectedPods(in, pdb, pods)
	if err != nil {
		if in.Kinds != nil {
			event(corev1.EventTypeWarning, "CalculateExpectedPodCountFailed", "Failed to calculate the number of expected pods: %v", err)
		}
		return policyv1.PodDisruptionBudgetStatus{}, err
	}
	if unmanaged {
		event(corev1.EventTypeWarning, "UnmanagedPods", "Pods selected by this PodDisruptionBudget (selector: %v) were found "+
			"to be unmanaged. As a result, the status of the PDB cannot be calculated correctly, which may result in undefined behavior. "+
			"To account for these pods please set \".spec.minAvailable\" "+
			"field of the PDB to an integer value.", pdb.Spec.Selector)
	}

	disrupted := stillDisrupted(in, pdb, pods, result)
	healthy := int32(0)
	for _, pod := range pods {
		if _, granted := disrupted[pod.Name]; !granted && pod.DeletionTimestamp == nil && reconcile.ReadyCondition(pod) != nil {
			healthy++
		}
	}
	status := policyv1.PodDisruptionBudgetStatus{
		ObservedGeneration: pdb.Generation,
		CurrentHealthy:     healthy,
		DesiredHealthy:     desired,
		ExpectedPods:       expected,
		DisruptedPods:      disrupted,
		Conditions:         pdb.DeepCopy().Status.Conditions,
	}
	// A budget that expects no pods allows nothing, so that it is safe when its first
	// pods appear.
	if expected > 0 {
		status.DisruptionsAllowed = max(0, healthy-desired)
	}
	if status.DisruptionsAllowed > 0 {
		setCondition(in, &status, metav1.ConditionTrue, policyv1.SufficientPodsReason, "")
	} else {
		setCondition(in, &status, metav1.ConditionFalse, policyv1.InsufficientPodsReason, "")
	}
	return status, nil
}

func setCondition(in reconcile.Input, status *policyv1.PodDisruptionBudgetStatus, is metav1.ConditionStatus, reason, message string) {
	meta.SetStatusCondition(&status.Conditions, metav1.Condition{
		Type: policyv1.DisruptionAllowedCondition, Status: is, Reason: reason, Message: message,
		ObservedGeneration: status.ObservedGeneration,
		LastTransitionTime: metav1.NewTime(in.Now).Rfc3339Copy(),
	})
}

// stillDisrupted returns those of the pods whose eviction was granted that are still
// to be marked for deletion, and asks for another pass when the first of them is
// overdue.
func stillDisrupted(in reconcile.Input, pdb *policyv1.PodDisruptionBudget, pods []*corev1.Pod, result *reconcile.Result) map[string]metav1.Time {
	disrupted := map[string]metav1.Time{}
	for _, pod := range pods {
		granted, ok := pdb.Status.DisruptedPods[pod.Name]
		if !ok || pod.DeletionTimestamp != nil {
			continue
		}
		overdue := granted.Add(deletionTimeout)
		if !overdue.After(in.Now) {
			result.Events = append(result.Events, *reconcile.NewEvent(reconcile.PodKind, pod, corev1.EventTypeWarning, "NotDeleted",
				"Pod was expected by PDB %s/%s to be deleted but it wasn't", pdb.Namespace, pdb.Name))
			continue
		}
		disrupted[pod.Name] = granted
		result.At(overdue)
	}
	return disrupted
}

// expectedPods returns how many pods there are to be and how many of them must be
// healthy, and whether there are pods without a controller where the number is to
// follow from controllers.
func expectedPods(in reconcile.Input, pdb *policyv1.PodDisruptionBudget, pods []*corev1.Pod) (expected, desired int32, unmanaged bool, err error) {
	limit := pdb.Spec.MaxUnavailable
	switch {
	case limit != nil:
	case pdb.Spec.MinAvailable == nil:
		return 0, 0, false, nil
	case pdb.Spec.MinAvailable.Type == intstr.Int:
		return int32(len(pods)), pdb.Spec.MinAvailable.IntVal, false, nil
	default:
		limit = pdb.Spec.MinAvailable
	}
	if expected, unmanaged, err = expectedScale(in, pods); err != nil {
		return 0, 0, false, err
	}
	share, err := intstr.GetScaledValueFromIntOrPercent(limit, int(expected), true)
	if err != nil {
		return 0, 0, false, err
	}
	if pdb.Spec.MaxUnavailable == nil {
		return expected, int32(share), unmanaged, nil
	}
	return expected, max(0, expected-int32(share)), unmanaged, nil
}

// expectedScale adds up the scales of all controllers of the pods.
func expectedScale(in reconcile.Input, pods []*corev1.Pod) (expected int32, unmanaged bool, err error) {
	counted := map[schema.GroupVersionKind]map[string]bool{} // controllers by what pods say of them
	scales := map[string]int32{}                             // by UID of whom it is the scale
	for _, pod := range pods {
		ref := metav1.GetControllerOfNoCopy(pod)
		if ref == nil {
			unmanaged = true
			continue
		}
		gvk := schema.FromAPIVersionAndKind(ref.APIVersion, ref.Kind)
		if counted[gvk][ref.Name+"/"+string(ref.UID)] {
			continue
		}
		of, scale, err := scaleOf(in, ref, pod.Namespace)
		if err != nil {
			return 0, unmanaged, err
		}
		if of == "" {
			return 0, unmanaged, fmt.Errorf("found no controllers for pod %q", pod.Name)
		}
		if counted[gvk] == nil {
			counted[gvk] = map[string]bool{}
		}
		counted[gvk][ref.Name+"/"+string(ref.UID)] = true
		scales[string(of)] = scale
	}
	for _, n := range scales {
		expected += n
	}
	return expected, unmanaged, nil
}
