package pod

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"
	runtimev1 "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// world builds what CRI says from lines such as
//
//	sandbox s0 ready|stopped
//	app s0 running|exited:CODE|created [restarts=N] [unstarted] [failed:PROBE]
type world struct {
	obs       *observed
	unstarted map[string]bool
	bad       map[string]string
}

func (w *world) started(c *container) bool { return !w.unstarted[c.id] }

func (w *world) failed(c *container) (string, string) {
	kind := w.bad[c.id]
	if kind == "" {
		return "", ""
	}
	return kind, "failed " + kind
}

func parseWorld(t *testing.T, pod *corev1.Pod, text string) *world {
	t.Helper()
	w := &world{obs: &observed{containers: map[string][]*container{}}, unstarted: map[string]bool{}, bad: map[string]string{}}
	at := time.Unix(1000, 0)
	for n, line := range strings.Split(strings.TrimSpace(text), "\n") {
		f := strings.Fields(line)
		if len(f) == 0 {
			continue
		}
		at = at.Add(time.Second)
		if f[0] == "sandbox" {
			s := sandbox{id: f[1], attempt: uint32(len(w.obs.sandboxes)), created: at, ready: f[2] == "ready", ips: []string{"10.0.0.1"}}
			w.obs.sandboxes = append([]sandbox{s}, w.obs.sandboxes...)
			continue
		}
		c := &container{id: fmt.Sprintf("%s-%d", f[0], n), name: f[0], sandbox: f[1], created: at, started: at, finished: at}
		if spec := specOf(pod, c.name); spec != nil {
			c.hash = hashContainer(spec)
		}
		for _, word := range f[2:] {
			key, value, _ := strings.Cut(strings.ReplaceAll(word, "=", ":"), ":")
			switch key {
			case "running":
				c.state = runtimev1.ContainerState_CONTAINER_RUNNING
			case "created":
				c.state = runtimev1.ContainerState_CONTAINER_CREATED
			case "exited":
				c.state = runtimev1.ContainerState_CONTAINER_EXITED
				_, err := fmt.Sscan(value, &c.exitCode)
				require.NoError(t, err)
			case "restarts":
				_, err := fmt.Sscan(value, &c.restarts)
				require.NoError(t, err)
			case "unstarted":
				w.unstarted[c.id] = true
			case "failed":
				w.bad[c.id] = value
			case "changed":
				c.hash = "other"
			default:
				t.Fatalf("unknown word %q", word)
			}
		}
		w.obs.containers[c.name] = append([]*container{c}, w.obs.containers[c.name]...)
	}
	return w
}

func (a actions) text() string {
	var out []string
	if a.finished {
		out = append(out, "finished")
	}
	if a.newSandbox {
		out = append(out, fmt.Sprintf("sandbox(%d)", a.attempt))
	}
	for _, k := range a.kill {
		out = append(out, "kill "+k.container.name)
	}
	for _, s := range a.start {
		out = append(out, fmt.Sprintf("start %s(%d)", s.spec.Name, s.restarts))
	}
	slices.Sort(out)
	return strings.Join(out, ", ")
}

func planPod(policy corev1.RestartPolicy, inits, sidecars, mains string) *corev1.Pod {
	always := corev1.ContainerRestartPolicyAlways
	p := &corev1.Pod{Spec: corev1.PodSpec{RestartPolicy: policy}}
	for _, n := range strings.Fields(inits) {
		p.Spec.InitContainers = append(p.Spec.InitContainers, corev1.Container{Name: n, Image: "i"})
	}
	for _, n := range strings.Fields(sidecars) {
		p.Spec.InitContainers = append(p.Spec.InitContainers, corev1.Container{Name: n, Image: "i", RestartPolicy: &always})
	}
	for _, n := range strings.Fields(mains) {
		p.Spec.Containers = append(p.Spec.Containers, corev1.Container{Name: n, Image: "i"})
	}
	return p
}

func TestPlan(t *testing.T) {
	t.Parallel()
	simple := planPod(corev1.RestartPolicyAlways, "", "", "app")
	never := planPod(corev1.RestartPolicyNever, "", "", "app")
	onFailure := planPod(corev1.RestartPolicyOnFailure, "", "", "app other")
	full := planPod(corev1.RestartPolicyAlways, "one two", "side", "app other")
	fullNever := planPod(corev1.RestartPolicyNever, "one", "side", "app")
	failed := planPod(corev1.RestartPolicyAlways, "", "", "app")
	failed.Status.Phase = corev1.PodFailed
	rules := planPod(corev1.RestartPolicyNever, "", "", "app")
	rules.Spec.Containers[0].RestartPolicyRules = []corev1.ContainerRestartRule{{
		Action:    corev1.ContainerRestartRuleActionRestart,
		ExitCodes: &corev1.ContainerRestartRuleOnExitCodes{Operator: corev1.ContainerRestartRuleOnExitCodesOpIn, Values: []int32{42}},
	}}
	for _, tc := range []struct {
		name, world, want string
		pod               *corev1.Pod
	}{
		{"a new pod gets a sandbox", "", "sandbox(0)", simple},
		{"then its container", "sandbox s0 ready", "start app(0)", simple},
		{"and is left alone", "sandbox s0 ready\napp s0 running", "", simple},
		{"an exited container is started again", "sandbox s0 ready\napp s0 exited:1 restarts=4", "start app(5)", simple},
		{"a clean exit, too, when always", "sandbox s0 ready\napp s0 exited:0", "start app(1)", simple},
		{"a container that was made and never started does not count", "sandbox s0 ready\napp s0 created restarts=2", "start app(2)", simple},
		{"never means never", "sandbox s0 ready\napp s0 exited:1", "finished", never},
		{"never, and the sandbox is gone", "sandbox s0 stopped\napp s0 exited:137", "finished", never},
		{"a rule restarts what never would not", "sandbox s0 ready\napp s0 exited:42", "start app(1)", rules},
		{"a rule does not match", "sandbox s0 ready\napp s0 exited:41", "finished", rules},
		{"on failure restarts only what failed", "sandbox s0 ready\napp s0 exited:0\nother s0 exited:1", "start other(1)", onFailure},
		{"on failure is finished when all succeeded", "sandbox s0 ready\napp s0 exited:0\nother s0 exited:0", "finished", onFailure},
		{"on failure in a new sandbox does not repeat what succeeded", "sandbox s0 stopped\napp s0 exited:0\nother s0 exited:137\nsandbox s1 ready", "start other(1)", onFailure},
		{"the API's word that it is over is final", "sandbox s0 ready\napp s0 running", "finished", failed},

		{"a lost sandbox: first stop what runs in it", "sandbox s0 stopped\napp s0 running", "kill app", simple},
		{"then make a new one", "sandbox s0 stopped\napp s0 exited:137", "sandbox(1)", simple},
		{"and start in it", "sandbox s0 stopped\napp s0 exited:137\nsandbox s1 ready", "start app(1)", simple},
		{"what runs in the old one is stopped", "sandbox s0 ready\napp s0 running\nsandbox s1 ready", "kill app, start app(1)", simple},

		{"a liveness failure kills", "sandbox s0 ready\napp s0 running failed:liveness", "kill app", simple},
		{"a changed image kills", "sandbox s0 ready\napp s0 running changed", "kill app", simple},

		{"init containers go first, one by one", "sandbox s0 ready", "start one(0)", full},
		{"the first still runs", "sandbox s0 ready\none s0 running", "", full},
		{"the second follows", "sandbox s0 ready\none s0 exited:0", "start two(0)", full},
		{"a failed one is repeated", "sandbox s0 ready\none s0 exited:1", "start one(1)", full},
		{"then the sidecar", "sandbox s0 ready\none s0 exited:0\ntwo s0 exited:0", "start side(0)", full},
		{"which must have started", "sandbox s0 ready\none s0 exited:0\ntwo s0 exited:0\nside s0 running unstarted", "", full},
		{"then all others at once", "sandbox s0 ready\none s0 exited:0\ntwo s0 exited:0\nside s0 running", "start app(0), start other(0)", full},
		{"a sidecar that ends comes back beside the running", "sandbox s0 ready\none s0 exited:0\ntwo s0 exited:0\nside s0 exited:0\napp s0 running\nother s0 running", "start side(1)", full},
		{"a new sandbox repeats the init containers", "sandbox s0 stopped\none s0 exited:0\ntwo s0 exited:0\nside s0 exited:137\napp s0 exited:137\nother s0 exited:137\nsandbox s1 ready", "start one(1)", full},
		{"a failed init container ends a pod that never restarts", "sandbox s0 ready\none s0 exited:2", "finished", fullNever},
		{"a sidecar does not keep a finished pod", "sandbox s0 ready\none s0 exited:0\nside s0 running\napp s0 exited:0", "finished", fullNever},
		{"removed records of init containers do not matter later", "sandbox s0 ready\nside s0 running\napp s0 running", "start other(0)", full},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			w := parseWorld(t, tc.pod, tc.world)
			require.Equal(t, tc.want, plan(tc.pod, w.obs, w).text())
		})
	}
}

func TestRestartDelay(t *testing.T) {
	t.Parallel()
	w := &worker{restart: map[string]*backOff{}}
	prev := &container{started: time.Unix(0, 0), finished: time.Unix(5, 0)}
	var got []time.Duration
	for range 8 {
		b, d := w.restartDelay("app", prev)
		got = append(got, d)
		b.grow()
	}
	s := time.Second
	require.Equal(t, []time.Duration{0, 10 * s, 20 * s, 40 * s, 80 * s, 160 * s, 300 * s, 300 * s}, got)
	_, d := w.restartDelay("app", &container{started: time.Unix(0, 0), finished: time.Unix(601, 0)})
	require.Zero(t, d, "ten minutes without a crash are forgiven")
	_, d = (&worker{restart: map[string]*backOff{}}).restartDelay("app", &container{restarts: 3, finished: time.Unix(5, 0), started: time.Unix(1, 0)})
	require.Equal(t, 40*s, d, "a new agent goes on from the record")
}

func TestMakeStatus(t *testing.T) {
	t.Parallel()
	always := planPod(corev1.RestartPolicyAlways, "", "", "app")
	two := planPod(corev1.RestartPolicyNever, "", "", "app other")
	inits := planPod(corev1.RestartPolicyAlways, "one", "", "app")
	gated := planPod(corev1.RestartPolicyAlways, "", "", "app")
	gated.Spec.ReadinessGates = []corev1.PodReadinessGate{{ConditionType: "lb"}}
	type flags struct {
		waiting         map[string]waiting
		unready         bool
		ending, stopped bool
		verdict         *verdict
		old             corev1.PodStatus
	}
	for _, tc := range []struct {
		name, world, want string
		pod               *corev1.Pod
		flags             flags
	}{
		{"nothing yet", "", "Pending app:waiting(ContainerCreating) !sandbox init !ready", always, flags{}},
		{"with init containers", "sandbox s0 ready", "Pending one:waiting(PodInitializing) app:waiting(PodInitializing) sandbox !init !ready", inits, flags{}},
		{"init runs", "sandbox s0 ready\none s0 running", "Pending one:running app:waiting(PodInitializing) sandbox !init !ready", inits, flags{}},
		{"init failed and is repeated", "sandbox s0 ready\none s0 exited:1",
			"Pending one:waiting(CrashLoopBackOff)<1 app:waiting(PodInitializing) sandbox !init !ready", inits, flags{waiting: map[string]waiting{"one": {reason: "CrashLoopBackOff"}}}},
		{"running", "sandbox s0 ready\napp s0 running", "Running app:running+ sandbox init ready", always, flags{}},
		{"started but not ready", "sandbox s0 ready\napp s0 running", "Running app:running sandbox init !ready", always, flags{unready: true}},
		{"a gate that nobody opened", "sandbox s0 ready\napp s0 running", "Running app:running+ sandbox init !ready", gated, flags{}},
		{"crash loop", "sandbox s0 ready\napp s0 exited:1 restarts=3", "Running app:waiting(CrashLoopBackOff)<1 sandbox init !ready", always,
			flags{waiting: map[string]waiting{"app": {reason: "CrashLoopBackOff"}}}},
		{"image missing", "sandbox s0 ready", "Pending app:waiting(ErrImagePull) sandbox init !ready", always, flags{waiting: map[string]waiting{"app": {reason: "ErrImagePull"}}}},
		{"one done, one runs", "sandbox s0 ready\napp s0 exited:0\nother s0 running", "Running app:exited(0) other:running+ sandbox init !ready", two, flags{}},
		{"all done, not stopped yet", "sandbox s0 ready\napp s0 exited:0\nother s0 exited:0", "Running app:exited(0) other:exited(0) sandbox init !ready", two,
			flags{ending: true, old: corev1.PodStatus{Phase: corev1.PodRunning}}},
		{"succeeded", "sandbox s0 stopped\napp s0 exited:0\nother s0 exited:0", "Succeeded app:exited(0) other:exited(0) !sandbox init !ready", two, flags{ending: true, stopped: true}},
		{"failed", "sandbox s0 stopped\napp s0 exited:0\nother s0 exited:5", "Failed app:exited(0) other:exited(5) !sandbox init !ready", two, flags{ending: true, stopped: true}},
		{"a terminal phase is for ever", "sandbox s0 stopped\napp s0 exited:0\nother s0 exited:0", "Failed app:exited(0) other:exited(0) !sandbox init !ready", two,
			flags{ending: true, stopped: true, old: corev1.PodStatus{Phase: corev1.PodFailed}}},
		{"deadline", "sandbox s0 stopped\napp s0 exited:137", "Failed/DeadlineExceeded app:exited(137) !sandbox init !ready", always,
			flags{ending: true, stopped: true, verdict: &verdict{reason: "DeadlineExceeded"}}},
		{"records lost while it ran", "", "Failed app:exited(137) !sandbox init !ready", always, flags{ending: true, stopped: true, old: corev1.PodStatus{
			Phase: corev1.PodRunning, ContainerStatuses: []corev1.ContainerStatus{{Name: "app", State: corev1.ContainerState{Running: &corev1.ContainerStateRunning{}}}},
		}}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			w := parseWorld(t, tc.pod, tc.world)
			in := statusInput{
				pod: tc.pod, obs: w.obs, old: &tc.flags.old, waiting: tc.flags.waiting, ready: map[string]bool{}, facts: w,
				hostIPs: []string{"192.168.1.1"}, verdict: tc.flags.verdict, ending: tc.flags.ending, stopped: tc.flags.stopped, now: time.Unix(5000, 0),
			}
			if tc.flags.unready {
				for _, c := range w.obs.running() {
					in.ready[c.id] = false
				}
			}
			st := makeStatus(in)
			require.Equal(t, tc.want, statusText(&st))
			require.Equal(t, "192.168.1.1", st.HostIP)
			in.old, in.now = &st, time.Unix(9000, 0)
			again := makeStatus(in)
			require.Equal(t, st.Conditions, again.Conditions, "time alone changes nothing")
			require.Equal(t, st.StartTime, again.StartTime)
		})
	}
}

func statusText(st *corev1.PodStatus) string {
	out := []string{string(st.Phase)}
	if st.Reason != "" {
		out[0] += "/" + st.Reason
	}
	for _, cs := range append(slices.Clone(st.InitContainerStatuses), st.ContainerStatuses...) {
		text := cs.Name + ":"
		switch {
		case cs.State.Waiting != nil:
			text += "waiting(" + cs.State.Waiting.Reason + ")"
		case cs.State.Running != nil:
			text += "running"
		case cs.State.Terminated != nil:
			text += fmt.Sprintf("exited(%d)", cs.State.Terminated.ExitCode)
		}
		if cs.Ready {
			text += "+"
		}
		if t := cs.LastTerminationState.Terminated; t != nil {
			text += fmt.Sprintf("<%d", t.ExitCode)
		}
		out = append(out, text)
	}
	for _, c := range []struct {
		kind corev1.PodConditionType
		text string
	}{{corev1.PodReadyToStartContainers, "sandbox"}, {corev1.PodInitialized, "init"}, {corev1.PodReady, "ready"}} {
		text := c.text
		if got := findCondition(st.Conditions, c.kind); got == nil || got.Status != corev1.ConditionTrue {
			text = "!" + text
		}
		out = append(out, text)
	}
	return strings.Join(out, " ")
}
