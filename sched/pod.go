package sched

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	corev1helpers "k8s.io/component-helpers/scheduling/corev1"

	"timonel/state/objects"
)

// podInfo is a pod with what the scheduler needs of it worked out. It is never
// changed after makePodInfo.
type podInfo struct {
	pod      *corev1.Pod
	priority int32

	req                     resources
	scoredCPU, scoredMemory int64
	ports                   []hostPort
	// leaving says that the pod was evicted for another before; started is its start
	// time, zero while it has none.
	leaving bool
	started time.Time

	// The pod's inter-pod terms by kind; see termKind.
	terms [termKinds][]*term
	// err says that an inter-pod term cannot be understood. Such terms are
	// ignored on running pods and fail pending ones.
	err error
}

type hostPort struct {
	ip       string
	protocol corev1.Protocol
	port     int32
}

// termKind tells apart the four lists of inter-pod terms a pod can have.
type termKind int

const (
	requiredAffinity termKind = iota
	requiredAntiAffinity
	preferredAffinity
	preferredAntiAffinity
	termKinds
)

// term is a parsed inter-pod affinity term.
type term struct {
	// key is equal for terms that mean the same.
	key               string
	namespaces        []string // sorted
	namespaceSelector labels.Selector
	selector          labels.Selector
	topologyKey       string
	weight            int64 // of preferred terms
}

// matches reports whether the term speaks of the pod. nsLabels are the labels
// of the pod's namespace; nil when the term's namespaces are resolved.
func (t *term) matches(pod *corev1.Pod, nsLabels labels.Set) bool {
	if _, ok := slices.BinarySearch(t.namespaces, pod.Namespace); !ok && !t.namespaceSelector.Matches(nsLabels) {
		return false
	}
	return t.selector.Matches(labels.Set(pod.Labels))
}

func podKey(namespace, name string) string { return namespace + "/" + name }

func makePodInfo(pod *corev1.Pod) *podInfo {
	p := &podInfo{pod: pod, priority: corev1helpers.PodPriority(pod), leaving: leavingForPreemptor(pod)}
	if t := pod.Status.StartTime; t != nil {
		p.started = t.Time
	}
	p.req, p.scoredCPU, p.scoredMemory = podRequests(pod)
	for i := range pod.Spec.InitContainers {
		c := &pod.Spec.InitContainers[i]
		if c.RestartPolicy != nil && *c.RestartPolicy == corev1.ContainerRestartPolicyAlways {
			p.addPorts(c.Ports)
		}
	}
	for i := range pod.Spec.Containers {
		p.addPorts(pod.Spec.Containers[i].Ports)
	}
	if a := pod.Spec.Affinity; a != nil {
		p.addTerms(a)
	}
	return p
}

func (p *podInfo) addPorts(ports []corev1.ContainerPort) {
	for _, port := range ports {
		if port.HostPort <= 0 {
			continue
		}
		h := hostPort{ip: port.HostIP, protocol: port.Protocol, port: port.HostPort}
		if h.ip == "" {
			h.ip = "0.0.0.0"
		}
		if h.protocol == "" {
			h.protocol = corev1.ProtocolTCP
		}
		p.ports = append(p.ports, h)
	}
}

func (h hostPort) conflicts(o hostPort) bool {
	return h.port == o.port && h.protocol == o.protocol &&
		(h.ip == o.ip || h.ip == "0.0.0.0" || o.ip == "0.0.0.0")
}

func (p *podInfo) addTerms(a *corev1.Affinity) {
	if a.PodAffinity != nil {
		p.addRequired(requiredAffinity, a.PodAffinity.RequiredDuringSchedulingIgnoredDuringExecution)
		p.addPreferred(preferredAffinity, a.PodAffinity.PreferredDuringSchedulingIgnoredDuringExecution)
	}
	if a.PodAntiAffinity != nil {
		p.addRequired(requiredAntiAffinity, a.PodAntiAffinity.RequiredDuringSchedulingIgnoredDuringExecution)
		p.addPreferred(preferredAntiAffinity, a.PodAntiAffinity.PreferredDuringSchedulingIgnoredDuringExecution)
	}
}

func (p *podInfo) addRequired(kind termKind, list []corev1.PodAffinityTerm) {
	for i := range list {
		p.addTerm(kind, &list[i], 0)
	}
}

func (p *podInfo) addPreferred(kind termKind, list []corev1.WeightedPodAffinityTerm) {
	for i := range list {
		p.addTerm(kind, &list[i].PodAffinityTerm, int64(list[i].Weight))
	}
}

func (p *podInfo) addTerm(kind termKind, from *corev1.PodAffinityTerm, weight int64) {
	t, err := makeTerm(p.pod.Namespace, from, weight)
	if err != nil {
		if p.err == nil {
			p.err = err
		}
		return
	}
	p.terms[kind] = append(p.terms[kind], t)
}

func makeTerm(namespace string, from *corev1.PodAffinityTerm, weight int64) (*term, error) {
	selector, err := metav1.LabelSelectorAsSelector(from.LabelSelector)
	if err != nil {
		return nil, fmt.Errorf("inter-pod affinity: labelSelector: %w", err)
	}
	namespaceSelector, err := metav1.LabelSelectorAsSelector(from.NamespaceSelector)
	if err != nil {
		return nil, fmt.Errorf("inter-pod affinity: namespaceSelector: %w", err)
	}
	t := &term{
		selector:          selector,
		namespaceSelector: namespaceSelector,
		topologyKey:       from.TopologyKey,
		weight:            weight,
	}
	if len(from.Namespaces) == 0 && from.NamespaceSelector == nil {
		t.namespaces = []string{namespace}
	} else {
		t.namespaces = slices.Clone(from.Namespaces)
		slices.Sort(t.namespaces)
		t.namespaces = slices.Compact(t.namespaces)
	}
	t.key = t.identity()
	return t, nil
}

func (t *term) identity() string {
	return t.topologyKey + "|" + strconv.FormatInt(t.weight, 10) + "|" + t.matchIdentity()
}

// matchIdentity is equal for terms that match the same pods.
func (t *term) matchIdentity() string {
	return strings.Join(t.namespaces, ",") + "|" + selectorIdentity(t.namespaceSelector) + "|" + selectorIdentity(t.selector)
}

// selectorIdentity tells the selector of nothing from that of everything, whose
// String methods agree.
func selectorIdentity(s labels.Selector) string {
	if _, selectable := s.Requirements(); !selectable {
		return "!"
	}
	return s.String()
}

// resolveNamespaces returns the term with its namespace selector replaced by
// the names of the namespaces that it selects now. The selector of everything
// is kept: it needs no names.
func (t *term) resolveNamespaces(s State) *term {
	if t.namespaceSelector.Empty() {
		return t
	}
	if _, selectable := t.namespaceSelector.Requirements(); !selectable {
		return t
	}
	resolved := *t
	resolved.namespaces = slices.Clone(t.namespaces)
	for ns := range s.Namespaces() {
		if t.namespaceSelector.Matches(labels.Set(ns.Labels)) {
			resolved.namespaces = append(resolved.namespaces, ns.Name)
		}
	}
	slices.Sort(resolved.namespaces)
	resolved.namespaces = slices.Compact(resolved.namespaces)
	resolved.namespaceSelector = labels.Nothing()
	resolved.key = resolved.identity()
	return &resolved
}

// hasTerms reports whether the pod has any inter-pod terms.
func (p *podInfo) hasTerms() bool {
	for _, list := range p.terms {
		if len(list) > 0 {
			return true
		}
	}
	return false
}

// occupies reports whether the pod takes room on the node it names: it does
// until it is gone or its containers are done.
func occupies(pod *corev1.Pod) bool {
	return pod.Spec.NodeName != "" && !objects.PodEnded(pod)
}

// pending reports whether the pod waits for a node and may be given one.
func pending(pod *corev1.Pod) bool {
	return pod.Spec.NodeName == "" && !objects.PodEnded(pod) && pod.DeletionTimestamp == nil &&
		len(pod.Spec.SchedulingGates) == 0
}
