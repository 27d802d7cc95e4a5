package sched

import (
	"slices"
	"testing"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
)

func requests(pairs ...string) corev1.ResourceList {
	l := corev1.ResourceList{}
	for i := 0; i < len(pairs); i += 2 {
		l[corev1.ResourceName(pairs[i])] = resource.MustParse(pairs[i+1])
	}
	return l
}

func container(pairs ...string) corev1.Container {
	return corev1.Container{Name: "c", Resources: corev1.ResourceRequirements{Requests: requests(pairs...)}}
}

func sidecar(pairs ...string) corev1.Container {
	c := container(pairs...)
	always := corev1.ContainerRestartPolicyAlways
	c.RestartPolicy = &always
	return c
}

func TestPodRequests(t *testing.T) {
	t.Parallel()
	const mi = 1 << 20
	for _, tc := range []struct {
		name                                    string
		pod                                     corev1.Pod
		cpu, memory, ephemeral, scored, scoredM int64
		scalars                                 []scalar
	}{
		{
			name:   "nothing requested is scored as something",
			pod:    corev1.Pod{Spec: corev1.PodSpec{Containers: []corev1.Container{container(), container()}}},
			scored: 200, scoredM: 400 * mi,
		},
		{
			name: "containers are added up",
			pod: corev1.Pod{Spec: corev1.PodSpec{Containers: []corev1.Container{
				container("cpu", "250m", "memory", "64Mi"), container("cpu", "1", "ephemeral-storage", "1Mi")}}},
			cpu: 1250, memory: 64 * mi, ephemeral: mi, scored: 1250, scoredM: 264 * mi,
		},
		{
			name: "an explicit zero is not replaced in scoring",
			pod: corev1.Pod{Spec: corev1.PodSpec{Containers: []corev1.Container{
				container("cpu", "0", "memory", "0")}}},
		},
		{
			name: "the largest init container counts when larger than all containers",
			pod: corev1.Pod{Spec: corev1.PodSpec{
				InitContainers: []corev1.Container{container("cpu", "2", "memory", "1Mi"), container("cpu", "1", "memory", "1Mi")},
				Containers:     []corev1.Container{container("cpu", "500m", "memory", "2Mi")}}},
			cpu: 2000, memory: 2 * mi, scored: 2000, scoredM: 2 * mi,
		},
		{
			name: "a sidecar runs beside the containers and later init containers",
			pod: corev1.Pod{Spec: corev1.PodSpec{
				InitContainers: []corev1.Container{sidecar("cpu", "1", "memory", "1Mi"), container("cpu", "2", "memory", "1Mi")},
				Containers:     []corev1.Container{container("cpu", "500m", "memory", "2Mi")}}},
			cpu: 3000, memory: 3 * mi, scored: 3000, scoredM: 3 * mi,
		},
		{
			name: "overhead is added",
			pod: corev1.Pod{Spec: corev1.PodSpec{Overhead: requests("cpu", "100m", "memory", "1Mi"),
				Containers: []corev1.Container{container("cpu", "1", "memory", "1Mi")}}},
			cpu: 1100, memory: 2 * mi, scored: 1100, scoredM: 2 * mi,
		},
		{
			name: "pod-level requests replace those of containers",
			pod: corev1.Pod{Spec: corev1.PodSpec{
				Resources:  &corev1.ResourceRequirements{Requests: requests("cpu", "3", "memory", "8Mi")},
				Containers: []corev1.Container{container("cpu", "1", "memory", "1Mi")}}},
			cpu: 3000, memory: 8 * mi, scored: 3000, scoredM: 8 * mi,
		},
		{
			name: "extended resources and huge pages are counted by name",
			pod: corev1.Pod{Spec: corev1.PodSpec{Containers: []corev1.Container{
				container("cpu", "1", "memory", "1Mi", "example.com/gpu", "2", "hugepages-2Mi", "4Mi")}}},
			cpu: 1000, memory: mi, scored: 1000, scoredM: mi,
			scalars: []scalar{{"example.com/gpu", 2}, {"hugepages-2Mi", 4 * mi}},
		},
		{
			name: "a pod being resized takes the larger of wanted and allocated",
			pod: corev1.Pod{
				Spec: corev1.PodSpec{Containers: []corev1.Container{container("cpu", "1", "memory", "1Mi")}},
				Status: corev1.PodStatus{ContainerStatuses: []corev1.ContainerStatus{{
					Name: "c", AllocatedResources: requests("cpu", "2", "memory", "1Mi"),
					Resources: &corev1.ResourceRequirements{Requests: requests("cpu", "2", "memory", "1Mi")}}}}},
			cpu: 2000, memory: mi, scored: 2000, scoredM: mi,
		},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			r, cpu, memory := podRequests(&tc.pod)
			if r.milliCPU != tc.cpu || r.memory != tc.memory || r.ephemeralStorage != tc.ephemeral || !slices.Equal(r.scalars, tc.scalars) {
				t.Errorf("requests %+v; want cpu %d memory %d ephemeral %d scalars %v", r, tc.cpu, tc.memory, tc.ephemeral, tc.scalars)
			}
			if cpu != tc.scored || memory != tc.scoredM {
				t.Errorf("scored cpu %d memory %d; want %d %d", cpu, memory, tc.scored, tc.scoredM)
			}
		})
	}
}

// TestPlainRequestsShortcut holds the shortcut against the general way.
func TestPlainRequestsShortcut(t *testing.T) {
	t.Parallel()
	for _, c := range [][]corev1.Container{
		{container()}, {container("cpu", "1")}, {container("memory", "1Gi")},
		{container("cpu", "0"), container("cpu", "1500u", "memory", "1k")},
	} {
		plain := &corev1.Pod{Spec: corev1.PodSpec{Containers: c}}
		slow := plain.DeepCopy()
		slow.Spec.Overhead = requests("cpu", "0") // keeps it off the shortcut
		a, aCPU, aMemory := podRequests(plain)
		b, bCPU, bMemory := podRequests(slow)
		if a.milliCPU != b.milliCPU || a.memory != b.memory || aCPU != bCPU || aMemory != bMemory {
			t.Errorf("%v: shortcut %+v %d %d; general %+v %d %d", c, a, aCPU, aMemory, b, bCPU, bMemory)
		}
	}
}

func TestInsufficient(t *testing.T) {
	t.Parallel()
	used := []corev1.Container{container("cpu", "3", "memory", "6Gi", "example.com/gpu", "1")}
	for _, tc := range []struct {
		name         string
		allocatable  []string
		containers   []corev1.Container
		want         []string
		unresolvable bool
	}{
		{name: "fits exactly", allocatable: []string{"cpu", "4", "memory", "8Gi", "pods", "2"}, containers: []corev1.Container{container("cpu", "1", "memory", "2Gi")}},
		{name: "one millicore too much", allocatable: []string{"cpu", "4", "memory", "8Gi", "pods", "2"}, containers: []corev1.Container{container("cpu", "1001m")}, want: []string{"Insufficient cpu"}},
		{name: "more than the whole node", allocatable: []string{"cpu", "4", "memory", "8Gi", "pods", "2"}, containers: []corev1.Container{container("cpu", "5", "memory", "3Gi")}, want: []string{"Insufficient cpu", "Insufficient memory"}, unresolvable: true},
		{name: "no room for another pod, however small", allocatable: []string{"cpu", "4", "memory", "8Gi", "pods", "1"}, containers: []corev1.Container{container()}, want: []string{"Too many pods"}},
		{name: "a node that says nothing of pods takes none", allocatable: []string{"cpu", "4", "memory", "8Gi"}, containers: []corev1.Container{container()}, want: []string{"Too many pods"}},
		{name: "requests nothing on an overcommitted node", allocatable: []string{"cpu", "1", "pods", "2"}, containers: []corev1.Container{container()}},
		{name: "extended resource in use", allocatable: []string{"cpu", "4", "memory", "8Gi", "pods", "2", "example.com/gpu", "1"}, containers: []corev1.Container{container("example.com/gpu", "1")}, want: []string{"Insufficient example.com/gpu"}},
		{name: "extended resource unknown to the node", allocatable: []string{"cpu", "4", "memory", "8Gi", "pods", "2"}, containers: []corev1.Container{container("example.com/fpga", "1")}, want: []string{"Insufficient example.com/fpga"}, unresolvable: true},
		{name: "ephemeral storage", allocatable: []string{"cpu", "4", "memory", "8Gi", "pods", "2", "ephemeral-storage", "1Gi"}, containers: []corev1.Container{container("ephemeral-storage", "2Gi")}, want: []string{"Insufficient ephemeral-storage"}, unresolvable: true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			n := &nodeInfo{allocatable: makeResources(requests(tc.allocatable...))}
			n.add(makePodInfo(&corev1.Pod{Spec: corev1.PodSpec{Containers: used}}))
			var got status
			if s := n.insufficient(makePodInfo(&corev1.Pod{Spec: corev1.PodSpec{Containers: tc.containers}}), &profile{}); s != nil {
				got = *s
			}
			if !slices.Equal(got.reasons, tc.want) || got.unresolvable != tc.unresolvable {
				t.Errorf("got %q, %v; want %q, %v", got.reasons, got.unresolvable, tc.want, tc.unresolvable)
			}
		})
	}
}

func TestIsScalar(t *testing.T) {
	t.Parallel()
	for name, want := range map[string]bool{
		"example.com/gpu": true, "hugepages-1Gi": true, "attachable-volumes-csi-x": true, "kubernetes.io/batch": true,
		"cpu": false, "storage": false, "requests.example.com/gpu": false, "example.com/": false,
	} {
		if got := isScalar(corev1.ResourceName(name)); got != want {
			t.Errorf("isScalar(%q) = %v", name, got)
		}
	}
}

func TestNodeAddRemove(t *testing.T) {
	t.Parallel()
	pod := &corev1.Pod{Spec: corev1.PodSpec{Containers: []corev1.Container{container("cpu", "1", "example.com/gpu", "1")}}}
	pod.Spec.Containers[0].Ports = []corev1.ContainerPort{{HostPort: 80}}
	a, b := makePodInfo(pod), makePodInfo(pod)
	n := &nodeInfo{}
	n.add(a)
	before := n.clone()
	n.add(b)
	if !n.remove(b) || n.remove(b) {
		t.Error("remove must report whether the pod was there")
	}
	if n.requested.milliCPU != before.requested.milliCPU || n.requested.scalar("example.com/gpu") != 1 || !slices.Equal(n.ports, before.ports) || len(n.pods) != 1 {
		t.Errorf("after add and remove: %+v; want %+v", n, before)
	}
	c := n.clone()
	c.add(b)
	if n.requested.scalar("example.com/gpu") != 1 || len(n.pods) != 1 {
		t.Error("a clone shares sums with its original")
	}
}
