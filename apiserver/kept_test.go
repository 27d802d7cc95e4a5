package apiserver

import (
	"bufio"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	rbacv1 "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/rest"
)

// liveHeap is what lives.
func liveHeap() int64 {
	var m runtime.MemStats
	runtime.GC()
	runtime.GC() // what pools keep goes with the second
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc)
}

// TestBuffersOfWatchesHaveABound opens many watches of a large object that all begin with
// it: each encodes it, in buffers that are kept for as long as the watch lasts. The clients
// that cause most of it lose their watches, and others keep theirs.
func TestBuffersOfWatchesHaveABound(t *testing.T) {
	const watches = 200
	f, config := answersFixture(t, "kept", 1)
	_, err := client(t, f.admin()).RbacV1().RoleBindings("kept").Create(within(t, time.Minute), &rbacv1.RoleBinding{
		ObjectMeta: metav1.ObjectMeta{Name: "other"},
		RoleRef:    rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "ClusterRole", Name: "cluster-admin"},
		Subjects:   []rbacv1.Subject{{Kind: rbacv1.UserKind, APIGroup: rbacv1.GroupName, Name: "other"}},
	}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	var ended sync.WaitGroup
	open := func(config *rest.Config, accept string) (done <-chan struct{}) {
		transport, err := rest.TransportFor(config)
		if err != nil {
			t.Fatal(err)
		}
		resp, err := get(within(t, 3*time.Minute), transport, config.Host+"/api/v1/namespaces/kept/configmaps?watch=true&fieldSelector=metadata.name%3Dlarge-0", "Accept", accept)
		if err != nil || resp.StatusCode != http.StatusOK {
			t.Fatalf("%v, %v", resp, err)
		}
		t.Cleanup(func() { resp.Body.Close() })
		r := bufio.NewReader(resp.Body)
		if n, err := io.CopyN(io.Discard, r, 700<<10); err != nil {
			t.Fatalf("%d bytes of the first event: %v", n, err)
		}
		over := make(chan struct{})
		ended.Go(func() {
			defer close(over)
			_, _ = io.Copy(io.Discard, r)
		})
		return over
	}
	other := open(f.network(t, "other"), "application/json")
	before := liveHeap()
	var gone atomic.Int64
	for i := range watches {
		over := open(config, []string{"application/json", "application/vnd.kubernetes.protobuf"}[i%2])
		go func() {
			<-over
			gone.Add(1)
		}()
	}
	time.Sleep(time.Second)
	kept := liveHeap() - before
	t.Logf("%d watches that have sent 700 KiB keep %d MiB; %d of them were ended", watches, kept>>20, gone.Load())
	if kept > 100<<20 {
		t.Errorf("%d watches that have sent 700 KiB each keep %d MiB", watches, kept>>20)
	}
	if gone.Load() == 0 {
		t.Error("no watch has ended")
	}
	if held, limit := f.server.Watches(); held == 0 || held > limit {
		t.Errorf("%d bytes are said to be held of %d", held, limit)
	}
	select {
	case <-other:
		t.Error("the watch of somebody else has ended")
	default:
	}
	// What is small is not counted, however much of it there is.
	small := client(t, config).CoreV1().ConfigMaps("kept")
	for i := range 20 {
		if _, err := small.Create(within(t, time.Minute), configMap(fmt.Sprint("small-", i), map[string]string{"a": strings.Repeat("x", 1000)}), metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
	}
}

// TestOpenWatchesHaveABound has somebody open more watches than there may be: he gets no
// more, and others do.
func TestOpenWatchesHaveABound(t *testing.T) {
	s := newSlowWatches(0)
	request := httptest.NewRequest(http.MethodGet, "/api/v1/pods?watch=1", nil)
	open := func(who string) (*slowWatch, bool) {
		w := &slowWatch{request: request, who: who, began: time.Now()}
		s.mu.Lock()
		defer s.mu.Unlock()
		s.open[w] = struct{}{}
		s.add(w, watchCost)
		for _, e := range s.beyond() {
			delete(s.open, e)
			if e == w {
				return w, false
			}
		}
		return w, true
	}
	most := openFactor * leastWatchBytes / watchCost
	for i := range most + 100 {
		if _, ok := open("many"); ok != (i < most) {
			t.Fatalf("watch %d of %d: %t", i, most, ok)
		}
	}
	for i := range most / 2 {
		if _, ok := open("other"); !ok {
			t.Fatalf("watch %d of somebody else was refused", i)
		}
	}
	if held, limit := s.holds(); held > limit || s.users["many"] != limit/2 || s.users["other"] != limit/2 {
		t.Errorf("%d bytes of %d, of each %v", held, limit, s.users)
	}
	s.mu.Lock()
	for w := range s.open {
		s.add(w, -w.holds)
	}
	s.mu.Unlock()
	if held, _ := s.holds(); held != 0 || len(s.users) != 0 {
		t.Errorf("%d bytes are left, of %v", held, s.users)
	}
}
