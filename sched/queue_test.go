package sched

import (
	"fmt"
	"iter"
	"maps"
	"slices"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"pgregory.net/rapid"

	"timonel/state/objects"
)

// meta is what the object cache says of an object.
func meta(o runtime.Object) *objects.Meta {
	if o == nil {
		return nil
	}
	return &objects.Meta{Object: o, ObjectMeta: o.(metav1.ObjectMetaAccessor).GetObjectMeta().(*metav1.ObjectMeta)}
}

// changesBetween lists what differs between the objects of two states.
func changesBetween(before, after map[string]runtime.Object) objects.Changes {
	var out objects.Changes
	keys := slices.Concat(slices.Collect(maps.Keys(before)), slices.Collect(maps.Keys(after)))
	slices.Sort(keys)
	for _, key := range slices.Compact(keys) {
		if before[key] != after[key] {
			out.Changed = append(out.Changed, objects.Changed{Old: meta(before[key]), New: meta(after[key])})
		}
	}
	return out
}

// TestWhatLetsAPodInWakesIt checks that no change lets a pod be placed that the queue
// leaves aside: whichever changes come, each pod that is not to be tried fits nowhere.
func TestWhatLetsAPodInWakesIt(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		w := drawWorld(t)
		cfg, alone := DefaultConfig(), DefaultConfig()
		cfg.Profiles[0].DisablePreemption, alone.Profiles[0].DisablePreemption = rapid.Bool().Draw(t, "no preemption"), true
		now := epoch.Add(time.Hour)
		q, cluster := newQueue(mustCompile(t, cfg)), Build(w.state)
		q.follow(objects.Changes{Reset: true}, cluster, w.state, now)
		for step := range rapid.IntRange(1, 5).Draw(t, "steps") {
			plan, err := Schedule(cfg, Input{Now: now, Seed: rapid.Uint64().Draw(t, "seed"), State: w.state, Cluster: cluster, Pods: q.Ready(now)})
			if err != nil {
				t.Fatal(err)
			}
			q.Tried(plan, now)
			if next := q.Next(now); len(plan.Failures) > 0 && (next.IsZero() || next.After(now.Add(flushAfter))) {
				t.Fatalf("%d pods failed, and the next are tried at %s", len(plan.Failures), next)
			}

			before := maps.Clone(w.state.objects)
			cluster = cluster.Advance(w.state, w.change(t, plan, step))
			if rapid.IntRange(0, 3).Draw(t, "namespace") == 0 {
				w.state.put(&corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "default", Labels: map[string]string{"team": rapid.SampledFrom([]string{"blue", "red"}).Draw(t, "team")}}})
			}
			now = now.Add(q.cfg.LastBackoff + time.Second)
			q.follow(changesBetween(before, w.state.objects), cluster, w.state, now)

			ready := map[string]bool{}
			for pod := range q.Ready(now) {
				ready[podKey(pod.Namespace, pod.Name)] = true
			}
			waiting := 0
			cluster.queue.Scan(func(p *podInfo) bool {
				waiting++
				if key := podKey(p.pod.Namespace, p.pod.Name); !ready[key] {
					plan, err := Schedule(alone, Input{Now: now, State: w.state, Cluster: cluster, Pods: slices.Values([]*corev1.Pod{p.pod})})
					if err != nil || len(plan.Failures) != 1 {
						t.Fatalf("step %d: %s is left aside, and fits: %s (%v)\nit failed for %b", step, key, describePlan(plan), err, q.pods[key].why)
					}
				}
				return true
			})
			if q.Len() != waiting {
				t.Fatalf("%d pods are in the queue, %d wait", q.Len(), waiting)
			}
		}
	})
}

// queueOf returns a queue of a state, and what follows a change of it.
func queueOf(t *testing.T, state *fakeState, now *time.Time) (q *Queue, change func(...runtime.Object)) {
	q, cluster := newQueue(mustCompile(t, DefaultConfig())), Build(state)
	q.follow(objects.Changes{Reset: true}, cluster, state, *now)
	return q, func(list ...runtime.Object) {
		before := maps.Clone(state.objects)
		var refs []Ref
		for _, o := range list {
			state.put(o)
			switch o := o.(type) {
			case *corev1.Pod:
				refs = append(refs, Ref{KindPod, o.Namespace, o.Name})
			case *corev1.Node:
				refs = append(refs, Ref{KindNode, "", o.Name})
			}
		}
		cluster = cluster.Advance(state, refs)
		q.follow(changesBetween(before, state.objects), cluster, state, *now)
	}
}

func podNames(pods iter.Seq[*corev1.Pod]) (out []string) {
	for p := range pods {
		out = append(out, p.Name)
	}
	return out
}

// TestQueue tells when one pod is tried again, by why it failed and what changes.
func TestQueue(t *testing.T) {
	t.Parallel()
	for name, tc := range map[string]struct {
		pod    func(*corev1.Pod)
		node   func(*corev1.Node)
		change func(n *corev1.Node) runtime.Object
		wakes  bool
	}{
		"a label that nobody asks for": {
			pod:    func(p *corev1.Pod) { p.Spec.Containers[0].Resources.Requests = requests("cpu", "9") },
			change: func(n *corev1.Node) runtime.Object { n.Labels["rack"] = "7"; return n },
		},
		"more of what is not asked for": {
			pod: func(p *corev1.Pod) { p.Spec.Containers[0].Resources.Requests = requests("cpu", "9") },
			change: func(n *corev1.Node) runtime.Object {
				n.Status.Allocatable[corev1.ResourceMemory] = resource.MustParse("1Ti")
				return n
			},
		},
		"more of what is asked for": {
			pod: func(p *corev1.Pod) { p.Spec.Containers[0].Resources.Requests = requests("cpu", "9") },
			change: func(n *corev1.Node) runtime.Object {
				n.Status.Allocatable[corev1.ResourceCPU] = resource.MustParse("9")
				return n
			},
			wakes: true,
		},
		"another pod comes": {
			pod:    func(p *corev1.Pod) { p.Spec.Containers[0].Resources.Requests = requests("cpu", "9") },
			change: func(n *corev1.Node) runtime.Object { return running("r", n.Name, "cpu", "1") },
		},
		"the label that is asked for": {
			pod:    func(p *corev1.Pod) { p.Spec.NodeSelector = map[string]string{"rack": "7"} },
			change: func(n *corev1.Node) runtime.Object { n.Labels["rack"] = "7"; return n },
			wakes:  true,
		},
		"uncordoned": {
			node:   func(n *corev1.Node) { n.Spec.Unschedulable = true },
			change: func(n *corev1.Node) runtime.Object { n.Spec.Unschedulable = false; return n },
			wakes:  true,
		},
		"another taint": {
			node: func(n *corev1.Node) { n.Spec.Taints = []corev1.Taint{{Key: "a", Effect: corev1.TaintEffectNoSchedule}} },
			change: func(n *corev1.Node) runtime.Object {
				n.Spec.Taints = []corev1.Taint{{Key: "b", Effect: corev1.TaintEffectNoSchedule}}
				return n
			},
		},
		"its claim": {
			pod: func(p *corev1.Pod) {
				p.Spec.Volumes = []corev1.Volume{{Name: "v", VolumeSource: corev1.VolumeSource{PersistentVolumeClaim: &corev1.PersistentVolumeClaimVolumeSource{ClaimName: "c"}}}}
			},
			change: func(*corev1.Node) runtime.Object {
				return &corev1.PersistentVolumeClaim{ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: "c"}}
			},
			wakes: true,
		},
		"another's claim": {
			pod: func(p *corev1.Pod) {
				p.Spec.Volumes = []corev1.Volume{{Name: "v", VolumeSource: corev1.VolumeSource{PersistentVolumeClaim: &corev1.PersistentVolumeClaimVolumeSource{ClaimName: "c"}}}}
			},
			change: func(*corev1.Node) runtime.Object {
				return &corev1.PersistentVolumeClaim{ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: "d"}}
			},
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			node, pod, now := makeNode("n"), simplePod("p"), epoch
			if tc.node != nil {
				tc.node(node)
			}
			if tc.pod != nil {
				tc.pod(pod)
			}
			state := newState(node, pod)
			q, change := queueOf(t, state, &now)
			plan, err := Schedule(DefaultConfig(), Input{State: state, Pods: q.Ready(now)})
			if err != nil || len(plan.Failures) != 1 {
				t.Fatal(describePlan(plan), err)
			}
			q.Tried(plan, now)
			if next := q.Next(now); !next.Equal(now.Add(flushAfter)) {
				t.Fatalf("with nothing changed it is tried again at %s", next)
			}
			now = now.Add(q.cfg.FirstBackoff)
			change(tc.change(node.DeepCopy()))
			if got := len(podNames(q.Ready(now))) > 0; got != tc.wakes {
				t.Fatalf("woken: %v", got)
			}
			if !tc.wakes {
				now = epoch.Add(flushAfter)
				if len(podNames(q.Ready(now))) != 1 {
					t.Fatal("it is left aside for ever")
				}
			}
		})
	}
}

// TestQueueOrder checks that those tried last come last among their priority, and that
// a back-off grows whatever wakes the pod.
func TestQueueOrder(t *testing.T) {
	t.Parallel()
	state, now := newState(makeNode("n")), epoch.Add(time.Minute)
	for i := range 4 {
		p := simplePod(fmt.Sprintf("p%d", i), "cpu", "9")
		p.CreationTimestamp = metav1.Time{Time: epoch.Add(time.Duration(i) * time.Second)}
		state.put(p)
	}
	high := int32(7)
	first := simplePod("high", "cpu", "9")
	first.Spec.Priority, first.CreationTimestamp = &high, metav1.Time{Time: epoch.Add(10 * time.Second)}
	state.put(first)
	q, change := queueOf(t, state, &now)
	cfg := DefaultConfig()
	cfg.MaxPods = 3
	var tried []string
	for i := range 12 {
		if i%2 == 0 {
			n := makeNode("n")
			n.Status.Allocatable[corev1.ResourceMemory] = *resource.NewQuantity(int64(i+1)<<34, resource.BinarySI)
			n.Status.Allocatable[corev1.ResourceCPU] = *resource.NewQuantity(8-int64(i%4), resource.DecimalSI)
			change(n)
		}
		before := podNames(q.Ready(now))
		plan, err := Schedule(cfg, Input{State: state, Pods: q.Ready(now)})
		if err != nil {
			t.Fatal(err)
		}
		q.Tried(plan, now)
		tried = append(tried, fmt.Sprint(before[:len(plan.Failures)]))
		now = now.Add(time.Second)
	}
	if want := "[[high p0 p1] [p2 p3]"; fmt.Sprint(tried)[:len(want)] != want {
		t.Errorf("tried %v", tried)
	}
	for _, e := range q.pods {
		if e.tries == 0 {
			t.Errorf("%s was never tried", e.key)
		}
	}
}
