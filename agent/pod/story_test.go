package pod

import (
	"cmp"
	"encoding/json"
	"fmt"
	"maps"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/cockroachdb/datadriven"
	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	runtimev1 "k8s.io/cri-api/pkg/apis/runtime/v1"
	"k8s.io/utils/ptr"
	"sigs.k8s.io/yaml"

	"timonel/agent/admission"
	"timonel/agent/eviction"
	"timonel/agent/image"
	"timonel/agent/volume"
)

var epoch = time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)

// TestStories tells the stories in testdata, each file in a world of one pod at a time
// where steps succeed at once unless a story says otherwise. Their commands:
//
//	pod                 a new pod in YAML, on a new node; status: what another agent kept
//	edit                merge YAML into the pod, as the API has it then
//	run                 plan and do until there is nothing to do; prints the steps, when to
//	                    look again, and the status that was reported if it is another
//	exit NAME CODE [ran=DURATION]
//	                    the container that runs ends, of itself or because it is stopped
//	probe NAME started|unstarted|ready|unready|failed:PROBE
//	                    what probes and hooks say of the container that runs
//	image NAME here|pulling|failed:REASON
//	fail STEP           such steps fail from now on, with the message given: volumes,
//	                    sandbox, guard, start:NAME, run:NAME (it is made, and does not
//	                    run), resize, stop, clean, sweep, admit:REASON, grant:REASON
//	work STEP           they succeed again
//	unguarded           what holds for the pod's addresses is not in the kernel; empty: it is
//	refresh DURATION    volumes want to be made again after that
//	refuse NAME         the node does not start that ephemeral container
//	sandbox dies|loses-its-address
//	lose NAME           CRI has no record of the container any more
//	agent restarts      and knows what CRI says and what it kept of the status
//	delete [grace=N]    the pod is deleted; again: with another grace period
//	remove              the cluster does not know the pod any more
//	evict               with the message given
//	short               room is short: what has ended is to be removed
//	hurry               what is put off may be tried now
//	changed             something that the pod's volumes show has changed
//	advance DURATION
//
// go test ./agent/pod -run TestStories -rewrite writes what is printed.
func TestStories(t *testing.T) {
	t.Parallel()
	files, err := filepath.Glob("testdata/*.txt")
	if err != nil || len(files) == 0 {
		t.Fatalf("no stories: %v", err)
	}
	for _, file := range files {
		t.Run(strings.TrimSuffix(filepath.Base(file), ".txt"), func(t *testing.T) {
			t.Parallel()
			s := &story{}
			datadriven.RunTest(t, file, s.command)
		})
	}
}

// tester is a test, or a property of one.
type tester interface {
	require.TestingT
	Fatalf(format string, args ...any)
}

// story is one pod on a node that is made up.
type story struct {
	t       tester
	now     time.Time
	want    want
	obs     observed
	beside  map[string]beside
	known   known
	waits   waits
	status  *corev1.PodStatus // as it was reported last
	printed string

	images    map[string]image.Result
	failing   map[string]string
	refused   map[string]string
	unguarded string
	refresh   time.Duration
	made      int // containers, ever
}

func (s *story) command(t *testing.T, d *datadriven.TestData) string {
	t.Helper()
	s.t = t
	arg := func(i int) string {
		if i >= len(d.CmdArgs) {
			return ""
		}
		return d.CmdArgs[i].Key
	}
	text := strings.TrimSpace(d.Input)
	switch d.Cmd {
	case "pod":
		s.begin(t, d.Input)
	case "edit":
		api := s.want.api.DeepCopy()
		raw, err := yaml.YAMLToJSON([]byte(d.Input))
		require.NoError(t, err)
		require.NoError(t, json.Unmarshal(raw, api))
		api.Generation++
		s.want.set(api)
	case "run":
		return s.run()
	case "exit":
		ran := time.Second
		if d.HasArg("ran") {
			var by string
			d.ScanArgs(t, "ran", &by)
			ran = s.duration(by)
		}
		s.exit(s.running(arg(0)), arg(1), ran)
	case "probe":
		c := s.running(arg(0))
		b := s.beside[c.id]
		kind, value, _ := strings.Cut(arg(1), ":")
		switch kind {
		case "started", "unstarted":
			b.started = kind == "started"
		case "ready", "unready":
			b.ready = kind == "ready"
		case "failed":
			b.failed = value
		default:
			d.Fatalf(t, "unknown verdict %s", kind)
		}
		s.beside[c.id] = b
	case "image":
		state, reason, _ := strings.Cut(arg(1), ":")
		s.images[arg(0)] = map[string]image.Result{
			"here":    {State: image.Ready},
			"pulling": {State: image.Pulling},
			"failed":  {State: image.Failed, Reason: reason, Message: "because", Retry: s.now.Add(20 * time.Second)},
		}[state]
	case "fail":
		s.failing[arg(0)] = text
	case "work":
		delete(s.failing, arg(0))
	case "unguarded":
		s.unguarded = text
	case "refresh":
		s.refresh = s.duration(arg(0))
	case "refuse":
		s.refused[arg(0)] = text
	case "sandbox":
		s.obs.sandboxes[0].ready = arg(0) != "dies"
		s.obs.sandboxes[0].ips = nil
	case "lose":
		s.obs.containers[arg(0)] = s.obs.containers[arg(0)][1:]
	case "agent":
		s.restartAgent()
	case "delete":
		grace := cmp.Or(ptr.Deref(s.want.api.Spec.TerminationGracePeriodSeconds, 0), corev1.DefaultTerminationGracePeriodSeconds)
		if d.HasArg("grace") {
			d.ScanArgs(t, "grace", &grace)
		}
		s.delete(grace)
	case "remove":
		s.want.removed = true
	case "evict":
		s.want.evicted = &eviction.Eviction{Pod: s.want.pod, Message: text, Disruption: true}
	case "short":
		s.want.short = true
	case "hurry":
		s.waits.hurry()
	case "changed":
		s.want.shown++
	case "advance":
		s.now = s.now.Add(s.duration(arg(0)))
	default:
		d.Fatalf(t, "unknown command %s", d.Cmd)
	}
	return ""
}

func (s *story) duration(text string) time.Duration {
	by, err := time.ParseDuration(text)
	require.NoError(s.t, err)
	return by
}

func (s *story) begin(t tester, text string) {
	pod := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: "p", UID: "u", Generation: 1},
		Spec:       corev1.PodSpec{RestartPolicy: corev1.RestartPolicyAlways},
	}
	require.NoError(t, yaml.UnmarshalStrict([]byte(text), pod))
	*s = story{
		t: t, now: epoch, want: want{pod: pod, api: pod, shown: 1}, obs: observed{containers: map[string][]*container{}}, beside: map[string]beside{},
		known: known{stopped: map[string]bool{}}, waits: waits{}, status: &pod.Status,
		images: map[string]image.Result{}, failing: map[string]string{}, refused: map[string]string{},
	}
}

// restartAgent forgets what an agent that starts anew does not know.
func (s *story) restartAgent() {
	w := &worker{known: known{stopped: map[string]bool{}}}
	w.want = want{pod: s.want.api, api: s.want.api, shown: 1}
	if wasStarted(s.status) {
		w.remember(s.status)
	}
	s.want, s.known, s.waits = w.want, w.known, waits{}
	for _, c := range s.obs.running() {
		var b beside
		b.started, b.ready = unprobed(specOf(s.want.pod, c.name), c, oldStatus(s.status, c.name))
		s.beside[c.id] = b
	}
}

func (s *story) delete(grace int64) {
	api := s.want.api.DeepCopy()
	api.DeletionTimestamp = &metav1.Time{Time: s.now.Add(time.Duration(grace) * time.Second)}
	api.DeletionGracePeriodSeconds = &grace
	s.want.set(api)
}

func (s *story) running(name string) *container {
	for _, c := range s.obs.containers[name] {
		if c.running() {
			return c
		}
	}
	s.t.Fatalf("no container %s runs", name)
	return nil
}

// replace puts another in the place of a container, of which plans may hold the old.
func (s *story) replace(c container) {
	list := slices.Clone(s.obs.containers[c.name])
	for i := range list {
		if list[i].id == c.id {
			list[i] = &c
		}
	}
	s.obs.containers[c.name] = list
}

func (s *story) exit(c *container, code string, ran time.Duration) {
	n, err := strconv.ParseInt(code, 10, 32)
	require.NoError(s.t, err)
	ended := *c
	ended.state, ended.exitCode, ended.finished = runtimev1.ContainerState_CONTAINER_EXITED, int32(n), s.now
	ended.started = s.now.Add(-ran)
	s.replace(ended)
	delete(s.beside, c.id)
}

// run plans and does, as a worker does.
func (s *story) run() string {
	var out strings.Builder
	var in *seen
	again := look
	for range maxPlans {
		if again == look {
			in = &seen{
				known: &s.known, beside: s.beside, old: s.status, hostIPs: []string{"192.168.0.1"}, refused: s.refused, images: map[string]image.Result{},
				observed: observed{sandboxes: slices.Clone(s.obs.sandboxes), containers: maps.Clone(s.obs.containers)},
			}
		}
		p := plan(s.want, in, s.waits, s.now)
		require.NotEmpty(s.t, p.steps, "a plan that does not end")
		again = rest
		for _, st := range p.steps {
			got := s.do(&out, in, p, st)
			if got == failed {
				again = max(again, replan)
				break
			}
			again = max(again, got)
		}
		if again != rest {
			continue
		}
		if !p.wake.IsZero() {
			fmt.Fprintf(&out, "wake in %s\n", p.wake.Sub(s.now))
		}
		if text := describe(s.status); text != s.printed {
			s.printed = text
			out.WriteString(text)
		}
		return out.String()
	}
	s.t.Fatalf("it does not end:\n%s", out.String())
	return ""
}

// do does one step, and prints it.
func (s *story) do(out *strings.Builder, in *seen, p pass, st step) outcome {
	say := func(format string, args ...any) { fmt.Fprintf(out, format+"\n", args...) }
	bad := func(step string) (string, bool) {
		message, is := s.failing[step]
		if is {
			say("  failed: %s", message)
		}
		return message, is
	}
	switch st := st.(type) {
	case admit:
		say("admit%s", flag(st.adopt, " one that was started before"))
		s.known.asked = true
		for _, name := range slices.Sorted(maps.Keys(s.failing)) {
			if reason, is := strings.CutPrefix(name, "admit:"); is && !st.adopt {
				s.known.verdict = &verdict{reason: reason, message: "Pod was rejected: " + s.failing[name], rejected: true}
				return replan
			}
		}
		if !s.known.accepted {
			s.known.accepted = true
			s.want.give(allocate(s.want.pod, nil))
		}
		if st.adopt && s.known.applied == nil {
			s.known.applied = s.want.given
		}
	case judge:
		say("judge %s: %s", st.verdict.reason, st.verdict.message)
		s.known.verdict = st.verdict
	case grant:
		say("grant other resources")
		in.resizeAsked, s.known.refusedResize = true, nil
		for _, name := range slices.Sorted(maps.Keys(s.failing)) {
			if reason, is := strings.CutPrefix(name, "grant:"); is {
				s.known.refusedResize = &admission.Rejection{Reason: reason, Message: s.failing[name]}
				return replan
			}
		}
		s.want.give(allocate(s.want.api, nil))
	case resize:
		var names []string
		for _, c := range st.containers {
			names = append(names, c.name)
		}
		say("resize [%s]%s", strings.Join(names, " "), flag(st.last, " and the pod"))
		if message, is := bad("resize"); is {
			s.waits.putOff(waitResize, failing, waiting{"", message}, s.now)
			return failed
		}
		s.waits.done(waitResize)
		for _, c := range st.containers {
			s.known.applied = s.known.applied.with(c.name, specOf(s.want.pod, c.name).Resources)
		}
		if st.last {
			s.known.applied = s.want.given
		}
	case kill:
		say("kill %s%s grace=%s%s", st.container.name, flag(st.hurry, " sooner"), st.grace, flag(st.message != "", ": "+st.message))
		if st.forgive {
			s.waits.forgive(st.container.name)
		}
		b := s.beside[st.container.id]
		b.stopBy = s.now.Add(st.grace)
		s.beside[st.container.id] = b
	case makeVolumes:
		say("make volumes")
		s.known.volumesOf = s.want.shown
		if message, is := bad("volumes"); is {
			until := s.waits.putOff(waitVolumes, failing, waiting{reasonCreating, "MountVolume failed: " + message}, s.now)
			if s.known.volumes != nil {
				s.known.refreshAt = until
			}
			return replan
		}
		s.waits.done(waitVolumes)
		s.known.volumes, s.known.refreshAt = volume.Mounts{}, time.Time{}
		if s.refresh > 0 {
			s.known.refreshAt = s.now.Add(s.refresh)
		}
	case makeSandbox:
		say("make sandbox %d", st.attempt)
		if message, is := bad("sandbox"); is {
			s.waits.putOff(waitSandbox, failing, waiting{reasonCreating, "Failed to create pod sandbox: " + message}, s.now)
			return failed
		}
		s.waits.done(waitSandbox)
		s.known.applied = s.want.given
		box := sandbox{id: fmt.Sprintf("s%d", st.attempt), attempt: st.attempt, created: s.now, ready: true, hostNet: s.want.pod.Spec.HostNetwork}
		if !box.hostNet {
			box.ips = []string{fmt.Sprintf("10.0.0.%d", st.attempt+1)}
		}
		s.obs.sandboxes = append([]sandbox{box}, s.obs.sandboxes...)
		s.want.shown++
		return look
	case guard:
		say("guard %s", st.box.id)
		if message, is := bad("guard"); is {
			s.waits.putOff(waitPolicies, failing, waiting{reasonCreating, message}, s.now)
			return replan
		}
		s.known.policed, in.guarded, in.unguarded = st.box.id, s.unguarded == "", s.unguarded
	case start:
		return s.start(say, bad, in, st)
	case tell:
		say("tell %s %s %s: %s", st.kind, st.reason, st.container, st.message)
		return rest
	case watch:
		return rest
	case report:
		status := makeStatus(statusInput{want: s.want, seen: in, pass: p, now: s.now})
		later := makeStatus(statusInput{want: s.want, seen: &seen{
			known: in.known, beside: in.beside, old: &status, hostIPs: in.hostIPs, refused: in.refused, observed: in.observed,
		}, pass: p, now: s.now.Add(time.Hour)})
		require.Equal(s.t, status, later, "time alone changes nothing")
		require.Equal(s.t, "192.168.0.1", status.HostIP)
		if terminal(s.status.Phase) && len(s.status.ContainerStatuses) > 0 && len(in.sandboxes) == 0 && !in.any() {
			status = *s.status
		}
		s.status, in.old = &status, &status
		return rest
	case stopSandbox:
		say("stop sandbox %s", st.id)
		if message, is := bad("stop"); is {
			s.waits.putOff(waitStop(st.id), failing, waiting{"", message}, s.now)
			return replan
		}
		s.waits.done(waitStop(st.id))
		s.known.stopped[st.id] = true
		for i := range s.obs.sandboxes {
			if s.obs.sandboxes[i].id == st.id {
				s.obs.sandboxes[i].ready, in.sandboxes[i].ready = false, false
			}
		}
	case remove:
		s.remove(say, in, st)
		return rest
	case reset:
		if message, is := bad("reset"); is {
			say("remove none of all")
			s.waits.putOff(waitReset, cleaning, waiting{"", message}, s.now)
			return failed
		}
		for _, c := range st.asked {
			s.waits.restarted(c.name, c)
		}
		s.remove(say, in, remove{containers: st.containers})
		return look
	case giveBack:
		say("give back what it had of the node")
		s.known.over = true
		return rest
	case sweep:
		say("sweep%s", flag(st.whole, " all"))
		if message, is := bad("sweep"); is {
			s.waits.putOff(waitSweep, releasing, waiting{"", message}, s.now)
			return replan
		}
		if st.whole {
			s.empty(in)
		}
		s.known.swept = true
	case clean:
		say("clean")
		if message, is := bad("clean"); is {
			s.waits.putOff(waitClean, cleaning, waiting{"", message}, s.now)
			return replan
		}
		s.empty(in)
		s.known.cleaned = true
	case reclaimed:
		say("say that it was removed")
		s.want.short = false
	case farewell:
		say("farewell%s", flag(s.want.removed, ", for good"))
		return rest
	default:
		s.t.Fatalf("unknown step %T", st)
	}
	return replan
}

func (s *story) start(say func(string, ...any), bad func(string) (string, bool), in *seen, st start) outcome {
	name := st.spec.Name
	kind := ""
	switch {
	case st.ephemeral != nil:
		kind = " ephemeral"
	case st.init:
		kind = " init"
	}
	say("start%s %s%s", kind, name, flag(st.restarts > 0, fmt.Sprintf(" restarts=%d", st.restarts)))
	if res := s.images[name]; res.State != 0 && res.State != image.Ready {
		say("  its image is not there")
		in.images[name] = res
		return replan
	}
	if message, is := bad("start:" + name); is {
		s.waits.putOff(waitStart(name), failing, waiting{reasonCreateError, message}, s.now)
		return replan
	}
	state := runtimev1.ContainerState_CONTAINER_RUNNING
	if message, is := bad("run:" + name); is { // it is made, and does not run
		s.waits.putOff(waitStart(name), failing, waiting{reasonRunError, message}, s.now)
		state = runtimev1.ContainerState_CONTAINER_CREATED
	} else {
		s.waits.done(waitStart(name))
	}
	s.obs.containers[name] = slices.DeleteFunc(slices.Clone(s.obs.containers[name]), func(c *container) bool { return c.state == runtimev1.ContainerState_CONTAINER_CREATED })
	if st.previous.exited() {
		s.waits.restarted(name, st.previous)
	}
	s.made++
	c := &container{
		id: fmt.Sprintf("%s%d", name, s.made), name: name, sandbox: s.obs.sandboxes[0].id, restarts: st.restarts, state: state,
		created: s.now.Add(time.Duration(s.made)), started: s.now, hash: hashContainer(st.spec), image: "docker.io/library/" + st.spec.Image,
	}
	var b beside
	b.started, b.ready = unprobed(st.spec, c, nil)
	s.beside[c.id] = b
	s.obs.containers[name] = append([]*container{c}, s.obs.containers[name]...)
	return look
}

func (s *story) remove(say func(string, ...any), in *seen, st remove) {
	var names []string
	for _, c := range st.containers {
		names = append(names, c.id)
		in.forget(c)
		s.obs.containers[c.name] = in.containers[c.name]
	}
	for _, id := range st.sandboxes {
		names = append(names, id)
		in.forgetSandbox(id)
		s.obs.sandboxes = slices.Clone(in.sandboxes)
	}
	say("remove %s", strings.Join(names, " "))
}

func (s *story) empty(in *seen) {
	s.obs = observed{containers: map[string][]*container{}}
	in.observed = observed{containers: map[string][]*container{}}
}

func flag(is bool, text string) string {
	if is {
		return text
	}
	return ""
}

// describe is a status as a story tells it.
func describe(st *corev1.PodStatus) string {
	var out strings.Builder
	fmt.Fprintf(&out, "status %s", st.Phase)
	if st.Reason != "" || st.Message != "" {
		fmt.Fprintf(&out, " %s: %s", st.Reason, st.Message)
	}
	for _, c := range []struct {
		kind corev1.PodConditionType
		text string
	}{
		{corev1.PodReadyToStartContainers, "sandbox"}, {corev1.PodInitialized, "initialized"}, {corev1.ContainersReady, "containers-ready"}, {corev1.PodReady, "ready"},
		{corev1.PodResizePending, "resize-pending"}, {corev1.PodResizeInProgress, "resizing"}, {corev1.DisruptionTarget, "disrupted"},
	} {
		if got := findCondition(st.Conditions, c.kind); got != nil && got.Status == corev1.ConditionTrue {
			fmt.Fprintf(&out, " +%s", c.text)
			if got.Reason != "" && c.kind != corev1.PodInitialized {
				fmt.Fprintf(&out, "(%s: %s)", got.Reason, got.Message)
			}
		}
	}
	out.WriteString("\n")
	for _, list := range [][]corev1.ContainerStatus{st.InitContainerStatuses, st.ContainerStatuses, st.EphemeralContainerStatuses} {
		for i := range list {
			cs := &list[i]
			fmt.Fprintf(&out, "  %s:%s%s%s", cs.Name, stateText(cs.State), flag(isTrue(cs.Started), " started"), flag(cs.Ready, " ready"))
			out.WriteString(flag(cs.RestartCount > 0, fmt.Sprintf(" restarts=%d", cs.RestartCount)))
			if last := stateText(cs.LastTerminationState); last != "" {
				out.WriteString(", before:" + last)
			}
			if cs.Resources != nil && cs.Resources.Requests.Cpu().Sign() > 0 {
				fmt.Fprintf(&out, " cpu=%s", cs.Resources.Requests.Cpu())
			}
			out.WriteString("\n")
		}
	}
	return out.String()
}

func stateText(st corev1.ContainerState) string {
	switch {
	case st.Waiting != nil:
		return " waiting " + st.Waiting.Reason + flag(st.Waiting.Message != "", ": "+st.Waiting.Message)
	case st.Running != nil:
		return " running"
	case st.Terminated != nil:
		return fmt.Sprintf(" exited %d", st.Terminated.ExitCode) + flag(st.Terminated.Reason != "", " "+st.Terminated.Reason)
	}
	return ""
}
