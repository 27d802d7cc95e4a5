package storage

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"sync"
	"testing"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	apiwatch "k8s.io/apimachinery/pkg/watch"
	"k8s.io/apiserver/pkg/apis/example"
	"k8s.io/apiserver/pkg/storage"

	"timonel/state"
)

// cutOff is a backend that can lose touch with the cluster.
type cutOff struct {
	Backend
	mu   sync.Mutex
	lost chan struct{}
	err  error
}

func (c *cutOff) InTouch() (<-chan struct{}, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.lost, c.err
}

func (c *cutOff) lose() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.err = errors.New("controller c1 is out of touch with the cluster")
	close(c.lost)
}

func TestOutOfTouchNothingIsServed(t *testing.T) {
	t.Parallel()
	_, s, _ := setup(t)
	backend := &cutOff{Backend: s.backend, lost: make(chan struct{})}
	s.backend = backend
	pod := create(t, s, "a")
	everything := storage.ListOptions{ResourceVersion: pod.ResourceVersion, Recursive: true, Predicate: storage.Everything}
	watch := func(ctx context.Context) (apiwatch.Interface, error) { return s.Watch(ctx, "/pods/ns/", everything) }
	open, err := watch(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	own, err := watch(WithOwn(t.Context()))
	if err != nil {
		t.Fatal(err)
	}
	defer own.Stop()
	label(t, s, "a", "1")
	if e := <-open.ResultChan(); e.Type != apiwatch.Modified {
		t.Fatalf("got %v", e)
	}
	backend.lose()
	select {
	case e, ok := <-open.ResultChan():
		if ok {
			t.Errorf("the watch ends with %v: clients would list all again", e)
		}
	case <-time.After(20 * time.Second):
		t.Error("the watch stays")
	}
	if _, err := watch(t.Context()); !apierrors.IsTooManyRequests(err) {
		t.Errorf("a new watch: %v, want 429, which makes clients try again from where they were", err)
	}

	unavailable := func(what string, err error) {
		if seconds, ok := apierrors.SuggestsClientDelay(err); !apierrors.IsServiceUnavailable(err) || !ok || seconds != 1 {
			t.Errorf("%s: %v, want 503 with Retry-After", what, err)
		}
	}
	for _, version := range []string{"", "0", pod.ResourceVersion} {
		unavailable("get at "+version, s.Get(t.Context(), "/pods/ns/a", storage.GetOptions{ResourceVersion: version}, &example.Pod{}))
		unavailable("list at "+version, s.GetList(t.Context(), "/pods/ns/", storage.ListOptions{ResourceVersion: version, Recursive: true, Predicate: storage.Everything}, &example.PodList{}))
	}
	exact := everything
	exact.ResourceVersionMatch = "Exact"
	unavailable("list exactly", s.GetList(t.Context(), "/pods/ns/", exact, &example.PodList{}))
	unavailable("create", s.Create(t.Context(), "/pods/ns/b", newPod("b"), nil, 0))

	// The replica's own caches go on with it.
	if err := s.Get(WithOwn(t.Context()), "/pods/ns/a", storage.GetOptions{ResourceVersion: "0"}, &example.Pod{}); err != nil {
		t.Error(err)
	}
	if e := <-own.ResultChan(); e.Type != apiwatch.Modified {
		t.Errorf("got %v", e)
	}
}

// refusing is a backend whose commits fail.
type refusing struct {
	Backend
	err     error
	commits int
}

func (f *refusing) Commit(context.Context, *state.Txn) (state.Result, error) {
	f.commits++
	return state.Result{}, f.err
}

func TestOutcomesAreToldApart(t *testing.T) {
	t.Parallel()
	cause := errors.New("of the log")
	for name, test := range map[string]struct {
		err    error
		code   int32
		repeat bool
	}{
		"not done":                   {&CommitError{NotDone, cause}, http.StatusServiceUnavailable, true},
		"not done before a deadline": {&CommitError{NotDone, context.DeadlineExceeded}, http.StatusServiceUnavailable, true},
		"unknown":                    {&CommitError{Unknown, cause}, http.StatusGatewayTimeout, false},
		"an error of no type":        {cause, http.StatusGatewayTimeout, false},
		"a deadline":                 {fmt.Errorf("wait: %w", context.DeadlineExceeded), http.StatusGatewayTimeout, false},
		"too large":                  {&CommitError{TooLarge, cause}, http.StatusRequestEntityTooLarge, false},
		"no space":                   {&CommitError{NoSpace, cause}, http.StatusInsufficientStorage, false},
		"fenced":                     {fmt.Errorf("commit: %w", &CommitError{Fenced, cause}), http.StatusServiceUnavailable, false},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			_, s, _ := setup(t)
			backend := &refusing{Backend: s.backend, err: test.err}
			s.backend = backend
			err := s.Create(t.Context(), "/pods/ns/b", newPod("b"), nil, 0)
			var status apierrors.APIStatus
			if !errors.As(err, &status) || status.Status().Code != test.code {
				t.Fatalf("got %v, want %d", err, test.code)
			}
			if repeat := status.Status().Details.RetryAfterSeconds > 0; repeat != test.repeat {
				t.Errorf("repeated: %v, want %v", repeat, test.repeat)
			}
			if backend.commits != 1 {
				t.Errorf("%d commits", backend.commits)
			}
		})
	}
}
