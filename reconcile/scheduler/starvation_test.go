package scheduler_test

import (
	"fmt"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"timonel/reconcile"
	"timonel/reconcile/scheduler"
	"timonel/reconcile/storytest"
	"timonel/sched"
)

// tooLarge returns a story with the scheduler, a node of 64 cores, and n pods that want more.
func tooLarge(t *testing.T, n int) *storytest.Story {
	s, err := scheduler.New(sched.DefaultConfig())
	require.NoError(t, err)
	story := storytest.New(storytest.NewWorld(t), s)
	story.Add(storytest.Node("n1"))
	for i := range n {
		story.Add(podOf(fmt.Sprintf("large-%d", i), "65"))
	}
	story.Start()
	return story
}

func podOf(name, cpu string) *corev1.Pod {
	return &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: name},
		Spec: corev1.PodSpec{
			SchedulerName: corev1.DefaultSchedulerName,
			Containers:    []corev1.Container{{Name: "c", Resources: corev1.ResourceRequirements{Requests: corev1.ResourceList{corev1.ResourceCPU: resource.MustParse(cpu)}}}},
		},
	}
}

// Many pods that fit nowhere do not keep a younger one that fits from its node,
// whatever changes between the passes.
func TestPodsThatFitNowhereHoldUpNoOther(t *testing.T) {
	t.Parallel()
	for name, edit := range map[string]func(node map[string]any, i int){
		"labels change": func(node map[string]any, i int) {
			node["metadata"].(map[string]any)["labels"] = map[string]any{"pass": fmt.Sprint(i)}
		},
		"what they lack changes": func(node map[string]any, i int) {
			node["status"].(map[string]any)["allocatable"].(map[string]any)["cpu"] = fmt.Sprint(40 + i%20)
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := tooLarge(t, 600)
			s.Now = s.Now.Add(time.Second)
			s.Add(podOf("small", "1"))
			for i := range 5 {
				s.Edit(reconcile.NodesResource, "", "n1", func(node map[string]any) { edit(node, i) })
				s.Step()
				s.Now = s.Now.Add(100 * time.Millisecond)
				if pod, ok := s.Snapshot().Pods().Get("default", "small"); ok && pod.Spec.NodeName == "n1" {
					require.LessOrEqual(t, i, 2)
					return
				}
			}
			t.Fatal("the pod that fits has no node after 5 passes")
		})
	}
}

// Pods that wait are not written again because nodes that are none for them come and
// go, nor because time passes.
func TestPodsThatWaitAreAtRest(t *testing.T) {
	t.Parallel()
	s := tooLarge(t, 1000)
	s.Run(100)
	before := len(s.Writes())
	require.GreaterOrEqual(t, before, 1000, "each says once why it waits")
	s.Add(storytest.Node("n2"))
	for i := range 30 {
		s.Edit(reconcile.NodesResource, "", "n2", func(node map[string]any) {
			node["spec"] = map[string]any{"unschedulable": i%2 == 0}
		})
		s.Now = s.Now.Add(20 * time.Second)
		s.Run(100)
	}
	// Every five minutes each is looked at again, and says how many nodes there are.
	require.LessOrEqual(t, len(s.Writes())-before, 2*1000)
}
