package pod

import (
	"fmt"
	"testing"

	corev1 "k8s.io/api/core/v1"
	runtimev1 "k8s.io/cri-api/pkg/apis/runtime/v1"

	"timonel/agent/image"
	"timonel/agent/volume"
)

// atRest is a pod of n containers that run, and of which nothing is to be done.
func atRest(n int) (want, *seen) {
	pod := fieldPod()
	pod.Spec.InitContainers = nil
	s := &seen{
		observed: observed{sandboxes: []sandbox{{id: "s0", ready: true, ips: []string{"10.0.0.1"}}}, containers: map[string][]*container{}},
		known:    &known{asked: true, accepted: true, volumes: volume.Mounts{}, volumesOf: 1, policed: "s0", stopped: map[string]bool{}},
		beside:   map[string]beside{}, old: &corev1.PodStatus{}, images: map[string]image.Result{},
	}
	pod.Spec.Containers = nil
	for i := range n {
		spec := corev1.Container{Name: fmt.Sprintf("c%d", i), Image: "i"}
		c := &container{id: spec.Name, name: spec.Name, sandbox: "s0", state: runtimev1.ContainerState_CONTAINER_RUNNING, hash: hashContainer(&spec)}
		pod.Spec.Containers = append(pod.Spec.Containers, spec)
		s.containers[spec.Name], s.beside[c.id] = []*container{c}, beside{started: true, ready: true}
	}
	w := want{pod: pod, api: pod, shown: 1}
	w.give(allocate(pod, nil))
	s.applied = w.given
	return w, s
}

// BenchmarkPlan measures a pass over a pod of which nothing is to be done.
func BenchmarkPlan(b *testing.B) {
	for _, n := range []int{1, 10, 1000} {
		w, s := atRest(n)
		if p := plan(w, s, waits{}, epoch); len(p.steps) != 2 {
			b.Fatalf("it is not at rest: %v", p.steps)
		}
		b.Run(fmt.Sprintf("steps/%d", n), func(b *testing.B) {
			for b.Loop() {
				plan(w, s, waits{}, epoch)
			}
		})
		b.Run(fmt.Sprintf("status/%d", n), func(b *testing.B) {
			for b.Loop() {
				makeStatus(statusInput{want: w, seen: s, now: epoch})
			}
		})
	}
}
