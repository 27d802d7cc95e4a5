package storytest

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/cockroachdb/datadriven"
	corev1 "k8s.io/api/core/v1"

	"timonel/internal/podrange"
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
	// Told is called with each event.
	Told func(reconcile.Event)
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
	reserved := service.Reserved{Pods: []netip.Prefix{netip.MustParsePrefix("10.244.0.0/22")}, Services: []netip.Prefix{netip.MustParsePrefix("10.96.0.0/16")}}
	return []reconcile.Reconciler{
		workload.Deployment{}, workload.ReplicaSet{}, workload.StatefulSet{}, workload.ReplicationController{}, workload.DaemonSet{}, job.Job{}, job.CronJob{}, job.TTL{}, scheduler, node.NodeLifecycle{}, node.TaintEviction{}, cleanup.PodGC{}, cleanup.TerminatedPodGC{Threshold: 3},
		service.EndpointSlice{PerSlice: 2}, cleanup.Namespace{}, policy.NamespaceDefaults{RootCA: []byte("CA")}, policy.Disruption{}, cleanup.GarbageCollector{},
		node.NodeIPAM{Pods: podrange.Ranges{Networks: []netip.Prefix{netip.MustParsePrefix("10.244.0.0/22")}}},
		policy.Tokens{Signer: signer, RootCA: []byte("CA")}, service.Endpoints{}, service.EndpointSliceMirroring{PerSubset: 3}, service.LoadBalancer{Reserved: reserved}, service.AddressHolder{Reserved: reserved},
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

// SetHealth changes the health and queues what that concerns.
func (s *Story) SetHealth(h reconcile.Health) {
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
	if s.Told != nil {
		s.Told(e)
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

// Unending is what a run ends with that goes on for too long.
const Unending = "...and so on\n"

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
	return s.out.String() + Unending
}

// Due returns when the first timer is, zero for none.
func (s *Story) Due() time.Time {
	var first time.Time
	for _, n := range s.next {
		if first.IsZero() || n.at.Before(first) {
			first = n.at
		}
	}
	return first
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
