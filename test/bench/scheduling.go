package main

import (
	"context"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"
	corev1 "k8s.io/api/core/v1"
	schedulingv1 "k8s.io/api/scheduling/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
)

// shape is one of upstream's workloads for its scheduler (test/integration/scheduler_perf),
// with its objects and, at 500 and 5,000 Nodes, its numbers.
type shape struct {
	name string
	// zones are those of the Nodes, in turn; none: they have no such label.
	zones []string
	// one: the only Node is large, of a name that pods can ask for, and the others, if
	// there are any, are none of theirs.
	one, alone bool
	// before are the pods that are placed before the clock runs, and what they are like;
	// gated are those that wait for their gate meanwhile.
	before, gated func(nodes int) int
	first         func(*corev1.Pod)
	// measured are the pods that are timed, and what they are like.
	measured func(nodes int) int
	pod      func(*corev1.Pod)
	// meanwhile goes on while they are placed.
	meanwhile func(l *load, ctx context.Context, namespace string) error
}

// bySize returns one number at 500 Nodes and another at 5,000, and one in between between.
func bySize(small, large int) func(int) int {
	return func(nodes int) int { return small + (large-small)*(nodes-500)/4500 }
}

var shapes = []shape{
	{name: "basic", before: bySize(500, 1000), measured: bySize(1000, 5000)},
	{name: "antiaffinity", before: bySize(100, 1000), measured: bySize(400, 2000), first: antiAffine, pod: antiAffine},
	{name: "affinity", zones: []string{"zone1"}, before: bySize(500, 5000), measured: bySize(1000, 2000), first: affine, pod: affine},
	{name: "nodeaffinity", zones: []string{"zone1"}, before: bySize(500, 5000), measured: bySize(1000, 5000), first: nodeAffine, pod: nodeAffine},
	{name: "spreading", zones: []string{"moon-1", "moon-2", "moon-3"}, before: bySize(1000, 5000), measured: bySize(1000, 2000), pod: spreads},
	{name: "preemption", before: bySize(2000, 20000), measured: bySize(500, 5000), first: asks("900m"), pod: urgent("3970m")},
	{name: "unschedulable", before: bySize(10, 100), measured: bySize(1000, 5000), meanwhile: (*load).impossible},
	{name: "daemonset", one: true, measured: bySize(2000, 10000), pod: named},
	{name: "gated", one: true, alone: true, gated: bySize(1000, 10000), before: bySize(2000, 10000), measured: bySize(2000, 10000), first: light, pod: light, meanwhile: (*load).departures},
	{name: "churn", measured: bySize(1000, 5000), meanwhile: (*load).churn},
}

// The name of the large Node, and that of the class of the pods that evict others.
const largeNode, urgentClass = "scheduler-perf-node", "bench-urgent"

func antiAffine(p *corev1.Pod) {
	p.Labels = map[string]string{"color": "green"}
	p.Spec.Affinity = &corev1.Affinity{PodAntiAffinity: &corev1.PodAntiAffinity{RequiredDuringSchedulingIgnoredDuringExecution: []corev1.PodAffinityTerm{
		{LabelSelector: &metav1.LabelSelector{MatchLabels: p.Labels}, TopologyKey: corev1.LabelHostname}}}}
}

func affine(p *corev1.Pod) {
	p.Labels = map[string]string{"color": "blue"}
	p.Spec.Affinity = &corev1.Affinity{PodAffinity: &corev1.PodAffinity{RequiredDuringSchedulingIgnoredDuringExecution: []corev1.PodAffinityTerm{
		{LabelSelector: &metav1.LabelSelector{MatchLabels: p.Labels}, TopologyKey: corev1.LabelTopologyZone}}}}
}

func nodeAffine(p *corev1.Pod) {
	p.Spec.Affinity = &corev1.Affinity{NodeAffinity: &corev1.NodeAffinity{RequiredDuringSchedulingIgnoredDuringExecution: &corev1.NodeSelector{
		NodeSelectorTerms: []corev1.NodeSelectorTerm{{MatchExpressions: []corev1.NodeSelectorRequirement{
			{Key: corev1.LabelTopologyZone, Operator: corev1.NodeSelectorOpIn, Values: []string{"zone1", "zone2"}}}}}}}}
}

func named(p *corev1.Pod) {
	light(p)
	p.Spec.Affinity = &corev1.Affinity{NodeAffinity: &corev1.NodeAffinity{RequiredDuringSchedulingIgnoredDuringExecution: &corev1.NodeSelector{
		NodeSelectorTerms: []corev1.NodeSelectorTerm{{MatchFields: []corev1.NodeSelectorRequirement{
			{Key: metav1.ObjectNameField, Operator: corev1.NodeSelectorOpIn, Values: []string{largeNode}}}}}}}}
}

func spreads(p *corev1.Pod) {
	p.Labels = map[string]string{"color": "blue"}
	p.Spec.TopologySpreadConstraints = []corev1.TopologySpreadConstraint{{MaxSkew: 5, TopologyKey: corev1.LabelTopologyZone,
		WhenUnsatisfiable: corev1.DoNotSchedule, LabelSelector: &metav1.LabelSelector{MatchLabels: p.Labels}}}
}

func light(p *corev1.Pod) { p.Spec.Containers[0].Resources = corev1.ResourceRequirements{} }

func asks(cpu string) func(*corev1.Pod) {
	return func(p *corev1.Pod) {
		p.Spec.Containers[0].Resources.Requests[corev1.ResourceCPU] = resource.MustParse(cpu)
	}
}

func urgent(cpu string) func(*corev1.Pod) {
	return func(p *corev1.Pod) {
		asks(cpu)(p)
		p.Spec.PriorityClassName = urgentClass
	}
}

// somePod is upstream's default pod. No agent reports for the Nodes, so it tolerates
// whatever is held against those.
func somePod(edit func(*corev1.Pod)) *corev1.Pod {
	none := int64(0)
	p := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{GenerateName: "pod-"}, Spec: corev1.PodSpec{
		TerminationGracePeriodSeconds: &none,
		Tolerations:                   []corev1.Toleration{{Operator: corev1.TolerationOpExists}},
		Containers: []corev1.Container{{Name: "pause", Image: "registry.example/pause:1", Resources: corev1.ResourceRequirements{Requests: corev1.ResourceList{
			corev1.ResourceCPU: resource.MustParse("100m"), corev1.ResourceMemory: resource.MustParse("500Mi")}}}},
	}}
	if edit != nil {
		edit(p)
	}
	return p
}

// each calls with numbers below n, from all clients.
func (l *load) each(ctx context.Context, n int, call func(ctx context.Context, client, i int) error) error {
	group, ctx := errgroup.WithContext(ctx)
	var next atomic.Int64
	for client := range l.clients {
		group.Go(func() error {
			for i := int(next.Add(1)) - 1; i < n; i = int(next.Add(1)) - 1 {
				if err := call(ctx, client, i); err != nil {
					return err
				}
			}
			return nil
		})
	}
	return group.Wait()
}

func (l *load) createPods(ctx context.Context, namespace string, n int, edit func(*corev1.Pod)) error {
	return l.each(ctx, n, func(ctx context.Context, client, _ int) error {
		_, err := l.clients[client].CoreV1().Pods(namespace).Create(ctx, somePod(edit), metav1.CreateOptions{})
		return err
	})
}

func benchNode(name, zone, pods string) *corev1.Node {
	capacity := corev1.ResourceList{corev1.ResourceCPU: resource.MustParse("4"), corev1.ResourceMemory: resource.MustParse("32Gi"), corev1.ResourcePods: resource.MustParse(pods)}
	n := &corev1.Node{
		ObjectMeta: metav1.ObjectMeta{Name: name, Labels: map[string]string{corev1.LabelHostname: name}},
		Status: corev1.NodeStatus{Capacity: capacity, Allocatable: capacity, Conditions: []corev1.NodeCondition{{
			Type: corev1.NodeReady, Status: corev1.ConditionTrue, Reason: "Bench", LastHeartbeatTime: metav1.Now(), LastTransitionTime: metav1.Now()}}},
	}
	if zone != "" {
		n.Labels[corev1.LabelTopologyZone] = zone
	}
	return n
}

// createNodes makes the Nodes of a shape.
func (l *load) createNodes(ctx context.Context, s shape, nodes int) error {
	if s.one {
		if _, err := l.clients[0].CoreV1().Nodes().Create(ctx, benchNode(largeNode, "", "90000"), metav1.CreateOptions{}); err != nil {
			return err
		}
	}
	if s.alone {
		nodes = 0
	}
	if err := l.each(ctx, nodes, func(ctx context.Context, client, i int) error {
		zone := ""
		if len(s.zones) > 0 {
			zone = s.zones[i%len(s.zones)]
		}
		_, err := l.clients[client].CoreV1().Nodes().Create(ctx, benchNode(fmt.Sprintf("%s-%d", l.namespace, i), zone, "110"), metav1.CreateOptions{})
		return err
	}); err != nil {
		return err
	}
	return l.nodesAtRest(ctx)
}

// clear deletes the pods of a namespace, and all Nodes.
func (l *load) clear(ctx context.Context, namespace string) error {
	now := int64(0)
	pods, err := l.clients[0].CoreV1().Pods(namespace).List(ctx, metav1.ListOptions{})
	if err != nil {
		return err
	}
	if err := l.each(ctx, len(pods.Items), func(ctx context.Context, client, i int) error {
		err := l.clients[client].CoreV1().Pods(namespace).Delete(ctx, pods.Items[i].Name, metav1.DeleteOptions{GracePeriodSeconds: &now})
		if apierrors.IsNotFound(err) {
			return nil
		}
		return err
	}); err != nil {
		return err
	}
	nodes, err := l.clients[0].CoreV1().Nodes().List(ctx, metav1.ListOptions{})
	if err != nil {
		return err
	}
	if err := l.each(ctx, len(nodes.Items), func(ctx context.Context, client, i int) error {
		return l.clients[client].CoreV1().Nodes().Delete(ctx, nodes.Items[i].Name, metav1.DeleteOptions{})
	}); err != nil {
		return err
	}
	return until(ctx, "the Nodes and pods to be gone", nil, func(ctx context.Context) error {
		nodes, err := l.clients[0].CoreV1().Nodes().List(ctx, metav1.ListOptions{})
		if err != nil {
			return err
		}
		pods, err := l.clients[0].CoreV1().Pods(namespace).List(ctx, metav1.ListOptions{})
		if err != nil {
			return err
		}
		if n := len(nodes.Items) + len(pods.Items); n > 0 {
			return fmt.Errorf("%d are there", n)
		}
		return nil
	})
}

// schedule returns how many of a shape's pods get a Node in a second, from the first's
// creation to the last's binding, and how long that took.
func (l *load) schedule(ctx context.Context, s shape, nodes int, began, ended func()) (m measure, err error) {
	ctx, cancel := context.WithTimeout(ctx, 2*rowPatience)
	defer cancel()
	namespace := fmt.Sprintf("%s-%s-%d", l.namespace, s.name, nodes)
	if err := l.createNodes(ctx, s, nodes); err != nil {
		return m, err
	}
	if err := l.newNamespace(ctx, namespace); err != nil {
		return m, err
	}
	class := &schedulingv1.PriorityClass{ObjectMeta: metav1.ObjectMeta{Name: urgentClass}, Value: 1000}
	if _, err := l.clients[0].SchedulingV1().PriorityClasses().Create(ctx, class, metav1.CreateOptions{}); err != nil && !apierrors.IsAlreadyExists(err) {
		return m, err
	}
	watch, stop := context.WithCancel(ctx)
	defer stop()
	pods := follow[*corev1.Pod](watch, l.clients[0].CoreV1().RESTClient(), "pods", namespace)
	if s.gated != nil {
		if err := l.createPods(ctx, namespace, s.gated(nodes), func(p *corev1.Pod) {
			p.Spec.SchedulingGates = []corev1.PodSchedulingGate{{Name: "bench.example/hold"}}
		}); err != nil {
			return m, err
		}
	}
	placed := map[types.UID]bool{}
	place := func(n int, edit func(*corev1.Pod)) error {
		group, ctx := errgroup.WithContext(ctx)
		group.Go(func() error { return l.createPods(ctx, namespace, n, edit) })
		group.Go(func() error {
			for want := len(placed) + n; len(placed) < want; {
				pod, err := next(ctx, pods)
				if err != nil {
					return fmt.Errorf("%d of %d pods have a Node: %w", len(placed), want, err)
				}
				if pod.Spec.NodeName != "" {
					placed[pod.UID] = true
				}
			}
			return nil
		})
		return group.Wait()
	}
	if s.before != nil {
		if err := place(s.before(nodes), s.first); err != nil {
			return m, fmt.Errorf("before the row: %w", err)
		}
	}
	aside, _ := errgroup.WithContext(ctx)
	during, finish := context.WithCancel(ctx)
	if s.meanwhile != nil {
		aside.Go(func() error { return s.meanwhile(l, during, namespace) })
	}
	began()
	at, n := time.Now(), s.measured(nodes)
	err = place(n, s.pod)
	m.took = time.Since(at)
	m.rate = float64(n) / m.took.Seconds()
	ended()
	finish()
	if other := aside.Wait(); err == nil && during.Err() == nil {
		err = other
	}
	stop()
	if err != nil {
		return m, err
	}
	fmt.Fprintf(os.Stderr, "    %d pods in %.1f s; load %s", n, m.took.Seconds(), loadAverage())
	return m, l.clear(ctx, namespace)
}

// every calls at a rate until ctx ends.
func every(ctx context.Context, d time.Duration, call func(i int) error) error {
	ticker := time.NewTicker(d)
	defer ticker.Stop()
	for i := 0; ; i++ {
		select {
		case <-ctx.Done():
			return nil
		case <-ticker.C:
		}
		if err := call(i); err != nil && ctx.Err() == nil {
			return err
		}
	}
}

// impossible creates five pods a second that fit nowhere and come before all others.
func (l *load) impossible(ctx context.Context, namespace string) error {
	return every(ctx, 200*time.Millisecond, func(int) error {
		_, err := l.clients[1].CoreV1().Pods(namespace).Create(ctx, somePod(urgent("9")), metav1.CreateOptions{})
		return err
	})
}

// departures deletes fifty of the pods a second that were placed before.
func (l *load) departures(ctx context.Context, namespace string) error {
	list, err := l.clients[1].CoreV1().Pods(namespace).List(ctx, metav1.ListOptions{})
	if err != nil {
		return err
	}
	there := slices.DeleteFunc(list.Items, func(p corev1.Pod) bool { return p.Spec.NodeName == "" })
	return every(ctx, 20*time.Millisecond, func(i int) error {
		if i >= len(there) {
			return nil
		}
		err := l.clients[1].CoreV1().Pods(namespace).Delete(ctx, there[i].Name, metav1.DeleteOptions{})
		if apierrors.IsNotFound(err) {
			return nil
		}
		return err
	})
}

// churn creates a Node that takes no pods, a pod that fits nowhere and a Service, one a
// second, and deletes them again.
func (l *load) churn(ctx context.Context, namespace string) error {
	api := l.clients[1].CoreV1()
	const node, name = "bench-churn", "churn"
	return every(ctx, time.Second, func(i int) error {
		var err error
		switch i % 6 {
		case 0:
			_, err = api.Nodes().Create(ctx, benchNode(node, "", "0"), metav1.CreateOptions{})
		case 1:
			pod := somePod(urgent("9"))
			pod.Name = name
			_, err = api.Pods(namespace).Create(ctx, pod, metav1.CreateOptions{})
		case 2:
			_, err = api.Services(namespace).Create(ctx, &corev1.Service{ObjectMeta: metav1.ObjectMeta{Name: name}, Spec: corev1.ServiceSpec{
				Selector: map[string]string{"app": "foo"}, Ports: []corev1.ServicePort{{Port: 8080}}}}, metav1.CreateOptions{})
		case 3:
			err = api.Nodes().Delete(ctx, node, metav1.DeleteOptions{})
		case 4:
			err = api.Pods(namespace).Delete(ctx, name, metav1.DeleteOptions{})
		case 5:
			err = api.Services(namespace).Delete(ctx, name, metav1.DeleteOptions{})
		}
		return err
	})
}

func shapeList() string {
	var names []string
	for _, s := range shapes {
		names = append(names, s.name)
	}
	return strings.Join(names, ", ")
}

// schedulingRow is the prefix of the names of the rows of shapes.
const schedulingRow = "scheduling"

// expand puts a row for each shape and number of Nodes in the place of the row
// "scheduling".
func (o *options) expand(shapeNames, nodes string) error {
	at := slices.Index(o.rows, schedulingRow)
	if at < 0 {
		return nil
	}
	var names []string
	for _, number := range strings.Split(nodes, ",") {
		n, err := strconv.Atoi(number)
		if err != nil || n < 500 || n > 5000 {
			return fmt.Errorf("-nodes: %q is not from 500 to 5000", number)
		}
		for _, name := range strings.Split(shapeNames, ",") {
			found := false
			for _, s := range shapes {
				if name != "all" && name != s.name {
					continue
				}
				found = true
				row := fmt.Sprintf("%s-%s-%d", schedulingRow, s.name, n)
				names = append(names, row)
				rows = append(rows, struct{ name, title, wanted string }{row, fmt.Sprintf("pods placed, %s, %d Nodes", s.name, n), "10 × Kubernetes"})
				o.scheduling = append(o.scheduling, schedulingShape{row, s, n})
			}
			if !found {
				return fmt.Errorf("-shapes: no shape %q", name)
			}
		}
	}
	o.rows = slices.Replace(o.rows, at, at+1, names...)
	return nil
}

// schedulingShape is a row of one shape.
type schedulingShape struct {
	row   string
	shape shape
	nodes int
}
