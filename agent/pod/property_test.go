package pod

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"
	runtimev1 "k8s.io/cri-api/pkg/apis/runtime/v1"
	"pgregory.net/rapid"

	"timonel/agent/eviction"
	"timonel/agent/image"
)

// TestWhateverHappens: containers end, sandboxes die, steps fail, agents start anew, in any
// order. Each pass ends, nothing runs twice or before its time, what a status has said for
// good stays said, and in the end nothing is left.
func TestWhateverHappens(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		policy := rapid.SampledFrom([]string{"Always", "OnFailure", "Never"}).Draw(t, "restartPolicy")
		s := &story{}
		s.begin(t, fmt.Sprintf(`
spec:
  restartPolicy: %s
  initContainers:
  - {name: one, image: i}
  - {name: side, image: i, restartPolicy: Always}
  - {name: two, image: i}
  containers: [{name: app, image: i}, {name: other, image: i, restartPolicy: OnFailure}]
  ephemeralContainers: [{name: debug, image: i}]`, policy))
		counts := map[string]int32{}
		check := func() {
			before := s.status
			out := s.run()
			s.invariants(t, out, counts)
			if terminal(before.Phase) {
				require.Equal(t, before, s.status, "what is said of a pod that has ended is said for ever:\n%s", out)
			}
		}
		check()
		for range rapid.IntRange(0, 25).Draw(t, "events") {
			s.happen(t)
			check()
		}
		clear(s.failing)
		s.unguarded = ""
		s.delete(30)
		var out string
		for range 20 {
			out = s.run()
			s.invariants(t, out, counts)
			for _, c := range s.obs.running() {
				require.False(t, s.beside[c.id].stopBy.IsZero() && !sidecar(specOf(s.want.pod, c.name)), "%s is not being stopped", c.name)
				if !s.beside[c.id].stopBy.IsZero() {
					s.exit(c, "137", time.Second)
				}
			}
			s.now = s.now.Add(time.Minute)
		}
		require.Equal(t, "farewell\n", out)
	})
}

// invariants are what is so after each pass.
func (s *story) invariants(t *rapid.T, out string, counts map[string]int32) {
	for name, list := range s.obs.containers {
		n := 0
		for _, c := range list {
			if c.running() {
				n++
			}
		}
		require.LessOrEqual(t, n, 1, "%s runs twice:\n%s", name, out)
	}
	for _, list := range [][]corev1.ContainerStatus{s.status.InitContainerStatuses, s.status.ContainerStatuses} {
		for _, cs := range list {
			require.GreaterOrEqual(t, cs.RestartCount, counts[cs.Name], "restarts of %s:\n%s", cs.Name, out)
			counts[cs.Name] = cs.RestartCount
		}
	}
	// What runs of the pod's own was made after all init containers had ended well.
	for _, name := range []string{"app", "other"} {
		for _, c := range s.obs.containers[name] {
			for _, init := range []string{"one", "two"} {
				for _, before := range s.obs.containers[init] {
					if c.running() && before.sandbox == c.sandbox {
						require.Equal(t, runtimev1.ContainerState_CONTAINER_EXITED, before.state, "%s beside %s:\n%s", init, name, out)
					}
				}
			}
		}
	}
	if s.known.cleaned {
		require.Empty(t, s.obs.sandboxes)
	}
	if strings.Contains(out, "start ") {
		require.Nil(t, s.want.api.DeletionTimestamp, "started though it is deleted:\n%s", out)
	}
}

// happen is one thing that happens to a pod or to its node.
func (s *story) happen(t *rapid.T) {
	running := s.obs.running()
	switch event := rapid.SampledFrom([]string{
		"exit", "exit", "exit", "fail", "work", "advance", "advance", "agent", "sandbox", "unready", "failed", "image", "changed", "hurry", "unguarded", "short", "evict", "lose",
	}).Draw(t, "event"); event {
	case "exit":
		if len(running) > 0 {
			c := running[rapid.IntRange(0, len(running)-1).Draw(t, "container")]
			s.exit(c, rapid.SampledFrom([]string{"0", "1"}).Draw(t, "code"), time.Duration(rapid.SampledFrom([]int{1, 700}).Draw(t, "ran"))*time.Second)
		}
	case "fail":
		s.failing[rapid.SampledFrom([]string{"volumes", "sandbox", "guard", "start:one", "start:app", "start:side", "run:app", "run:two", "stop", "clean", "sweep"}).Draw(t, "step")] = "because"
	case "work":
		clear(s.failing)
	case "advance":
		s.now = s.now.Add(time.Duration(rapid.SampledFrom([]int{1, 10, 400}).Draw(t, "seconds")) * time.Second)
	case "agent":
		s.restartAgent()
	case "sandbox":
		if len(s.obs.sandboxes) > 0 {
			s.obs.sandboxes[0].ready = false
		}
	case "unready", "failed":
		if len(running) > 0 {
			c := running[rapid.IntRange(0, len(running)-1).Draw(t, "container")]
			b := s.beside[c.id]
			b.ready = false
			if event == "failed" {
				b.failed = probeLiveness
			}
			s.beside[c.id] = b
		}
	case "image":
		name := rapid.SampledFrom([]string{"one", "app", "debug"}).Draw(t, "container")
		s.images[name] = rapid.SampledFrom([]image.Result{{}, {State: image.Pulling}, {State: image.Failed, Reason: image.ReasonPull, Retry: s.now.Add(time.Minute)}}).Draw(t, "image")
	case "changed":
		s.want.shown++
	case "hurry":
		s.waits.hurry()
	case "unguarded":
		s.unguarded = rapid.SampledFrom([]string{"", "not yet"}).Draw(t, "unguarded")
	case "short":
		s.want.short = true
	case "evict":
		if rapid.IntRange(0, 4).Draw(t, "evicted") == 0 {
			s.want.evicted = &eviction.Eviction{Pod: s.want.pod, Message: "short of memory"}
		}
	case "lose": // the oldest record of a name
		name := rapid.SampledFrom([]string{"one", "two", "side", "app", "other", "debug"}).Draw(t, "container")
		if list := s.obs.containers[name]; len(list) > 0 && list[len(list)-1].exited() {
			s.obs.containers[name] = list[: len(list)-1 : len(list)-1]
		}
	}
}
