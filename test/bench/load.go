package main

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
)

var getOptions metav1.GetOptions

// load is clients of one Kubernetes API, whatever is behind it: one connection
// for each client, spread over the servers.
type load struct {
	clients []kubernetes.Interface
	// namespace is where this load writes, its own.
	namespace string
	next      atomic.Int64
}

// watchers is how many watches share the fan-out row, listed how many objects a
// list returns, of among in a namespace.
const watchers, listed, among = 100, 1000, 5000

func newLoad(ctx context.Context, apis []*rest.Config, clients int) (*load, error) {
	l := &load{namespace: fmt.Sprintf("bench-%08x", rand.Uint32())}
	for i := range clients {
		config := rest.CopyConfig(apis[i%len(apis)])
		// A dialer of its own keeps client-go from sharing the connection.
		config.Dial = newDialer().DialContext
		client, err := kubernetes.NewForConfig(config)
		if err != nil {
			return nil, err
		}
		l.clients = append(l.clients, client)
	}
	_, err := l.clients[0].CoreV1().Namespaces().Create(ctx, &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: l.namespace}}, metav1.CreateOptions{})
	return l, err
}

// configMap is what the load creates: about 256 bytes of data.
func (l *load) configMap(labels map[string]string) *corev1.ConfigMap {
	return &corev1.ConfigMap{
		ObjectMeta: metav1.ObjectMeta{Name: fmt.Sprintf("c%08d", l.next.Add(1)), Namespace: l.namespace, Labels: labels},
		Data:       map[string]string{"value": strings.Repeat("x", 256)},
	}
}

func (l *load) create(ctx context.Context, client int) error {
	_, err := l.clients[client].CoreV1().ConfigMaps(l.namespace).Create(ctx, l.configMap(nil), metav1.CreateOptions{})
	return err
}

// timing is what a row of calls took.
type timing struct {
	calls    int
	rate     float64 // per second
	p50, p99 time.Duration
	took     []time.Duration // sorted
}

// inTurn has one client of each server call, one after the other, for a time in all.
// For one client's calls: whether its server leads must not be left to chance.
func (l *load) inTurn(ctx context.Context, servers int, d time.Duration, call func(ctx context.Context, client int) error) (timing, error) {
	var all timing
	for i := range servers {
		t, err := l.repeat(ctx, 1, d/time.Duration(servers), func(ctx context.Context, _ int) error { return call(ctx, i) })
		if err != nil {
			return timing{}, err
		}
		fmt.Fprintf(os.Stderr, "  server %d: p50 %v\n", i+1, t.p50.Round(10*time.Microsecond))
		all.took = append(all.took, t.took...)
		all.rate += t.rate / float64(servers)
	}
	all.sum()
	return all, nil
}

// repeat has n clients call for a time.
func (l *load) repeat(ctx context.Context, n int, d time.Duration, call func(ctx context.Context, client int) error) (timing, error) {
	n = min(n, len(l.clients))
	var (
		wg     sync.WaitGroup
		mu     sync.Mutex
		all    []time.Duration
		failed error
	)
	begin := time.Now()
	for i := range n {
		wg.Go(func() {
			var took []time.Duration
			for time.Since(begin) < d {
				at := time.Now()
				if err := call(ctx, i); err != nil {
					mu.Lock()
					failed = err
					mu.Unlock()
					return
				}
				took = append(took, time.Since(at))
			}
			mu.Lock()
			all = append(all, took...)
			mu.Unlock()
		})
	}
	wg.Wait()
	if failed != nil || len(all) == 0 {
		return timing{}, fmt.Errorf("%d calls done: %w", len(all), failed)
	}
	t := timing{rate: float64(len(all)) / time.Since(begin).Seconds(), took: all}
	t.sum()
	return t, nil
}

// sum fills in what follows from how long each call took.
func (t *timing) sum() {
	slices.Sort(t.took)
	t.calls, t.p50, t.p99 = len(t.took), t.took[len(t.took)/2], t.took[len(t.took)*99/100]
}

// get reads one object without a resourceVersion: linearizable.
func (l *load) get(ctx context.Context, client int) error {
	_, err := l.clients[client].CoreV1().ConfigMaps(l.namespace).Get(ctx, "c00000001", getOptions)
	return err
}

// listNamespace is where list reads: it has as many objects however fast a side is.
func (l *load) listNamespace() string { return l.namespace + "-list" }

// fill creates the objects that list reads, and those among them.
func (l *load) fill(ctx context.Context) error {
	namespace := &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: l.listNamespace()}}
	if _, err := l.clients[0].CoreV1().Namespaces().Create(ctx, namespace, metav1.CreateOptions{}); err != nil {
		return err
	}
	var wg sync.WaitGroup
	failed := make(chan error, len(l.clients))
	for i := range l.clients {
		wg.Go(func() {
			for j := i; j < among; j += len(l.clients) {
				m := l.configMap(nil)
				m.Namespace = l.listNamespace()
				if j%(among/listed) == 0 {
					m.Labels = map[string]string{"listed": "yes"}
				}
				if _, err := l.clients[i].CoreV1().ConfigMaps(m.Namespace).Create(ctx, m, metav1.CreateOptions{}); err != nil {
					failed <- err
					return
				}
			}
		})
	}
	wg.Wait()
	select {
	case err := <-failed:
		return err
	default:
		return nil
	}
}

func (l *load) list(ctx context.Context, client int) error {
	list, err := l.clients[client].CoreV1().ConfigMaps(l.listNamespace()).List(ctx, metav1.ListOptions{LabelSelector: "listed=yes"})
	if err == nil && len(list.Items) != listed {
		err = fmt.Errorf("list returned %d objects, not %d", len(list.Items), listed)
	}
	return err
}

// fanOut writes with one client while watchers watch, and returns how many
// events all of them got per second and how long the slowest took to get each.
func (l *load) fanOut(ctx context.Context, d time.Duration) (timing, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	list, err := l.clients[0].CoreV1().ConfigMaps(l.namespace).List(ctx, metav1.ListOptions{Limit: 1})
	if err != nil {
		return timing{}, err
	}
	var (
		wg    sync.WaitGroup
		count atomic.Int64
		mu    sync.Mutex
		all   []time.Duration
	)
	for i := range watchers {
		w, err := l.clients[i%len(l.clients)].CoreV1().ConfigMaps(l.namespace).Watch(ctx, metav1.ListOptions{ResourceVersion: list.ResourceVersion, LabelSelector: "fan=out"})
		if err != nil {
			return timing{}, err
		}
		wg.Go(func() {
			defer w.Stop()
			var took []time.Duration
			for {
				select {
				case <-ctx.Done():
					mu.Lock()
					all = append(all, took...)
					mu.Unlock()
					return
				case e := <-w.ResultChan():
					if m, ok := e.Object.(*corev1.ConfigMap); ok {
						var at int64
						_, _ = fmt.Sscan(m.Data["at"], &at)
						took = append(took, time.Duration(time.Now().UnixNano()-at))
						count.Add(1)
					}
				}
			}
		})
	}
	begin, written := time.Now(), int64(0)
	for time.Since(begin) < d {
		m := l.configMap(map[string]string{"fan": "out"})
		m.Data["at"] = fmt.Sprint(time.Now().UnixNano())
		if _, err := l.clients[0].CoreV1().ConfigMaps(l.namespace).Create(ctx, m, metav1.CreateOptions{}); err != nil {
			return timing{}, err
		}
		written++
	}
	for count.Load() < written*watchers && time.Since(begin) < d+10*time.Second {
		time.Sleep(time.Millisecond)
	}
	elapsed := time.Since(begin)
	cancel()
	wg.Wait()
	if got := count.Load(); got != written*watchers || len(all) == 0 {
		return timing{}, fmt.Errorf("watchers got %d of %d events", got, written*watchers)
	}
	slices.Sort(all)
	t := timing{rate: float64(len(all)) / elapsed.Seconds(), took: all}
	t.sum()
	return t, nil
}

// gap is the longest time between two writes that succeeded, of any of 8 clients
// that try on, each at the next server after an error, while kill takes the
// leader away after a second.
func (l *load) gap(ctx context.Context, d time.Duration, kill func() error) (time.Duration, error) {
	var (
		wg      sync.WaitGroup
		mu      sync.Mutex
		longest time.Duration
		last    = time.Now()
		end     = time.Now().Add(d)
		after   int
		killed  bool
	)
	for i := range min(8, len(l.clients)) {
		wg.Go(func() {
			for client := i; time.Now().Before(end); {
				try, cancel := context.WithTimeout(ctx, 5*time.Second)
				err := l.create(try, client)
				cancel()
				if err != nil && !apierrors.IsAlreadyExists(err) {
					client = (client + 1) % len(l.clients)
					time.Sleep(5 * time.Millisecond)
					continue
				}
				mu.Lock()
				now := time.Now()
				longest, last = max(longest, now.Sub(last)), now
				if killed {
					after++
				}
				mu.Unlock()
			}
		})
	}
	time.Sleep(time.Second)
	mu.Lock()
	killed, longest = true, 0
	mu.Unlock()
	err := kill()
	wg.Wait()
	if err == nil && after == 0 {
		err = fmt.Errorf("no write succeeded after the leader was killed")
	}
	return longest, err
}
