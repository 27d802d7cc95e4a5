//go:build chaos

package chaos

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
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
	"k8s.io/apimachinery/pkg/util/resourceversion"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/kubernetes"
	typedcorev1 "k8s.io/client-go/kubernetes/typed/core/v1"

	"timonel/internal/cluster"
	"timonel/test/harness"
)

// What a controller may hold a minute after any load, over twice its state.
const restingMemory = 200 << 20

// large is the data of the largest object there is: a ConfigMap of 1 MiB.
func large(random *rand.Rand) map[string][]byte {
	b := make([]byte, 1<<20-2048)
	for i := range b {
		b[i] = byte(random.Uint32())
	}
	return map[string][]byte{"data": b}
}

// TestLargeWriters lets one client on each controller write objects of 1 MiB as fast
// as it may, and checks that all others go on: nothing fails, no watch ends early, none
// waits long; and that a minute later the controllers have given the memory back.
func TestLargeWriters(t *testing.T) {
	c := harness.Up(t, harness.Options{Controllers: 3})
	admin := c.Client(t, "")
	space, err := admin.CoreV1().Namespaces().Create(t.Context(), &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "others"}}, metav1.CreateOptions{})
	require.NoError(t, err)

	alone := smallClients(t, c, space.Name, "alone", 10*time.Second)
	ctx, stop := context.WithCancel(t.Context())
	var writers sync.WaitGroup
	var written, refused atomic.Int64
	for i, on := range c.Spec.ControllerNames() {
		maps := c.Client(t, on).CoreV1().ConfigMaps("default")
		writers.Go(func() { writeLarge(ctx, maps, i, &written, &refused) })
	}
	beside := smallClients(t, c, space.Name, "beside", 45*time.Second)
	printMemory(t, c)
	stop()
	writers.Wait()
	t.Logf("writers of 1 MiB: %d writes, %d refused", written.Load(), refused.Load())
	t.Logf("others alone: %s", alone)
	t.Logf("others beside them: %s", beside)
	require.NotZero(t, written.Load())
	require.LessOrEqual(t, beside.write.percentile(99), max(20*alone.write.percentile(99), time.Second), "writes of others")
	require.LessOrEqual(t, beside.read.percentile(99), max(20*alone.read.percentile(99), time.Second), "reads of others")
	require.LessOrEqual(t, beside.event.percentile(99), max(20*alone.event.percentile(99), time.Second), "events of others")
	requireMemoryBack(t, c)
	requireSameEverywhere(t, c)
}

// writeLarge creates, updates and deletes ConfigMaps of 1 MiB until ctx ends.
func writeLarge(ctx context.Context, maps typedcorev1.ConfigMapInterface, id int, written, refused *atomic.Int64) {
	random := rand.New(rand.NewPCG(1, uint64(id)))
	for i := 0; ctx.Err() == nil; i++ {
		name := fmt.Sprintf("large-%d-%d", id, i%8)
		o := &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: name}, BinaryData: large(random)}
		_, err := maps.Create(ctx, o, metav1.CreateOptions{})
		if apierrors.IsAlreadyExists(err) {
			if i%24 < 8 {
				err = maps.Delete(ctx, name, metav1.DeleteOptions{})
			} else {
				_, err = maps.Update(ctx, o, metav1.UpdateOptions{})
			}
		}
		if err != nil {
			refused.Add(1)
			continue
		}
		written.Add(1)
	}
}

// durations of one kind of operation.
type durations []time.Duration

func (d durations) percentile(p int) time.Duration {
	if len(d) == 0 {
		return 0
	}
	slices.Sort(d)
	return d[min(len(d)*p/100, len(d)-1)]
}

func (d durations) String() string {
	return fmt.Sprintf("%d, half within %s, 99 of 100 %s, all %s", len(d), ms(d.percentile(50)), ms(d.percentile(99)), ms(d.percentile(100)))
}

// latencies is what small clients saw: of writes, of reads, and from an acknowledged
// write to its event at a watcher on another controller.
type latencies struct{ write, read, event durations }

func (l *latencies) String() string {
	return fmt.Sprintf("writes %s; reads %s; events %s", l.write, l.read, l.event)
}

// smallClients uses the cluster as small clients do, one on each controller, each watched
// on the next, and fails the test when an operation fails or an event does not come.
func smallClients(t *testing.T, c *harness.Cluster, namespace, prefix string, duration time.Duration) *latencies {
	t.Helper()
	l := &latencies{}
	var mu sync.Mutex
	var problems []string
	problem := func(format string, args ...any) {
		mu.Lock()
		defer mu.Unlock()
		problems = append(problems, fmt.Sprintf(format, args...))
	}
	var work sync.WaitGroup
	end := time.Now().Add(duration)
	names := c.Spec.ControllerNames()
	for i, on := range names {
		maps := c.Client(t, on).CoreV1().ConfigMaps(namespace)
		there := streams(t, c, names[(i+1)%len(names)]).CoreV1().ConfigMaps(namespace)
		name := fmt.Sprintf("%s-%d", prefix, i)
		o, err := maps.Create(t.Context(), &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: name}}, metav1.CreateOptions{})
		require.NoError(t, err)
		ctx, cancel := context.WithCancel(t.Context())
		stream, err := watchOf(ctx, there, name, o.ResourceVersion)
		require.NoError(t, err)
		var seen sync.Map // value to when it was seen
		var watching sync.WaitGroup
		watching.Go(func() {
			for e := range stream.ResultChan() {
				if m, ok := e.Object.(*corev1.ConfigMap); ok {
					seen.Store(m.Data["n"], time.Now())
				} else if ctx.Err() == nil {
					problem("the watch of %s on another controller: %v", name, apierrors.FromObject(e.Object))
				}
			}
			if ctx.Err() == nil {
				problem("the watch of %s ended", name)
			}
		})
		work.Go(func() {
			defer watching.Wait()
			defer cancel()
			var write, read durations
			sent := map[string]time.Time{}
			for n := 0; time.Now().Before(end); n++ {
				o.Data = map[string]string{"n": strconv.Itoa(n)}
				begin := time.Now()
				next, err := maps.Update(ctx, o, metav1.UpdateOptions{})
				if err != nil {
					problem("update of %s: %v", name, err)
					return
				}
				o = next
				write = append(write, time.Since(begin))
				sent[o.Data["n"]] = begin
				begin = time.Now()
				if _, err := maps.Get(ctx, name, metav1.GetOptions{}); err != nil {
					problem("get of %s: %v", name, err)
					return
				}
				read = append(read, time.Since(begin))
				time.Sleep(20 * time.Millisecond)
			}
			var event durations
			for n, at := range sent {
				deadline := time.Now().Add(15 * time.Second)
				for {
					if when, ok := seen.Load(n); ok {
						event = append(event, when.(time.Time).Sub(at))
						break
					}
					if time.Now().After(deadline) {
						problem("no event of update %s of %s", n, name)
						return
					}
					time.Sleep(10 * time.Millisecond)
				}
			}
			mu.Lock()
			defer mu.Unlock()
			l.write, l.read, l.event = append(l.write, write...), append(l.read, read...), append(l.event, event...)
		})
	}
	work.Wait()
	require.Empty(t, problems)
	return l
}

// watchOf watches one ConfigMap, for an hour at most.
func watchOf(ctx context.Context, maps typedcorev1.ConfigMapInterface, name, after string) (watch.Interface, error) {
	hour := int64(3600)
	return maps.Watch(ctx, metav1.ListOptions{FieldSelector: "metadata.name=" + name, ResourceVersion: after, TimeoutSeconds: &hour})
}

// requireMemoryBack checks that a minute after a load each controller holds 200 MB and
// twice its state at most.
func requireMemoryBack(t *testing.T, c *harness.Cluster) {
	t.Helper()
	allowed := restingMemory + 2*heldBytes(t, c, "state")
	time.Sleep(time.Minute) // what is promised is a time
	t.Logf("a minute later, when each may have %d MB:", allowed>>20)
	printMemory(t, c)
	for _, k := range c.Status(t).Controllers {
		require.LessOrEqual(t, int64(k.Memory.Resident), allowed, "%s holds more than 200 MB and twice its state", k.Name)
	}
}

// heldBytes is how much the leader holds of a share of its memory, as it counts itself.
func heldBytes(t *testing.T, c *harness.Cluster, share string) int64 {
	t.Helper()
	metrics, err := c.Client(t, c.Leader(t)).Discovery().RESTClient().Get().AbsPath("/metrics").Do(t.Context()).Raw()
	require.NoError(t, err)
	for line := range strings.Lines(string(metrics)) {
		if rest, ok := strings.CutPrefix(line, `timonel_memory_held_bytes{share="`+share+`"} `); ok {
			n, err := strconv.ParseFloat(strings.TrimSpace(rest), 64)
			require.NoError(t, err)
			return int64(n)
		}
	}
	t.Fatalf("/metrics has no timonel_memory_held_bytes of share %q", share)
	return 0
}

// TestMemoryAfterLightWork makes and deletes a namespace with 15 ConfigMaps and a
// Deployment of four, again and again, and looks what the controllers hold a minute
// later.
func TestMemoryAfterLightWork(t *testing.T) {
	_, minutes := mixParameters(t, 5)
	c := harness.Up(t, harness.Options{Controllers: 3, Agents: 2})
	client := c.Client(t, "")
	end := time.Now().Add(time.Duration(minutes * float64(time.Minute)))
	rounds := 0
	for ; time.Now().Before(end); rounds++ {
		next := time.After(4 * time.Second)
		name := fmt.Sprintf("work-%d", rounds)
		_, err := client.CoreV1().Namespaces().Create(t.Context(), &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: name}}, metav1.CreateOptions{})
		require.NoError(t, err)
		for i := range 15 {
			_, err := client.CoreV1().ConfigMaps(name).Create(t.Context(), &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: fmt.Sprint("c", i)},
				Data: map[string]string{"text": strings.Repeat("x", 1000)}}, metav1.CreateOptions{})
			require.NoError(t, err)
		}
		d := cluster.SampleDeployment(4)
		d.Namespace = name
		_, err = client.AppsV1().Deployments(name).Create(t.Context(), d, metav1.CreateOptions{})
		require.NoError(t, err)
		<-next
		require.NoError(t, client.CoreV1().Namespaces().Delete(t.Context(), name, metav1.DeleteOptions{}))
	}
	t.Logf("after %d rounds:", rounds)
	printMemory(t, c)
	harness.Eventually(t, 2*time.Minute, "the namespaces to be gone", func() error {
		list, err := client.CoreV1().Namespaces().List(t.Context(), metav1.ListOptions{})
		if err == nil && len(list.Items) > 5 {
			err = fmt.Errorf("%d are there", len(list.Items))
		}
		return err
	})
	requireMemoryBack(t, c)
}

// TestMemoryAfterSmallWrites updates small objects for five minutes as fast as it may, on
// all controllers, and looks what these hold a minute later: what was replaced is not in
// memory, and yet watches resume at what was the newest before.
func TestMemoryAfterSmallWrites(t *testing.T) {
	const writers, each = 4, 50 // on each controller
	_, minutes := mixParameters(t, 5)
	c := harness.Up(t, harness.Options{Controllers: 3})
	admin := c.Client(t, "")
	ctx, stop := context.WithTimeout(t.Context(), time.Duration(minutes*float64(time.Minute)))
	defer stop()
	var writing sync.WaitGroup
	var written, refused atomic.Int64
	for i, on := range c.Spec.ControllerNames() {
		maps := c.Client(t, on).CoreV1().ConfigMaps("default")
		for j := range writers {
			writing.Go(func() { writeSmall(ctx, maps, fmt.Sprintf("small-%d-%d", i, j), each, &written, &refused) })
		}
	}
	middle := ""
	select {
	case <-time.After(time.Duration(minutes * float64(30*time.Second))):
		list, err := admin.CoreV1().ConfigMaps("default").List(t.Context(), metav1.ListOptions{})
		require.NoError(t, err)
		middle = list.ResourceVersion
	case <-t.Context().Done():
		t.Fatal(t.Context().Err())
	}
	half := written.Load()
	writing.Wait()
	t.Logf("%d writes of 1 KB, %d refused", written.Load(), refused.Load())
	require.NotZero(t, half)
	printMemory(t, c)
	t.Logf("the history of the leader holds %d MB in memory", heldBytes(t, c, "history")>>20)
	requireMemoryBack(t, c)
	list, err := admin.CoreV1().ConfigMaps("default").List(t.Context(), metav1.ListOptions{})
	require.NoError(t, err)
	for _, on := range c.Spec.ControllerNames() {
		hour := int64(3600)
		stream, err := streams(t, c, on).CoreV1().ConfigMaps("default").Watch(t.Context(), metav1.ListOptions{ResourceVersion: middle, TimeoutSeconds: &hour})
		require.NoError(t, err, "%s: watch from before", on)
		left := map[string]string{} // what the last event of each is to be
		for i := range list.Items {
			if newer, err := resourceversion.CompareResourceVersion(list.Items[i].ResourceVersion, middle); err != nil || newer > 0 {
				left[list.Items[i].Name] = list.Items[i].ResourceVersion
			}
		}
		events := int64(0)
		for end := time.After(2 * time.Minute); len(left) > 0; {
			select {
			case e, ok := <-stream.ResultChan():
				require.True(t, ok, "%s: the watch ended", on)
				o, ok := e.Object.(*corev1.ConfigMap)
				require.True(t, ok, "%s: %v", on, apierrors.FromObject(e.Object))
				if events++; left[o.Name] == o.ResourceVersion {
					delete(left, o.Name)
				}
			case <-end:
				t.Fatalf("%s: %d events, and %d objects are not what they are", on, events, len(left))
			}
		}
		stream.Stop()
		t.Logf("%s: %d events since the middle", on, events)
		require.GreaterOrEqual(t, events, written.Load()-half-int64(writers*len(c.Spec.ControllerNames())), "%s: events are missing", on)
	}
	requireSameEverywhere(t, c)
}

// writeSmall creates ConfigMaps of 1 KB and updates them in turn until ctx ends.
func writeSmall(ctx context.Context, maps typedcorev1.ConfigMapInterface, prefix string, n int, written, refused *atomic.Int64) {
	random := rand.New(rand.NewPCG(3, uint64(len(prefix))))
	for i := 0; ctx.Err() == nil; i++ {
		text := make([]byte, 750)
		for j := range text {
			text[j] = byte(random.Uint32())
		}
		o := &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: fmt.Sprint(prefix, "-", i%n)}, BinaryData: map[string][]byte{"data": text}}
		_, err := maps.Update(ctx, o, metav1.UpdateOptions{})
		if apierrors.IsNotFound(err) {
			_, err = maps.Create(ctx, o, metav1.CreateOptions{})
		}
		if err != nil {
			refused.Add(1)
			continue
		}
		written.Add(1)
	}
}

// TestFull fills a cluster to the limit of its state from three clients, sees what they
// are told, deletes, and goes on: no process ends, no replica is behind.
func TestFull(t *testing.T) {
	c := harness.Up(t, harness.Options{Controllers: 3, ControllerFlags: []string{"--state-limit=64Mi"}})
	pids := func() (ids []int) {
		for _, name := range c.Spec.ControllerNames() {
			ids = append(ids, pid(t, c, name))
		}
		return ids
	}
	before := pids()
	for round := range 2 {
		var fillers sync.WaitGroup
		var mu sync.Mutex
		var said []error
		for i, on := range c.Spec.ControllerNames() {
			maps := c.Client(t, on).CoreV1().ConfigMaps("default")
			fillers.Go(func() {
				err := fill(t.Context(), maps, fmt.Sprintf("full-%d-%d", round, i))
				mu.Lock()
				defer mu.Unlock()
				said = append(said, err)
			})
		}
		fillers.Wait()
		// The room that was kept for the others' last ones is one more's.
		said = append(said, fill(t.Context(), c.Client(t, "").CoreV1().ConfigMaps("default"), fmt.Sprintf("full-%d-alone", round)))
		for _, err := range said {
			var status apierrors.APIStatus
			require.ErrorAs(t, err, &status)
			require.EqualValues(t, 507, status.Status().Code, "%v", err)
			require.Contains(t, err.Error(), "--state-limit")
			require.Contains(t, err.Error(), "elete", "it says what to do")
		}
		t.Logf("the state is full: %v", said[0])
		require.Equal(t, before, pids(), "a controller's process ended")
		requireSameEverywhere(t, c)
		require.Contains(t, c.Run(t, "status"), "state", "status tells")
		file := filepath.Join(t.TempDir(), "text")
		require.NoError(t, os.WriteFile(file, bytes.Repeat([]byte("x"), 1_000_000), 0o600))
		out, err := c.Try(t.Context(), "kubectl", "create", "configmap", "one-more", "--from-file=a="+file)
		if err == nil { // it is a little smaller
			out, err = c.Try(t.Context(), "kubectl", "create", "configmap", "two-more", "--from-file=a="+file)
		}
		require.Error(t, err)
		require.Contains(t, out, "--state-limit")
		if round == 1 { // and all of it survives that everything is killed
			killAll(t, c)
			before = pids()
		}
		c.Run(t, "kubectl", "delete", "configmap", "--all")
		c.Run(t, "kubectl", "create", "configmap", fmt.Sprint("goes-on-", round), "--from-file=a="+file)
	}
	w := c.Write(t, "")
	written := w.Stop(t)
	t.Logf("afterwards: %d writes, %d failed", len(written.Acknowledged), written.Failures)
	requireSameEverywhere(t, c)
	require.Equal(t, before, pids(), "a controller's process ended")
}

// fill creates ConfigMaps of 1 MiB until it is refused.
func fill(ctx context.Context, maps typedcorev1.ConfigMapInterface, prefix string) error {
	random := rand.New(rand.NewPCG(2, uint64(len(prefix))))
	for i := range 200 {
		if _, err := maps.Create(ctx, &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: fmt.Sprint(prefix, "-", i)}, BinaryData: large(random)}, metav1.CreateOptions{}); err != nil {
			return err
		}
	}
	return errors.New("200 MiB were taken")
}

// TestCutOffWatchers cuts a controller off that clients watch, directly and through
// the load balancer, and an agent is connected to: all leave it at once, and miss
// nothing.
func TestCutOffWatchers(t *testing.T) {
	c := harness.Up(t, harness.Options{Controllers: 3, Agents: 2})
	c.Deploy(t, "web", 2)
	for _, role := range []string{"leader", "follower"} {
		t.Run(role, func(t *testing.T) {
			victim := c.Leader(t)
			if role == "follower" {
				victim = follower(t, c)
			}
			admin := c.Client(t, another(c, victim))
			o, err := admin.CoreV1().ConfigMaps("default").Create(t.Context(), &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{GenerateName: "cut-"}}, metav1.CreateOptions{})
			require.NoError(t, err)
			direct := c.Client(t, victim)
			ended := make(chan time.Time, 1)
			stream, err := watchOf(t.Context(), streams(t, c, victim).CoreV1().ConfigMaps("default"), o.Name, o.ResourceVersion)
			require.NoError(t, err)
			go func() {
				for range stream.ResultChan() {
				}
				ended <- time.Now()
			}()
			// As many through the balancer as surely reach the victim too.
			var mu sync.Mutex
			newest := make([]string, 12)
			ctx, cancel := context.WithCancel(t.Context())
			var watching sync.WaitGroup
			for i := range newest {
				client := streams(t, c, c.Spec.Name)
				watching.Go(func() {
					followOne(ctx, client, o.Name, o.ResourceVersion, func(n string) { mu.Lock(); newest[i] = n; mu.Unlock() })
				})
			}
			begin := time.Now()
			c.Run(t, "partition", victim, "--from", others(c, victim))
			for n := range 5 {
				updateOne(t, admin, o.Name, strconv.Itoa(n))
			}
			harness.Eventually(t, 10*time.Second, "all watchers through the balancer to see the last write", func() error {
				mu.Lock()
				defer mu.Unlock()
				for i, n := range newest {
					if n != "4" {
						return fmt.Errorf("watcher %d is at %q", i, n)
					}
				}
				return nil
			})
			t.Logf("%s cut off: all watchers through the balancer saw the last write after %s", role, ms(time.Since(begin)))
			select {
			case at := <-ended:
				t.Logf("a watch on %s itself ended after %s", victim, ms(at.Sub(begin)))
			case <-time.After(10 * time.Second):
				t.Error("a watch on the controller that is cut off goes on")
			}
			for _, get := range []metav1.GetOptions{{}, {ResourceVersion: "0"}} {
				short, cancel := context.WithTimeout(t.Context(), 5*time.Second)
				_, err := direct.CoreV1().ConfigMaps("default").Get(short, o.Name, get)
				cancel()
				require.Error(t, err, "the controller that is cut off serves resourceVersion %q", get.ResourceVersion)
			}
			// Its agents have moved: a new pod of each node runs.
			c.Scale(t, "web", 6)
			c.WaitAvailable(t, "web", 6, 30*time.Second)
			for _, name := range c.Spec.AgentNames() {
				c.WaitNode(t, name, true, time.Second)
			}
			c.Run(t, "partition", victim, "--heal")
			c.WaitServing(t, victim, time.Minute)
			cancel()
			watching.Wait()
			c.Scale(t, "web", 2)
			c.WaitAvailable(t, "web", 2, time.Minute)
		})
	}
}

// another is a controller other than the one named.
func another(c *harness.Cluster, name string) string {
	first, _, _ := strings.Cut(others(c, name), ",")
	return first
}

// updateOne updates a ConfigMap, trying again while nobody leads.
func updateOne(t *testing.T, client *kubernetes.Clientset, name, n string) {
	t.Helper()
	maps := client.CoreV1().ConfigMaps("default")
	harness.Eventually(t, 10*time.Second, "update "+name, func() error {
		o, err := maps.Get(t.Context(), name, metav1.GetOptions{})
		if err != nil {
			return err
		}
		o.Data = map[string]string{"n": n}
		_, err = maps.Update(t.Context(), o, metav1.UpdateOptions{})
		return err
	})
}

// streams is a client whose watches have no end of their own.
func streams(t *testing.T, c *harness.Cluster, on string) *kubernetes.Clientset {
	t.Helper()
	config, err := c.Spec.RESTConfig(on)
	require.NoError(t, err)
	client, err := kubernetes.NewForConfig(config)
	require.NoError(t, err)
	return client
}

// followOne watches one ConfigMap as client-go's informers do: when a stream ends it
// resumes where it was.
func followOne(ctx context.Context, client *kubernetes.Clientset, name, after string, saw func(n string)) {
	for ctx.Err() == nil {
		stream, err := watchOf(ctx, client.CoreV1().ConfigMaps("default"), name, after)
		if err != nil {
			time.Sleep(50 * time.Millisecond)
			continue
		}
		for e := range stream.ResultChan() {
			if o, ok := e.Object.(*corev1.ConfigMap); ok {
				after = o.ResourceVersion
				saw(o.Data["n"])
			}
		}
	}
}
