package sched

import (
	"fmt"
	"iter"
	"slices"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	policyv1 "k8s.io/api/policy/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
)

// benchState is a State whose lists are ready made.
type benchState struct {
	*fakeState
	nodes []*corev1.Node
	pods  []*corev1.Pod
}

func (s *benchState) Nodes() iter.Seq[*corev1.Node] { return slices.Values(s.nodes) }
func (s *benchState) Pods() iter.Seq[*corev1.Pod]   { return slices.Values(s.pods) }

// The fake sorts all it has for a list; these have nothing to list.
func (s *benchState) ServicesIn(string) iter.Seq[*corev1.Service] {
	return slices.Values([]*corev1.Service(nil))
}
func (s *benchState) PodDisruptionBudgets() iter.Seq[*policyv1.PodDisruptionBudget] {
	return slices.Values([]*policyv1.PodDisruptionBudget(nil))
}

// template makes the pods of a workload.
type template struct {
	name string
	edit func(*corev1.Pod)
}

var templates = []template{
	{"plain", func(*corev1.Pod) {}},
	{"spread", func(p *corev1.Pod) {
		p.Spec.TopologySpreadConstraints = []corev1.TopologySpreadConstraint{{
			MaxSkew: 1, TopologyKey: corev1.LabelTopologyZone, WhenUnsatisfiable: corev1.DoNotSchedule,
			LabelSelector: &metav1.LabelSelector{MatchLabels: map[string]string{"app": p.Labels["app"]}},
		}}
	}},
	{"antiaffinity", func(p *corev1.Pod) {
		p.Spec.Affinity = &corev1.Affinity{PodAntiAffinity: &corev1.PodAntiAffinity{
			RequiredDuringSchedulingIgnoredDuringExecution: []corev1.PodAffinityTerm{{
				TopologyKey:   corev1.LabelHostname,
				LabelSelector: &metav1.LabelSelector{MatchLabels: map[string]string{"app": p.Labels["app"]}},
			}},
		}}
	}},
	{"nodeaffinity", func(p *corev1.Pod) { p.Spec.NodeSelector = map[string]string{corev1.LabelTopologyZone: "zone-1"} }},
}

// workload is pod number i of a Deployment of 100 pods.
func workload(i int, t template, s *fakeState) *corev1.Pod {
	app := fmt.Sprintf("%s-%d", t.name, i/100)
	name := fmt.Sprintf("%s-%d", app, i)
	namespace := fmt.Sprintf("ns-%d", i/1000)
	yes := true
	p := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{
			Namespace: namespace, Name: name, UID: types.UID(name), Labels: map[string]string{"app": app},
			OwnerReferences: []metav1.OwnerReference{{APIVersion: "apps/v1", Kind: "ReplicaSet", Name: app, Controller: &yes}},
		},
		Spec: corev1.PodSpec{
			SchedulerName: corev1.DefaultSchedulerName,
			Containers: []corev1.Container{{Name: "main", Image: "app", Resources: corev1.ResourceRequirements{Requests: corev1.ResourceList{
				corev1.ResourceCPU: resource.MustParse("100m"), corev1.ResourceMemory: resource.MustParse("128Mi"),
			}}}},
		},
	}
	t.edit(p)
	if s != nil && i%100 == 0 {
		s.put(replicaSet(namespace, app))
	}
	return p
}

// benchCluster is a cluster of n nodes in 10 zones with 30 pods each.
func benchCluster(n int) *benchState {
	s := &benchState{fakeState: newState()}
	for i := range n {
		node := makeNode(fmt.Sprintf("node-%d", i))
		node.Labels[corev1.LabelTopologyZone] = fmt.Sprintf("zone-%d", i%10)
		node.Status.Allocatable[corev1.ResourceCPU] = resource.MustParse("32")
		node.Status.Allocatable[corev1.ResourceMemory] = resource.MustParse("128Gi")
		s.nodes = append(s.nodes, node)
		s.objects[keyOf(node)] = node
	}
	for i := range 30 * n {
		pod := workload(i, template{"running", func(*corev1.Pod) {}}, s.fakeState)
		pod.Spec.NodeName = s.nodes[i%n].Name
		s.pods = append(s.pods, pod)
		s.objects[keyOf(pod)] = pod
	}
	return s
}

// BenchmarkSchedule places 1,000 pods of 10 Deployments in one call, on a
// cluster that runs 30 pods on each node. pods/s is the figure to look at.
func BenchmarkSchedule(b *testing.B) {
	for _, n := range []int{100, 1000, 5000} {
		s := benchCluster(n)
		cluster := Build(s)
		for _, t := range templates {
			b.Run(fmt.Sprintf("nodes=%d/%s", n, t.name), func(b *testing.B) {
				const pods = 1000
				state := &benchState{fakeState: s.clone(), nodes: s.nodes, pods: s.pods}
				var refs []Ref
				for i := range pods {
					pod := workload(i, t, state.fakeState)
					state.put(pod)
					refs = append(refs, Ref{KindPod, pod.Namespace, pod.Name})
				}
				advanced := cluster.Advance(state, refs)
				b.ResetTimer()
				bound := 0
				for i := range b.N {
					plan, err := Schedule(DefaultConfig(), Input{Seed: uint64(i), State: state, Cluster: advanced})
					if err != nil {
						b.Fatal(err)
					}
					bound += len(plan.Bindings)
				}
				b.ReportMetric(float64(bound)/b.Elapsed().Seconds(), "pods/s")
				b.ReportMetric(float64(bound)/float64(b.N), "bound")
			})
		}
	}
}

// BenchmarkOne places a single new pod, as after kubectl run: the change is
// followed and planned.
func BenchmarkOne(b *testing.B) {
	for _, n := range []int{100, 1000, 5000} {
		s := benchCluster(n)
		cluster := Build(s)
		pod := workload(7, templates[0], s.fakeState)
		s.put(pod, replicaSet(pod.Namespace, "plain-0"))
		refs := []Ref{{KindPod, pod.Namespace, pod.Name}}
		b.Run(fmt.Sprintf("nodes=%d", n), func(b *testing.B) {
			for i := range b.N {
				plan, err := Schedule(DefaultConfig(), Input{Seed: uint64(i), State: s, Cluster: cluster.Advance(s, refs)})
				if err != nil || len(plan.Bindings) != 1 {
					b.Fatal(plan, err)
				}
			}
		})
	}
}

// BenchmarkBuild derives a Cluster from nothing, as after an election.
func BenchmarkBuild(b *testing.B) {
	for _, n := range []int{100, 1000, 5000} {
		s := benchCluster(n)
		b.Run(fmt.Sprintf("nodes=%d/pods=%d", n, 30*n), func(b *testing.B) {
			b.ReportAllocs()
			for range b.N {
				Build(s)
			}
		})
	}
}

// BenchmarkFull plans 1,000 equal pods that fit nowhere.
func BenchmarkFull(b *testing.B) {
	s := benchCluster(5000)
	var refs []Ref
	for i := range 1000 {
		pod := workload(i, template{"huge", func(p *corev1.Pod) {
			p.Spec.Containers[0].Resources.Requests[corev1.ResourceCPU] = resource.MustParse("31")
		}}, s.fakeState)
		s.put(pod)
		refs = append(refs, Ref{KindPod, pod.Namespace, pod.Name})
	}
	cluster := Build(s).Advance(s, refs)
	b.ResetTimer()
	for i := range b.N {
		start := time.Now()
		plan, err := Schedule(DefaultConfig(), Input{Seed: uint64(i), State: s, Cluster: cluster})
		if err != nil || len(plan.Failures) != 1000 {
			b.Fatal(len(plan.Failures), err)
		}
		b.ReportMetric(1000/time.Since(start).Seconds(), "pods/s")
	}
}

// BenchmarkPreempt finds victims for 100 important pods on full nodes.
func BenchmarkPreempt(b *testing.B) {
	for _, n := range []int{100, 1000, 5000} {
		s := benchCluster(n)
		high := int32(1000)
		var refs []Ref
		for i := range 100 {
			pod := workload(i, template{"urgent", func(p *corev1.Pod) {
				p.Spec.Priority = &high
				p.Spec.Containers[0].Resources.Requests[corev1.ResourceCPU] = resource.MustParse("30")
			}}, s.fakeState)
			s.put(pod)
			refs = append(refs, Ref{KindPod, pod.Namespace, pod.Name})
		}
		cluster := Build(s).Advance(s, refs)
		b.Run(fmt.Sprintf("nodes=%d", n), func(b *testing.B) {
			found := 0
			for i := range b.N {
				cfg := DefaultConfig()
				cfg.MaxVictimSearches = 0
				plan, err := Schedule(cfg, Input{Now: epoch, Seed: uint64(i), State: s, Cluster: cluster})
				if err != nil {
					b.Fatal(err)
				}
				found += len(plan.Preemptions)
			}
			b.ReportMetric(float64(found)/b.Elapsed().Seconds(), "preemptions/s")
		})
	}
}
