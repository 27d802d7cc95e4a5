package objects

import (
	"crypto/sha256"
	"iter"
	"maps"
	"slices"

	appsv1 "k8s.io/api/apps/v1"
	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
	policyv1 "k8s.io/api/policy/v1"
	"k8s.io/apimachinery/pkg/labels"
)

// byLabels finds pods by a selector, and selectors by a pod's labels, without a look at
// all others of the namespace. Its keys begin with what is looked for:
//
//	pods/NAMESPACE/CLASS        pods whose labels are the same, 16 bytes that stand for them
//	services/NAMESPACE/K=V/     Services that have K=V, the first by name, in their selector
//	budgets/NAMESPACE/K=V/      PodDisruptionBudgets likewise, K=V empty for those without any
//
// Pods of one template are of one class, so a namespace has few, however many pods it has.

// ownLabels are those that each pod of an owner, or of each of many Jobs, has with another
// value. No class is made for each: what they say is looked at in the pods.
var ownLabels = map[string]bool{
	appsv1.StatefulSetPodNameLabel: true, appsv1.PodIndexLabel: true,
	batchv1.JobCompletionIndexAnnotation: true,
	batchv1.JobNameLabel:                 true, batchv1.ControllerUidLabel: true, "job-name": true, "controller-uid": true,
}

// classLen is how long a class is.
const classLen = 16

// class stands for a pod's labels.
func class(set map[string]string) string {
	h := sha256.New()
	for _, k := range slices.Sorted(maps.Keys(set)) {
		if !ownLabels[k] {
			h.Write([]byte(k + "=" + set[k] + "\n")) // neither has such characters
		}
	}
	return string(h.Sum(nil)[:classLen])
}

// firstPair is the pair of a selector by which it is found, "" for none.
func firstPair(selector map[string]string) string {
	if len(selector) == 0 {
		return ""
	}
	k := slices.Min(slices.Collect(maps.Keys(selector)))
	return k + "=" + selector[k]
}

// labelKeys yields the keys under which byLabels has m, without m's own.
func labelKeys(m *Meta) iter.Seq[string] {
	return func(yield func(string) bool) {
		switch o := m.Object.(type) {
		case *corev1.Pod:
			yield("pods/" + o.Namespace + "/" + class(o.Labels))
		case *corev1.Service:
			if len(o.Spec.Selector) > 0 {
				yield("services/" + o.Namespace + "/" + firstPair(o.Spec.Selector) + "/")
			}
		case *policyv1.PodDisruptionBudget:
			if o.Spec.Selector != nil {
				yield("budgets/" + o.Namespace + "/" + firstPair(o.Spec.Selector.MatchLabels) + "/")
			}
		}
	}
}

// PodsSelected yields the pods of a namespace that a selector matches. Those with the same
// labels come together, in order of name.
func (s *Snapshot) PodsSelected(namespace string, selector labels.Selector) iter.Seq[*corev1.Pod] {
	shared := labels.NewSelector() // what those of a class have in common
	requirements, selectable := selector.Requirements()
	for _, r := range requirements {
		if !ownLabels[r.Key()] {
			shared = shared.Add(r)
		}
	}
	return func(yield func(*corev1.Pod) bool) {
		if !selectable {
			return
		}
		prefix := "pods/" + namespace + "/"
		for from := prefix; ; {
			var first *corev1.Pod
			var group string
			s.byLabels.Ascend(from, func(key string, m *Meta) bool {
				if len(key) > len(prefix)+classLen && key[:len(prefix)] == prefix {
					first, group = m.Object.(*corev1.Pod), key[:len(prefix)+classLen]
				}
				return false
			})
			if first == nil {
				return
			}
			if shared.Matches(labels.Set(first.Labels)) {
				for pod := range only[*corev1.Pod](scan(s.byLabels, group)) {
					if selector.Matches(labels.Set(pod.Labels)) && !yield(pod) {
						return
					}
				}
			}
			from = group + "\xff" // which no key of an object has
		}
	}
}

// ServicesSelecting yields the Services of a namespace whose selector is not empty and
// matches labels.
func (s *Snapshot) ServicesSelecting(namespace string, set map[string]string) iter.Seq[*corev1.Service] {
	return func(yield func(*corev1.Service) bool) {
		for k, v := range set {
			for svc := range only[*corev1.Service](scan(s.byLabels, "services/"+namespace+"/"+k+"="+v+"/")) {
				if labels.SelectorFromSet(svc.Spec.Selector).Matches(labels.Set(set)) && !yield(svc) {
					return
				}
			}
		}
	}
}

// BudgetsNear yields the PodDisruptionBudgets of a namespace that may select what has
// such labels: all that do are among them.
func (s *Snapshot) BudgetsNear(namespace string, set map[string]string) iter.Seq[*policyv1.PodDisruptionBudget] {
	return func(yield func(*policyv1.PodDisruptionBudget) bool) {
		prefix := "budgets/" + namespace + "/"
		for pdb := range only[*policyv1.PodDisruptionBudget](scan(s.byLabels, prefix+"/")) {
			if !yield(pdb) {
				return
			}
		}
		for k, v := range set {
			for pdb := range only[*policyv1.PodDisruptionBudget](scan(s.byLabels, prefix+k+"="+v+"/")) {
				if !yield(pdb) {
					return
				}
			}
		}
	}
}
