package apiserver

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"runtime/metrics"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/rest"

	"timonel/state"
	"timonel/state/storage/storagetest"
)

// peakHeap samples the heap's live and dead objects until stop, which returns the most.
func peakHeap() (stop func() int64) {
	var most atomic.Int64
	done, ended := make(chan struct{}), make(chan struct{})
	sample := []metrics.Sample{{Name: "/memory/classes/heap/objects:bytes"}}
	go func() {
		defer close(ended)
		tick := time.NewTicker(10 * time.Millisecond)
		defer tick.Stop()
		for {
			metrics.Read(sample)
			most.Store(max(most.Load(), int64(sample[0].Value.Uint64())))
			select {
			case <-tick.C:
			case <-done:
				return
			}
		}
	}()
	return func() int64 { close(done); <-ended; return most.Load() }
}

// get sends a request and does not read its answer.
func get(ctx context.Context, transport http.RoundTripper, url string, header ...string) (*http.Response, error) {
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return nil, err
	}
	for i := 0; i < len(header); i += 2 {
		r.Header.Set(header[i], header[i+1])
	}
	return transport.RoundTrip(r)
}

// answersFixture is a server of its own, whose bounds are the least, and n ConfigMaps of
// 700 KiB in a namespace of a tenant of that name.
func answersFixture(t *testing.T, namespace string, n int) (*fixture, *rest.Config) {
	t.Helper()
	f, err := startFixture(storagetest.NewLocalBackend(state.Options{}), nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := f.stop(); err != nil {
			t.Error(err)
		}
	})
	config := tenant(t, f, namespace)
	admin := client(t, f.admin()).CoreV1().ConfigMaps(namespace)
	for i := range n {
		cm := configMap(fmt.Sprint("large-", i), map[string]string{"a": strings.Repeat("x", 700<<10)})
		cm.Labels = map[string]string{"large": fmt.Sprint(i % 2)}
		if _, err := admin.Create(within(t, time.Minute), cm, metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	return f, config
}

// TestAnswersHaveABound has a tenant list what is large, as many times as it can, in each
// form, and read nothing of it: the answers take no more than there is for them, and others
// are answered.
func TestAnswersHaveABound(t *testing.T) {
	const objects, clients = 40, 60
	f, config := answersFixture(t, "lists", objects)
	other := tenant(t, f, "beside")
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()
	stop := peakHeap()
	var codes sync.Map
	for i := range clients {
		config := rest.CopyConfig(config)
		config.Dial = smallBuffers
		config.NextProtos = []string{[]string{"h2", "http/1.1"}[i%2]}
		transport, err := rest.TransportFor(config)
		if err != nil {
			t.Fatal(err)
		}
		query := []string{"", "?labelSelector=large%3D1", "?pretty=true"}[i/2%3]
		accept := []string{"application/json", "application/vnd.kubernetes.protobuf", "application/json;as=Table;v=v1;g=meta.k8s.io"}[i/6%3]
		url := config.Host + "/api/v1/namespaces/lists/configmaps" + query
		wg.Go(func() {
			for ctx.Err() == nil {
				resp, err := get(ctx, transport, url, "Accept", accept)
				if err != nil {
					continue // cut off
				}
				n, _ := codes.LoadOrStore(resp.StatusCode, new(atomic.Int64))
				n.(*atomic.Int64).Add(1)
				if resp.StatusCode == http.StatusOK {
					<-ctx.Done() // and read nothing, until it is ended
				}
				_, _ = io.Copy(io.Discard, resp.Body)
				resp.Body.Close()
				time.Sleep(100 * time.Millisecond)
			}
		})
	}
	eventually(t, time.Minute, func() error {
		if _, refused := f.server.Answers(); refused == 0 {
			return errors.New("nothing was refused: there is room for all")
		}
		return nil
	})
	limit := int64(leastAnswerBytes)
	if held, _ := f.server.Answers(); held == 0 || held > limit {
		t.Errorf("answers hold %d bytes of %d", held, limit)
	}
	// Others read, what is small at once, and what is large as soon as somebody who reads
	// nothing was cut off.
	beside := client(t, other).CoreV1().ConfigMaps("beside")
	for i := range 8 {
		if _, err := beside.Create(within(t, 30*time.Second), configMap(fmt.Sprint("own-", i), map[string]string{"a": strings.Repeat("x", 500<<10*(i%2)+1)}), metav1.CreateOptions{}); err != nil {
			t.Errorf("a write of somebody else: %v", err)
		}
	}
	var slowest time.Duration
	for range 20 {
		began := time.Now()
		if _, err := beside.Get(within(t, 30*time.Second), "own-0", metav1.GetOptions{}); err != nil {
			t.Errorf("a small read of somebody else: %v", err)
		}
		slowest = max(slowest, time.Since(began))
	}
	began := time.Now()
	if l, err := beside.List(within(t, 30*time.Second), metav1.ListOptions{}); err != nil || len(l.Items) < 8 {
		t.Errorf("a large list of somebody else: %v", err)
	}
	listed := time.Since(began)
	began = time.Now()
	if l, err := client(t, f.network(t, "admin", "system:masters")).CoreV1().ConfigMaps("lists").List(within(t, 2*time.Minute), metav1.ListOptions{}); err != nil || len(l.Items) != objects {
		t.Errorf("an administrator's list: %v", err)
	}
	t.Logf("others: the slowest of 20 small reads took %s, a list of 2 MB %s, an administrator's of 28 MB %s", slowest, listed, time.Since(began))
	cancel()
	wg.Wait()
	peak := stop()
	codes.Range(func(code, n any) bool { t.Logf("%d: %d answers", code, n.(*atomic.Int64).Load()); return true })
	t.Logf("the heap had %d MiB at most", peak>>20)
	if peak > 700<<20 {
		t.Errorf("the heap had %d MiB: %d lists of 28 MiB would be 3,360", peak>>20, clients)
	}
	eventually(t, time.Minute, func() error {
		if held, _ := f.server.Answers(); held != 0 {
			return fmt.Errorf("%d bytes were not given back", held)
		}
		return nil
	})
}

// TestSlowAnswersAreCutOff has two tenants, who may have all of the room, read nothing; a
// third has its answer within its patience.
func TestSlowAnswersAreCutOff(t *testing.T) {
	f, first := answersFixture(t, "slow-0", 30)
	_, err := client(t, f.admin()).RbacV1().RoleBindings("slow-0").Patch(within(t, time.Minute), "all", "application/json-patch+json",
		[]byte(`[{"op":"add","path":"/subjects/-","value":{"apiGroup":"rbac.authorization.k8s.io","kind":"User","name":"second"}},
			{"op":"add","path":"/subjects/-","value":{"apiGroup":"rbac.authorization.k8s.io","kind":"User","name":"third"}}]`), metav1.PatchOptions{})
	if err != nil {
		t.Fatal(err)
	}
	url := first.Host + "/api/v1/namespaces/slow-0/configmaps"
	for i, config := range []*rest.Config{first, f.network(t, "second")} {
		config.Dial = smallBuffers
		config.NextProtos = []string{[]string{"h2", "http/1.1"}[i]}
		transport, err := rest.TransportFor(config)
		if err != nil {
			t.Fatal(err)
		}
		resp, err := get(within(t, time.Minute), transport, url)
		if err != nil || resp.StatusCode != http.StatusOK {
			t.Fatalf("%v, %v", resp, err)
		}
		defer resp.Body.Close()
	}
	began := time.Now()
	third := client(t, f.network(t, "third")).CoreV1().ConfigMaps("slow-0")
	eventually(t, 45*time.Second, func() error {
		_, err := third.List(within(t, 30*time.Second), metav1.ListOptions{})
		return err
	})
	t.Logf("a third had its answer after %s", time.Since(began))
}

// TestIndentedAnswers asks for lines, and for YAML, of what is deep: each line has as many
// spaces before it, so that 1.5 MB would become gigabytes.
func TestIndentedAnswers(t *testing.T) {
	f := shareServer(t)
	config := tenant(t, f, "deep")
	chain := strings.Repeat("[", 5000) + strings.Repeat("]", 5000)
	data := `{"x":[` + strings.Repeat(chain+",", 100) + chain + `]}`
	c := client(t, config)
	revision := &appsv1.ControllerRevision{ObjectMeta: metav1.ObjectMeta{Name: "deep"}, Data: runtime.RawExtension{Raw: []byte(data)}}
	if _, err := c.AppsV1().ControllerRevisions("deep").Create(within(t, time.Minute), revision, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	if _, err := c.CoreV1().ConfigMaps("deep").Create(within(t, time.Minute), &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: "flat"}, Data: map[string]string{"a": strings.Repeat(`{"a":[1,2]},`, 60_000)}}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	transport, err := rest.TransportFor(config)
	if err != nil {
		t.Fatal(err)
	}
	revisions, maps := "/apis/apps/v1/namespaces/deep/controllerrevisions", "/api/v1/namespaces/deep/configmaps"
	for name, tt := range map[string]struct {
		path, agent, accept string
		want                int
	}{
		"as it is":       {revisions + "/deep", "", "application/json", http.StatusOK},
		"in lines":       {revisions + "/deep?pretty=1", "", "application/json", http.StatusRequestEntityTooLarge},
		"by curl":        {revisions + "/deep", "curl/8", "application/json", http.StatusRequestEntityTooLarge},
		"a list":         {revisions + "?pretty=true", "", "application/json", http.StatusRequestEntityTooLarge},
		"in YAML":        {revisions + "/deep", "", "application/yaml", http.StatusRequestEntityTooLarge},
		"flat, in lines": {maps + "/flat?pretty=1", "", "application/json", http.StatusOK},
		"flat, in YAML":  {maps, "", "application/yaml", http.StatusOK},
	} {
		t.Run(name, func(t *testing.T) {
			resp, err := get(within(t, time.Minute), transport, config.Host+tt.path, "Accept", tt.accept, "User-Agent", tt.agent)
			if err != nil {
				t.Fatal(err)
			}
			defer resp.Body.Close()
			n, err := io.Copy(io.Discard, resp.Body)
			if resp.StatusCode != tt.want || err != nil {
				t.Errorf("%s with %d bytes, %v", resp.Status, n, err)
			}
		})
	}
}
