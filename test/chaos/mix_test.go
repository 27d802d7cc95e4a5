//go:build chaos

package chaos

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/kubernetes"
	typedcorev1 "k8s.io/client-go/kubernetes/typed/core/v1"

	"timonel/test/harness"
	"timonel/test/history"
)

// TestMix breaks three controllers in a random order, for MINUTES (default 10),
// while clients on each of them read, write, list and watch, and checks that what
// they saw is linearizable. SEED chooses the order; the same seed breaks the same
// things in the same order, though not at the same instant. FAULTS, a regular
// expression, takes those alone that it matches.
func TestMix(t *testing.T) {
	seed, minutes := mixParameters(t, 10)
	t.Logf("to repeat: make chaos SEED=%d MINUTES=%g", seed, minutes)
	faults, err := regexp.Compile(os.Getenv("FAULTS"))
	require.NoError(t, err, "FAULTS")
	chosen := slices.DeleteFunc(slices.Clone(nemeses), func(n nemesis) bool { return !faults.MatchString(n.name) })
	require.NotEmpty(t, chosen, "FAULTS matches none")
	c := upForMix(t)
	checkedMix(t, c, seed, time.Duration(minutes*float64(time.Minute)), chosen)
}

// mixParameters reads SEED, by default one that is drawn, and MINUTES.
func mixParameters(t *testing.T, minutes float64) (uint64, float64) {
	t.Helper()
	seed := uint64(time.Now().UnixNano() % 1e6)
	if text := os.Getenv("SEED"); text != "" {
		n, err := strconv.ParseUint(text, 10, 64)
		require.NoError(t, err, "SEED")
		seed = n
	}
	if text := os.Getenv("MINUTES"); text != "" {
		n, err := strconv.ParseFloat(text, 64)
		require.NoError(t, err, "MINUTES")
		minutes = n
	}
	return seed, minutes
}

// TestEach does the same with each way to break it alone, one after the other.
func TestEach(t *testing.T) {
	c := upForMix(t)
	for i, n := range nemeses {
		t.Run(n.name, func(t *testing.T) { checkedMix(t, c, uint64(i), 15*time.Second, []nemesis{n}) })
	}
}

// upForMix brings controllers up that snapshot often and keep few entries behind
// their snapshots, so that a replica that was away is sent one.
func upForMix(t *testing.T) *harness.Cluster {
	return harness.Up(t, harness.Options{Controllers: 3, ControllerFlags: []string{"--snapshot-threshold=500", "--trailing-logs=100"}})
}

// checkedMix breaks the cluster in the ways given, in an order that the seed
// decides, and checks what clients saw meanwhile.
func checkedMix(t *testing.T, c *harness.Cluster, seed uint64, duration time.Duration, nemeses []nemesis) {
	random := rand.New(rand.NewPCG(seed, 0))
	m := &mix{cluster: c, deadline: time.Now().Add(duration)}
	keepHistory(t, &m.recorder)
	space, err := c.Client(t, "").CoreV1().Namespaces().Create(t.Context(),
		&corev1.Namespace{ObjectMeta: metav1.ObjectMeta{GenerateName: "mix-"}}, metav1.CreateOptions{})
	require.NoError(t, err)
	m.namespace = space.Name
	start, err := strconv.ParseInt(space.ResourceVersion, 10, 64)
	require.NoError(t, err)
	m.newest.Store(start)

	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	var work, watching sync.WaitGroup
	names := c.Spec.ControllerNames()
	for i := range 9 {
		client := m.client(t, names[i%3])
		work.Go(func() { m.use(client, i, rand.New(rand.NewPCG(seed, uint64(i)+1))) })
	}
	watchContext, stopWatching := context.WithCancel(ctx)
	for i := range 3 {
		var clients []typedcorev1.ConfigMapInterface
		for j := range 3 {
			clients = append(clients, m.client(t, names[(i+j)%3]))
		}
		w := m.recorder.Watch(fmt.Sprintf("watcher %d", i), start)
		watching.Go(func() { m.watch(watchContext, w, clients) })
	}

	faults, begin := map[string]int{}, time.Now()
	for time.Now().Before(m.deadline) {
		n := nemeses[random.IntN(len(nemeses))]
		faults[n.name]++
		t.Logf("%s: %s", ms(time.Since(begin)), n.name)
		n.strike(t, c, random)
		for _, name := range names {
			c.WaitServing(t, name, 2*time.Minute)
		}
	}
	work.Wait()
	// The watchers see the last write too.
	last, err := c.Client(t, "").CoreV1().ConfigMaps(m.namespace).Create(t.Context(), &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: "last"}}, metav1.CreateOptions{})
	require.NoError(t, err)
	end, err := strconv.ParseInt(last.ResourceVersion, 10, 64)
	require.NoError(t, err)
	harness.Eventually(t, time.Minute, "the watchers to see the last write", func() error {
		for _, w := range m.recorder.History().Watches {
			if len(w.Events) == 0 || w.Events[len(w.Events)-1].Revision < end {
				return fmt.Errorf("%s lags", w.Name)
			}
		}
		return nil
	})
	stopWatching()
	watching.Wait()
	require.Nil(t, m.expired.Load())

	checkHistory(t, m.recorder.History(), fmt.Sprintf("seed %d: faults %v", seed, faults))
	requireSameEverywhere(t, c)
}

// checkTime is what porcupine gets for a history.
const checkTime = 5 * time.Minute

// keepHistory keeps what clients saw, and porcupine's picture of it, when the test
// fails, for whatever reason.
func keepHistory(t *testing.T, recorder *history.Recorder) {
	t.Cleanup(func() {
		if !t.Failed() {
			return
		}
		h := recorder.History()
		dir, err := os.MkdirTemp("", "timonel-chaos-")
		require.NoError(t, err)
		require.NoError(t, h.Save(filepath.Join(dir, "history.json")))
		require.NoError(t, history.Check(h, checkTime).Visualize(filepath.Join(dir, "history.html")))
		t.Logf("history.json and history.html are kept in %s", dir)
	})
}

// checkHistory checks what clients saw.
func checkHistory(t *testing.T, h history.History, what string) {
	t.Helper()
	report := history.Check(h, checkTime)
	quiet, since := longestQuiet(h)
	counts := map[string]int{}
	for _, o := range h.Operations {
		counts[string(o.Kind)+" "+string(o.Outcome.Status)]++
	}
	t.Logf("%s; operations %v; longest time without an acknowledged write %s, from %s on", what, counts, ms(quiet), ms(since))
	require.Empty(t, report.Violations)
	require.False(t, report.Undecided, "porcupine did not come to an end")
}

// nemesis breaks something and mends it.
type nemesis struct {
	name   string
	strike func(t *testing.T, c *harness.Cluster, random *rand.Rand)
}

var nemeses = []nemesis{
	{"leader killed", func(t *testing.T, c *harness.Cluster, random *rand.Rand) { killOne(t, c, c.Leader(t), random) }},
	{"follower killed", func(t *testing.T, c *harness.Cluster, random *rand.Rand) { killOne(t, c, follower(t, c), random) }},
	{"leader paused", func(t *testing.T, c *harness.Cluster, random *rand.Rand) { pauseOne(t, c, c.Leader(t), random) }},
	{"follower paused", func(t *testing.T, c *harness.Cluster, random *rand.Rand) { pauseOne(t, c, follower(t, c), random) }},
	{"leader cut off", func(t *testing.T, c *harness.Cluster, random *rand.Rand) { cutOne(t, c, c.Leader(t), random) }},
	{"follower cut off", func(t *testing.T, c *harness.Cluster, random *rand.Rand) { cutOne(t, c, follower(t, c), random) }},
	{"leader stopped", func(t *testing.T, c *harness.Cluster, _ *rand.Rand) {
		leader := c.Leader(t)
		require.NoError(t, c.Spec.Stop(t.Context(), leader))
		c.Start(t, leader)
	}},
	{"all killed", func(t *testing.T, c *harness.Cluster, _ *rand.Rand) {
		for _, name := range c.Spec.ControllerNames() {
			c.Kill(t, name, true)
		}
		for _, name := range c.Spec.ControllerNames() {
			require.NoError(t, c.Spec.Start(t.Context(), name))
		}
	}},
	{"follower wiped: leaves and joins", func(t *testing.T, c *harness.Cluster, _ *rand.Rand) {
		name := follower(t, c)
		c.Kill(t, name, false)
		require.NoError(t, c.Spec.Wipe(t.Context(), name))
		c.Start(t, name)
	}},
	{"a controller cut off from its clients", func(t *testing.T, c *harness.Cluster, random *rand.Rand) {
		name := someone(c, random)
		c.Run(t, "partition", name, "--from", "host", "--direction", directions[random.IntN(3)])
		hold(t, random)
		c.Run(t, "partition", name, "--heal")
	}},
	{"disk full", func(t *testing.T, c *harness.Cluster, random *rand.Rand) {
		name := someone(c, random)
		holdThen(t, random, diskFull(t, c, name))
		requireWrites(t, c, name)
	}},
	{"disk slow", func(t *testing.T, c *harness.Cluster, random *rand.Rand) {
		holdThen(t, random, diskSlow(t, c, someone(c, random), time.Duration(20+random.IntN(3000))*time.Millisecond))
	}},
	{"fsync fails", func(t *testing.T, c *harness.Cluster, random *rand.Rand) {
		name := someone(c, random)
		stop := fsyncFails(t, c, name)
		hold(t, random)
		if random.IntN(2) == 0 { // what it did not sync is in the kernel's cache all the same
			c.Kill(t, name, true)
			stop()
			c.Start(t, name)
			return
		}
		stop()
		requireWrites(t, c, name)
	}},
	{"clock skewed", func(t *testing.T, c *harness.Cluster, random *rand.Rand) {
		by := time.Duration(1+random.IntN(120)) * time.Second
		if random.IntN(2) == 0 {
			by = -by
		}
		holdThen(t, random, clockSkew(t, c, someone(c, random), by))
	}},
	{"all restarted in order", func(t *testing.T, c *harness.Cluster, _ *rand.Rand) {
		for _, name := range c.Spec.ControllerNames() {
			require.NoError(t, c.Spec.Stop(t.Context(), name))
			c.Start(t, name)
		}
	}},
	{"leadership handed over", func(t *testing.T, c *harness.Cluster, _ *rand.Rand) {
		insist(t, c, "members", "transfer-leader", follower(t, c))
	}},
	{"member removed and added", func(t *testing.T, c *harness.Cluster, random *rand.Rand) {
		name := someone(c, random)
		insist(t, c, "members", "remove", name)
		hold(t, random) // it runs on, and serves nothing
		c.Kill(t, name, true)
		require.NoError(t, c.Spec.Wipe(t.Context(), name))
		c.Start(t, name)
	}},
	{"snapshot saved", func(t *testing.T, c *harness.Cluster, _ *rand.Rand) {
		c.Leader(t)
		file := filepath.Join(t.TempDir(), "snapshot")
		c.Run(t, "snapshot", "save", file)
		c.Run(t, "snapshot", "inspect", file)
	}},
}

// insist repeats a command that is refused until the members are healthy.
func insist(t *testing.T, c *harness.Cluster, args ...string) {
	t.Helper()
	harness.Eventually(t, time.Minute, strings.Join(args, " "), func() error {
		if out, err := c.Try(t.Context(), args...); err != nil {
			return fmt.Errorf("%w: %s", err, out)
		}
		return nil
	})
}

var directions = []string{"in", "out", "both"}

// someone is one of the controllers.
func someone(c *harness.Cluster, random *rand.Rand) string {
	names := c.Spec.ControllerNames()
	return names[random.IntN(len(names))]
}

func hold(t *testing.T, random *rand.Rand) {
	select {
	case <-time.After(time.Duration(500+random.IntN(5000)) * time.Millisecond):
	case <-t.Context().Done():
	}
}

func holdThen(t *testing.T, random *rand.Rand, mend func()) {
	hold(t, random)
	mend()
}

// requireWrites waits until a controller that could not write its log says that it
// can again.
func requireWrites(t *testing.T, c *harness.Cluster, name string) {
	t.Helper()
	c.WaitServing(t, name, time.Minute) // /readyz includes the disk
}

func killOne(t *testing.T, c *harness.Cluster, name string, random *rand.Rand) {
	c.Kill(t, name, random.IntN(2) == 0)
	hold(t, random)
	c.Start(t, name)
}

func pauseOne(t *testing.T, c *harness.Cluster, name string, random *rand.Rand) {
	require.NoError(t, c.Spec.Pause(t.Context(), name, false))
	hold(t, random)
	require.NoError(t, c.Spec.Resume(t.Context(), name))
}

// cutOne cuts a controller off from the other two, which includes one way alone.
func cutOne(t *testing.T, c *harness.Cluster, name string, random *rand.Rand) {
	c.Run(t, "partition", name, "--from", others(c, name), "--direction", directions[random.IntN(3)])
	hold(t, random)
	c.Run(t, "partition", name, "--heal")
}

// mix is what the clients of one run share.
type mix struct {
	cluster   *harness.Cluster
	namespace string
	deadline  time.Time
	recorder  history.Recorder
	newest    atomic.Int64 // revision that a client saw
	expired   atomic.Value // string: a revision that was said to be too old
}

// client talks to one controller and never asks twice by itself: each request is
// one operation.
func (m *mix) client(t *testing.T, on string) typedcorev1.ConfigMapInterface {
	t.Helper()
	config, err := m.cluster.Spec.RESTConfig(on)
	require.NoError(t, err)
	config.QPS = -1
	config.ContentType = "application/vnd.kubernetes.protobuf"
	config.Wrap(func(next http.RoundTripper) http.RoundTripper { return once{next} })
	set, err := kubernetes.NewForConfig(config)
	require.NoError(t, err)
	return set.CoreV1().ConfigMaps(m.namespace)
}

// once takes away the answer's advice to try again, which client-go follows.
type once struct{ next http.RoundTripper }

func (o once) RoundTrip(r *http.Request) (*http.Response, error) {
	response, err := o.next.RoundTrip(r)
	if err == nil {
		response.Header.Del("Retry-After")
	}
	return response, err
}

// WrappedRoundTripper lets client-go find the connection's own.
func (o once) WrappedRoundTripper() http.RoundTripper { return o.next }

const (
	perOperation = 3 * time.Second
	keyLife      = 3 * time.Second // then others are used, so that porcupine's parts stay small
)

// use is one client.
func (m *mix) use(maps typedcorev1.ConfigMapInterface, id int, random *rand.Rand) {
	known := map[string]int64{} // the revision that this client last saw of a key
	begin := time.Now()
	for i := 0; time.Now().Before(m.deadline); i++ {
		epoch := fmt.Sprintf("k%04d-", int(time.Since(begin)/keyLife))
		key := epoch + strconv.Itoa(random.IntN(4))
		value := fmt.Sprintf("%d-%d", id, i)
		ctx, cancel := context.WithTimeout(context.Background(), perOperation)
		var outcome history.Outcome
		switch p := random.IntN(100); {
		case p < 35:
			op := m.recorder.Begin(id, history.Operation{Kind: history.Get, Key: key})
			got, err := maps.Get(ctx, key, metav1.GetOptions{})
			if outcome = outcomeOf(err); err == nil {
				outcome.Found, outcome.Value, outcome.Revision = true, got.Data["v"], revision(got)
				known[key] = outcome.Revision
			} else if apierrors.IsNotFound(err) {
				outcome.Status = history.OK
				delete(known, key)
			}
			m.recorder.End(op, outcome)
		case p < 42:
			op := m.recorder.Begin(id, history.Operation{Kind: history.List, Key: epoch})
			outcome = m.list(ctx, maps, epoch, metav1.ListOptions{Limit: int64(random.IntN(2) * 50)})
			m.recorder.End(op, outcome)
		case p < 45:
			// At a revision that some client saw, on any controller, maybe before this one had it.
			at := m.newest.Load()
			op := m.recorder.Begin(id, history.Operation{Kind: history.ListAt, Key: epoch, If: at})
			outcome = m.list(ctx, maps, epoch, metav1.ListOptions{Limit: int64(random.IntN(2) * 50), ResourceVersion: strconv.FormatInt(at, 10), ResourceVersionMatch: metav1.ResourceVersionMatchExact})
			m.recorder.End(op, outcome)
		case p < 55 && known[key] != 0:
			op := m.recorder.Begin(id, history.Operation{Kind: history.Delete, Key: key, If: known[key]})
			at := strconv.FormatInt(known[key], 10)
			err := maps.Delete(ctx, key, metav1.DeleteOptions{Preconditions: &metav1.Preconditions{ResourceVersion: &at}})
			outcome = outcomeOf(err)
			m.recorder.End(op, outcome)
			delete(known, key)
		case known[key] != 0:
			op := m.recorder.Begin(id, history.Operation{Kind: history.Update, Key: key, Value: value, If: known[key]})
			got, err := maps.Update(ctx, object(key, value, known[key]), metav1.UpdateOptions{})
			if outcome = outcomeOf(err); err == nil {
				outcome.Revision = revision(got)
				known[key] = outcome.Revision
			} else {
				delete(known, key)
			}
			m.recorder.End(op, outcome)
		default:
			op := m.recorder.Begin(id, history.Operation{Kind: history.Create, Key: key, Value: value})
			got, err := maps.Create(ctx, object(key, value, 0), metav1.CreateOptions{})
			if outcome = outcomeOf(err); err == nil {
				outcome.Revision = revision(got)
				known[key] = outcome.Revision
			}
			m.recorder.End(op, outcome)
		}
		cancel()
		if now := outcome.Revision; now > m.newest.Load() {
			m.newest.Store(now) // another's may be a little newer
		}
		if outcome.Status == history.Unknown || outcome.Status == history.NoEffect {
			time.Sleep(20 * time.Millisecond) // a client that fails does not spin
		}
	}
}

// list lists the keys with a prefix, by pages if there is a limit.
func (m *mix) list(ctx context.Context, maps typedcorev1.ConfigMapInterface, prefix string, options metav1.ListOptions) history.Outcome {
	out := history.Outcome{Items: map[string]history.Item{}}
	for {
		page, err := maps.List(ctx, options)
		if apierrors.IsResourceExpired(err) { // none is that old
			m.expired.Store(fmt.Sprintf("a list with %+v: %v", options, err))
		}
		if err != nil {
			return outcomeOf(err)
		}
		if out.Revision == 0 {
			out.Revision, _ = strconv.ParseInt(page.ResourceVersion, 10, 64)
		}
		for i := range page.Items {
			if o := &page.Items[i]; strings.HasPrefix(o.Name, prefix) {
				out.Items[o.Name] = history.Item{Value: o.Data["v"], Revision: revision(o)}
			}
		}
		options.ResourceVersion, options.ResourceVersionMatch = "", ""
		if options.Continue = page.Continue; options.Continue == "" {
			out.Status = history.OK
			return out
		}
	}
}

// watch follows the namespace, and resumes on the next controller at the last
// revision it saw whenever a stream ends.
func (m *mix) watch(ctx context.Context, w *history.Watch, clients []typedcorev1.ConfigMapInterface) {
	last := w.After
	for i := 0; ctx.Err() == nil; i++ {
		stream, cancel := context.WithTimeout(ctx, 10*time.Second) // so that it resumes often
		events, err := clients[i%len(clients)].Watch(stream, metav1.ListOptions{ResourceVersion: strconv.FormatInt(last, 10), AllowWatchBookmarks: true})
		if err != nil {
			cancel()
			select {
			case <-ctx.Done():
			case <-time.After(50 * time.Millisecond):
			}
			continue
		}
		for e := range events.ResultChan() {
			o, ok := e.Object.(*corev1.ConfigMap)
			if !ok {
				break // an error: it resumes elsewhere, and what it misses will show
			}
			if last = revision(o); e.Type != watch.Bookmark {
				m.recorder.Saw(w, history.Event{Delete: e.Type == watch.Deleted, Key: o.Name, Value: o.Data["v"], Revision: last})
			}
		}
		events.Stop()
		cancel()
	}
}

func object(key, value string, at int64) *corev1.ConfigMap {
	o := &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: key}, Data: map[string]string{"v": value}}
	if at != 0 {
		o.ResourceVersion = strconv.FormatInt(at, 10)
	}
	return o
}

func revision(o metav1.Object) int64 {
	n, _ := strconv.ParseInt(o.GetResourceVersion(), 10, 64)
	return n
}

// outcomeOf says what an error means for whether the operation was done.
func outcomeOf(err error) history.Outcome {
	var refused interface{ Timeout() bool }
	switch {
	case err == nil:
		return history.Outcome{Status: history.OK}
	case apierrors.IsConflict(err), apierrors.IsAlreadyExists(err), apierrors.IsNotFound(err):
		return history.Outcome{Status: history.Refused}
	case apierrors.IsTooManyRequests(err), apierrors.IsUnauthorized(err), apierrors.IsForbidden(err):
		return history.Outcome{Status: history.NoEffect}
	case strings.Contains(err.Error(), "connection refused"), strings.Contains(err.Error(), "no route to host"):
		return history.Outcome{Status: history.NoEffect}
	case errors.As(err, &refused) && refused.Timeout() && strings.Contains(err.Error(), "dial tcp"):
		return history.Outcome{Status: history.NoEffect}
	}
	return history.Outcome{Status: history.Unknown}
}

// longestQuiet is the longest time between two acknowledged writes, and when it began.
func longestQuiet(h history.History) (longest, since time.Duration) {
	var last time.Duration
	for _, o := range h.Operations { // in the order of their calls, near enough
		if o.Outcome.Status == history.OK && o.Kind != history.Get && o.Kind != history.List && o.Return > last {
			if last != 0 && o.Return-last > longest {
				longest, since = o.Return-last, last
			}
			last = o.Return
		}
	}
	return longest, since
}
