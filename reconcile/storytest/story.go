package storytest

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"fmt"
	"net/netip"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/cockroachdb/datadriven"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/yaml"

	"timonel/reconcile"
	"timonel/reconcile/cleanup"
	"timonel/reconcile/node"
	"timonel/reconcile/policy"
	"timonel/reconcile/scheduler"
	"timonel/reconcile/service"
	"timonel/reconcile/storage"
	"timonel/reconcile/workload"
	"timonel/reconcile/workload/job"
	"timonel/sched"
	"timonel/state/objects"
)

// Story runs reconcilers on a world, one key at a time, in an order that is
// always the same, so that what they do can be read from top to bottom.
type Story struct {
	*World
	reconcilers []reconcile.Reconciler
	Health      reconcile.Health
	Kinds       reconcile.Kinds
	failed      map[string][]reconcile.Failure
	next        map[string]timed
	hold        map[string]time.Time // no earlier than this, because something was refused
	since       map[string]time.Time // Input.Since
	followed    int64
	seed        uint64
	out         *strings.Builder
	todo        []work
	// Shuffle picks the next piece of work; nil for the first.
	Shuffle func(n int) int
	// Before is called before each change is made.
	Before func(reconcile.Request)
}

type work struct {
	r   reconcile.Reconciler
	key reconcile.Key
}

// timed is work to do later.
type timed struct {
	work
	at time.Time
}

func (w work) String() string { return w.r.Name() + " " + w.key.String() + string(w.key.UID) }

func New(w *World, reconcilers ...reconcile.Reconciler) *Story {
	return &Story{
		World: w, reconcilers: reconcilers, Kinds: Serves(), Health: reconcile.Health{Since: w.Now.Add(-time.Hour)},
		failed: map[string][]reconcile.Failure{}, next: map[string]timed{}, hold: map[string]time.Time{}, since: map[string]time.Time{}, out: &strings.Builder{},
	}
}

func All(t T) []reconcile.Reconciler {
	scheduler, err := scheduler.New(sched.DefaultConfig())
	if err != nil {
		t.Fatalf("scheduler: %v", err)
	}
	signer, err := policy.NewTokenSigner(ServiceAccountKey(t))
	if err != nil {
		t.Fatalf("token signer: %v", err)
	}
	return []reconcile.Reconciler{
		workload.Deployment{}, workload.ReplicaSet{}, workload.StatefulSet{}, workload.ReplicationController{}, workload.DaemonSet{}, job.Job{}, job.CronJob{}, job.TTL{}, scheduler, node.NodeLifecycle{}, node.TaintEviction{}, cleanup.PodGC{}, cleanup.TerminatedPodGC{Threshold: 3},
		service.EndpointSlice{PerSlice: 2}, cleanup.Namespace{}, policy.NamespaceDefaults{RootCA: []byte("CA")}, policy.Disruption{}, cleanup.GarbageCollector{},
		node.NodeIPAM{ClusterCIDR: netip.MustParsePrefix("10.244.0.0/22")},
		policy.Tokens{Signer: signer, RootCA: []byte("CA")}, service.Endpoints{}, service.EndpointSliceMirroring{PerSubset: 3},
		storage.Binder{}, storage.Class{}, storage.ClaimProtection{}, storage.VolumeProtection{}, storage.AttributesProtection{}, storage.Ephemeral{},
	}
}

// ServiceAccountKey is the same in every story, so that its tokens are.
func ServiceAccountKey(t T) *ecdsa.PrivateKey {
	key, err := ecdsa.ParseRawPrivateKey(elliptic.P256(), bytes.Repeat([]byte{7}, 32))
	if err != nil {
		t.Fatalf("service account key: %v", err)
	}
	return key
}

// Start queues every key, as a new leader does.
func (s *Story) Start() {
	snapshot := s.Snapshot()
	s.followed = snapshot.Revision()
	for _, r := range s.reconcilers {
		for _, k := range r.All(snapshot) {
			s.queue(work{r, k})
		}
	}
}

func (s *Story) queue(w work) {
	if s.hold[w.String()].After(s.Now) {
		return // its timer is set
	}
	if !slices.ContainsFunc(s.todo, func(o work) bool { return o.String() == w.String() }) {
		s.todo = append(s.todo, w)
	}
}

// follow queues what changed since the last time, and what a timer is due for.
func (s *Story) follow() {
	snapshot := s.Snapshot()
	if snapshot.Revision() != s.followed {
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		changes, err := s.Cache.Changes(ctx, s.followed)
		if err != nil || changes.Reset {
			s.t.Fatalf("changes after %d: %v, reset %v", s.followed, err, changes.Reset)
		}
		s.followed = changes.Snapshot.Revision()
		for _, c := range changes.Changed {
			for _, r := range s.reconcilers {
				for _, k := range r.Keys(c, changes.Snapshot) {
					s.queue(work{r, k})
				}
			}
		}
	}
	for _, r := range s.reconcilers {
		var due []work
		for name, n := range s.next {
			if n.r.Name() == r.Name() && !n.at.After(s.Now) {
				due = append(due, n.work)
				delete(s.next, name)
			}
		}
		slices.SortFunc(due, func(a, b work) int { return strings.Compare(a.String(), b.String()) })
		for _, w := range due {
			s.queue(w)
		}
	}
}

// changes is Input.Changes.
func (s *Story) changes(after int64) objects.Changes {
	snapshot := s.Snapshot()
	if snapshot.Revision() == after {
		return objects.Changes{Snapshot: snapshot}
	}
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	changes, err := s.Cache.Changes(ctx, after)
	if err != nil {
		s.t.Fatalf("changes after %d: %v", after, err)
	}
	return changes
}

// setHealth changes the health and queues what that concerns.
func (s *Story) setHealth(h reconcile.Health) {
	before := s.Health
	s.Health = h
	for _, r := range s.reconcilers {
		if hr, ok := r.(reconcile.HealthReconciler); ok {
			for _, k := range hr.HealthKeys(before, h, s.Snapshot()) {
				s.queue(work{r, k})
			}
		}
	}
}

// Step does one piece of work and says whether there was one.
func (s *Story) Step() bool {
	s.follow()
	if len(s.todo) == 0 {
		return false
	}
	i := 0
	if s.Shuffle != nil {
		i = s.Shuffle(len(s.todo))
	}
	w := s.todo[i]
	s.todo = slices.Delete(s.todo, i, i+1)
	s.seed++
	result, err := w.r.Reconcile(reconcile.Input{
		Now: s.Now, Seed: s.seed, Snapshot: s.Snapshot(), Changes: s.changes, Health: s.Health, Kinds: s.Kinds, Failed: s.failed[w.String()], Since: s.since[w.String()],
	}, w.key)
	if err != nil {
		fmt.Fprintf(s.out, "%s: error: %v\n", w.r.Name(), err)
	}
	delete(s.failed, w.String())
	delete(s.next, w.String())
	if !result.Next.IsZero() {
		s.next[w.String()] = timed{w, result.Next}
	}
	for _, e := range result.Events {
		s.event(e, nil)
	}
	batch, inBatch := 1, 0 // of those that start slowly
	refused := false
	for _, c := range result.Requests {
		if !c.SlowStart {
			s.make(w, c)
			continue
		}
		if inBatch == batch && !refused {
			batch, inBatch = 2*batch, 0
		}
		if inBatch == batch {
			continue // one of the batch before was refused
		}
		inBatch++
		before := len(s.failed[w.String()])
		s.make(w, c)
		refused = refused || len(s.failed[w.String()]) > before
	}
	if _, again := s.next[w.String()]; !again {
		delete(s.since, w.String())
	} else if s.since[w.String()].IsZero() {
		s.since[w.String()] = s.Now
	}
	return true
}

func (s *Story) event(e reconcile.Event, err error) {
	suffix := ""
	if err != nil {
		suffix = ": " + err.Error()
	}
	fmt.Fprintf(s.out, "  event %s %s: %s%s\n", e.Object.Name, e.Reason, e.Message, suffix)
}

func (s *Story) make(w work, c reconcile.Request) {
	fmt.Fprintf(s.out, "%s\n", s.describe(c))
	if s.Before != nil {
		s.Before(c)
	}
	err := s.Write(context.Background(), c)
	switch reconcile.Classify(err) {
	case reconcile.Made:
		if c.Event != nil {
			s.event(*c.Event, nil)
		}
		for _, then := range c.Then {
			s.make(w, then)
		}
	case reconcile.Stale:
		s.queue(w)
		fmt.Fprintf(s.out, "  stale: %v\n", err)
	default:
		s.failed[w.String()] = append(s.failed[w.String()], reconcile.Failure{Request: c, Err: err})
		s.next[w.String()] = timed{w, s.Now.Add(time.Second)}
		s.hold[w.String()] = s.Now.Add(time.Second)
		if c.FailEvent != nil {
			s.event(*c.FailEvent, err)
		}
	}
}

// describe renders a change with what it changes.
func (s *Story) describe(c reconcile.Request) string {
	out := c.String()
	key, _ := s.keyOf(c.Resource, c.Namespace, c.Name)
	var lines []string
	switch c.Verb {
	case reconcile.VerbCreate:
		flatten("", toMap(c.Object), &lines)
	case reconcile.VerbUpdate:
		old, next := map[string]string{}, map[string]string{}
		s.mu.Lock()
		var was, is []string
		flatten("", s.live[key], &was)
		s.mu.Unlock()
		flatten("", toMap(c.Object), &is)
		for _, l := range was {
			k, v, _ := strings.Cut(l, "=")
			old[k] = v
		}
		for _, l := range is {
			k, v, _ := strings.Cut(l, "=")
			next[k] = v
			if old[k] != v {
				lines = append(lines, l)
			}
		}
		for _, l := range was {
			if k, _, _ := strings.Cut(l, "="); !strings.HasPrefix(k, "metadata.managedFields") {
				if _, ok := next[k]; !ok {
					lines = append(lines, "-"+k)
				}
			}
		}
	case reconcile.VerbPatch:
		flatten("", mapOf(c.Patch), &lines)
	case reconcile.VerbDelete:
		if c.Propagation != nil {
			lines = append(lines, string(*c.Propagation))
		}
		if c.GracePeriodSeconds != nil {
			lines = append(lines, fmt.Sprintf("grace=%d", *c.GracePeriodSeconds))
		}
	}
	for _, l := range lines {
		out += "\n    " + l
	}
	return out
}

func mapOf(raw []byte) map[string]any {
	m, _ := MergeJSON(nil, nil).(map[string]any)
	if err := yaml.Unmarshal(raw, &m); err != nil {
		panic(err)
	}
	return m
}

// flatten lists the leaves of an object, without what says nothing in a story.
func flatten(path string, v any, out *[]string) {
	if strings.Contains(path, "ownerReferences[") && strings.Contains(path, "].") && !strings.HasSuffix(path, "].name") ||
		strings.HasSuffix(path, "].type") || strings.HasSuffix(path, ".lastProbeTime") {
		return
	}
	switch path {
	case "metadata.uid", "metadata.resourceVersion", "metadata.creationTimestamp", "metadata.generateName", "metadata.name", "metadata.namespace",
		"apiVersion", "kind", "spec.template", "spec.containers", "metadata.managedFields", "metadata.annotations.kubernetes.io/description":
		return
	}
	switch v := v.(type) {
	case map[string]any:
		keys := make([]string, 0, len(v))
		for k := range v {
			keys = append(keys, k)
		}
		slices.Sort(keys)
		for _, k := range keys {
			sub := k
			if path != "" {
				sub = path + "." + k
			}
			flatten(sub, v[k], out)
		}
	case []any:
		if path == "spec.tolerations" {
			*out = append(*out, path+"="+briefly(v))
			return
		}
		for i, e := range v {
			sub := fmt.Sprintf("%s[%d]", path, i)
			if m, ok := e.(map[string]any); ok {
				if t, ok := m["type"].(string); ok {
					sub = fmt.Sprintf("%s[%s]", path, t)
				}
			}
			flatten(sub, e, out)
		}
	default:
		value := fmt.Sprint(v)
		if len(value) > longest {
			value = value[:longest] + "…"
		}
		*out = append(*out, path+"="+value)
	}
}

// longest is how much of a value a story shows: a token is not to be read.
const longest = 300

// briefly renders tolerations, of which the pods of a DaemonSet have many, in a line.
func briefly(tolerations []any) string {
	var out []string
	for _, t := range tolerations {
		m, _ := t.(map[string]any)
		out = append(out, strings.TrimPrefix(fmt.Sprint(m["key"]), "node.kubernetes.io/")+fmt.Sprintf(":%v", m["effect"]))
	}
	return strings.Join(out, " ")
}

// Run works until there is nothing to do and returns what was done.
func (s *Story) Run(limit int) string {
	s.out.Reset()
	for range limit {
		if !s.Step() {
			if s.out.Len() == 0 {
				return "nothing\n"
			}
			return s.out.String()
		}
	}
	return s.out.String() + "...and so on\n"
}

// Stories tells the stories in the .txt files of a folder, each in a world of its own
// with every reconciler that needs nothing but the state. Folders in it are others'.
func Stories(t *testing.T, folder string) {
	paths, err := filepath.Glob(filepath.Join(folder, "*.txt"))
	if err != nil || len(paths) == 0 {
		t.Fatalf("no stories in %s: %v", folder, err)
	}
	for _, path := range paths {
		t.Run(strings.TrimSuffix(filepath.Base(path), ".txt"), func(t *testing.T) {
			w := NewWorld(t)
			s := New(w, All(t)...)
			datadriven.RunTest(t, path, func(t *testing.T, d *datadriven.TestData) string {
				w.t = t
				return s.command(t, d)
			})
		})
	}
}

// command does what one command of a story file says:
//
//	reconcilers NAME...        run these only
//	objects                    create the objects given in YAML
//	run                        reconcile until there is nothing to do
//	start                      queue every key, as a new leader does
//	edit RESOURCE NS/NAME      merge YAML into an object, as a user does
//	status RESOURCE NS/NAME    merge YAML into its status
//	run-pods / end-pods        the agents run what is bound, or end what is terminating
//	finish-pods PHASE          pods that have not ended do so: [exit=CODE] [prefix=NAME] [first=N]
//	delete RESOURCE NS/NAME    delete, propagation=Foreground|Orphan|Background
//	refuse VERB RESOURCE       the API forbids such changes; without arguments no more
//	advance DURATION           let time pass
//	health                     NODE stream|gone|goodbye [suspect|dead|alive] [probes=N] [ago=DURATION], or since ago=DURATION
//	show PREFIX                list what there is
func (s *Story) command(t *testing.T, d *datadriven.TestData) string {
	arg := func(i int) string {
		if i >= len(d.CmdArgs) {
			return ""
		}
		return d.CmdArgs[i].Key
	}
	target := func() (schema.GroupVersionResource, string, string) {
		var r schema.GroupVersionResource
		for gvk := range worldKinds {
			if resourceName(gvk) == arg(0) {
				r = gvk.GroupVersion().WithResource(arg(0))
			}
		}
		ns, name, ok := strings.Cut(arg(1), "/")
		if !ok {
			return r, "", ns
		}
		return r, ns, name
	}
	switch d.Cmd {
	case "reconcilers":
		var keep []reconcile.Reconciler
		for _, r := range s.reconcilers {
			if slices.ContainsFunc(d.CmdArgs, func(a datadriven.CmdArg) bool { return strings.HasPrefix(r.Name(), a.Key) }) {
				keep = append(keep, r)
			}
		}
		s.reconcilers = keep
	case "objects":
		for _, doc := range strings.Split(d.Input, "\n---\n") {
			for _, obj := range expand(t, mapOf([]byte(doc))) {
				s.addMap(obj)
			}
		}
	case "run":
		return s.Run(400)
	case "start":
		s.Start()
	case "edit":
		r, ns, name := target()
		s.Edit(r, ns, name, func(obj map[string]any) { MergeJSON(obj, mapOf([]byte(d.Input))) })
	case "status":
		r, ns, name := target()
		s.SetStatus(r, ns, name, mapOf([]byte(d.Input)))
	case "run-pods", "end-pods":
		for pod := range s.Snapshot().Pods().All() {
			switch {
			case d.Cmd == "run-pods" && pod.Spec.NodeName != "" && pod.Status.Phase == corev1.PodPending && pod.DeletionTimestamp == nil:
				s.RunPod(pod.Namespace, pod.Name)
			case d.Cmd == "end-pods" && pod.DeletionTimestamp != nil:
				s.EndPod(pod.Namespace, pod.Name)
			}
		}
	case "finish-pods":
		s.finishPods(t, d)
	case "delete":
		r, ns, name := target()
		c := reconcile.Request{Verb: reconcile.VerbDelete, Resource: r, Namespace: ns, Name: name}
		if arg(2) != "" {
			p := metav1.DeletionPropagation(arg(2))
			c.Propagation = &p
		}
		if err := s.Write(context.Background(), c); err != nil {
			return err.Error() + "\n"
		}
	case "refuse":
		s.Refuse = nil
		if verb, resource := arg(0), arg(1); verb != "" {
			s.Refuse = func(c reconcile.Request) error {
				if string(c.Verb) == verb && c.Resource.Resource == resource {
					return apierrors.NewForbidden(c.Resource.GroupResource(), "x", fmt.Errorf("exceeded quota"))
				}
				return nil
			}
		}
	case "advance":
		by, err := time.ParseDuration(arg(0))
		if err != nil {
			t.Fatal(err)
		}
		s.Now = s.Now.Add(by)
	case "health":
		s.setHealth(s.parseHealth(t, d.Input))
	case "show":
		return s.Show(arg(0))
	default:
		t.Fatalf("%s: no such command", d.Cmd)
	}
	return ""
}

// finishPods lets pods that have not ended do so.
func (s *Story) finishPods(t *testing.T, d *datadriven.TestData) {
	left, exit, prefix := -1, 0, ""
	for _, a := range d.CmdArgs[1:] {
		switch a.Key {
		case "exit":
			d.ScanArgs(t, "exit", &exit)
		case "first":
			d.ScanArgs(t, "first", &left)
		case "prefix":
			d.ScanArgs(t, "prefix", &prefix)
		}
	}
	for pod := range s.Snapshot().Pods().All() {
		if left != 0 && !objects.PodEnded(pod) && strings.HasPrefix(pod.Name, prefix) {
			s.FinishPod(pod.Namespace, pod.Name, corev1.PodPhase(d.CmdArgs[0].Key), exit)
			left--
		}
	}
}

// expand makes copies of an object that says "copies: n"; %d in its name counts them.
func expand(t *testing.T, obj map[string]any) []map[string]any {
	n, ok := obj["copies"].(float64)
	if !ok {
		return []map[string]any{obj}
	}
	delete(obj, "copies")
	var out []map[string]any
	for i := range int(n) {
		raw := strings.ReplaceAll(mustString(obj), "%d", strconv.Itoa(i+1))
		out = append(out, mapOf([]byte(raw)))
	}
	return out
}

func (s *Story) parseHealth(t *testing.T, input string) reconcile.Health {
	h := reconcile.Health{Since: s.Health.Since, Nodes: map[string]reconcile.NodeHealth{}}
	for k, v := range s.Health.Nodes {
		h.Nodes[k] = v
	}
	for _, line := range strings.Split(strings.TrimSpace(input), "\n") {
		fields := strings.Fields(line)
		at := s.Now
		var n reconcile.NodeHealth
		for _, f := range fields[1:] {
			name, value, _ := strings.Cut(f, "=")
			switch name {
			case "ago":
				d, err := time.ParseDuration(value)
				if err != nil {
					t.Fatal(err)
				}
				at = s.Now.Add(-d)
			case "stream":
				n.Stream = true
			case "goodbye":
				n.Goodbye = true
			case "suspect":
				n.Gossip = reconcile.GossipSuspect
			case "dead":
				n.Gossip = reconcile.GossipDead
			case "alive":
				n.Gossip = reconcile.GossipAlive
			case "probes":
				n.ProbesFailed, _ = strconv.Atoi(value)
			case "gone":
			default:
				t.Fatalf("health: %s means nothing", f)
			}
		}
		if fields[0] == "since" {
			h.Since = at
			continue
		}
		n.StreamSince, n.GossipSince, n.ProbesSince = at, at, at
		h.Nodes[fields[0]] = n
	}
	return h
}

func (s *Story) Show(prefix string) string {
	var out strings.Builder
	for _, key := range s.List(prefix) {
		s.mu.Lock()
		u := unstructured.Unstructured{Object: s.live[key]}
		fmt.Fprintf(&out, "%s %s", strings.ToLower(u.GetKind()), types.NamespacedName{Namespace: u.GetNamespace(), Name: u.GetName()})
		for _, f := range [][]string{{"spec", "replicas"}, {"spec", "nodeName"}, {"spec", "podCIDR"}, {"status", "phase"}, {"status", "active"}, {"status", "succeeded"}, {"status", "failed"}} {
			if v, ok, _ := unstructured.NestedFieldNoCopy(u.Object, f...); ok {
				fmt.Fprintf(&out, " %s=%v", f[1], v)
			}
		}
		conditions, _, _ := unstructured.NestedSlice(u.Object, "status", "conditions")
		for _, c := range conditions {
			if m, ok := c.(map[string]any); ok && (u.GetKind() == "Node" || u.GetKind() == "Pod" || u.GetKind() == "Job") {
				fmt.Fprintf(&out, " %v=%v", m["type"], m["status"])
			}
		}
		taints, _, _ := unstructured.NestedSlice(u.Object, "spec", "taints")
		for _, taint := range taints {
			if m, ok := taint.(map[string]any); ok {
				fmt.Fprintf(&out, " %v:%v", m["key"], m["effect"])
			}
		}
		if u.GetDeletionTimestamp() != nil {
			out.WriteString(" deleting")
		}
		for _, f := range u.GetFinalizers() {
			fmt.Fprintf(&out, " finalizer=%s", f)
		}
		for _, o := range u.GetOwnerReferences() {
			fmt.Fprintf(&out, " owner=%s", o.Name)
		}
		for k, v := range u.GetAnnotations() {
			if k == workload.RevisionAnnotation {
				fmt.Fprintf(&out, " revision=%s", v)
			}
		}
		out.WriteString("\n")
		s.mu.Unlock()
	}
	return out.String()
}
