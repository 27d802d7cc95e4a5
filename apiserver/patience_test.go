package apiserver

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	genericapiserver "k8s.io/apiserver/pkg/server"

	"timonel/state"
	"timonel/state/storage"
	"timonel/state/storage/storagetest"
)

// flakyHook fails a number of times.
type flakyHook struct{ failures, calls int }

func (f *flakyHook) PostStartHook() (string, genericapiserver.PostStartHookFunc, error) {
	return "flaky", func(genericapiserver.PostStartHookContext) error {
		if f.calls++; f.calls <= f.failures {
			return errors.New("not yet")
		}
		return nil
	}, nil
}

func TestHooksArePatient(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		quorum := time.Now().Add(time.Hour) // longer than any patience of upstream's
		barrier := func(context.Context) error {
			if time.Now().Before(quorum) {
				return errors.New("no leader")
			}
			return nil
		}
		hook := &flakyHook{failures: 3}
		_, run, err := patient{hook: hook, barrier: barrier}.PostStartHook()
		if err != nil {
			t.Fatal(err)
		}
		if err := run(genericapiserver.PostStartHookContext{Context: t.Context()}); err != nil {
			t.Error(err)
		}
		if hook.calls != 4 || time.Now().Before(quorum) {
			t.Errorf("%d calls at %s, want 4 after %s", hook.calls, time.Now(), quorum)
		}
	})
}

// lonely is a backend that finds no leader at first.
type lonely struct {
	*storagetest.LocalBackend
	found time.Time
}

func (l lonely) Commit(ctx context.Context, txn *state.Txn) (state.Result, error) {
	if time.Now().Before(l.found) {
		return state.Result{}, &storage.CommitError{Outcome: storage.NotDone, Err: errors.New("no leader")}
	}
	return l.LocalBackend.Commit(ctx, txn)
}

func (l lonely) ReadBarrier(ctx context.Context) error {
	if time.Now().Before(l.found) {
		return errors.New("no leader")
	}
	return l.LocalBackend.ReadBarrier(ctx)
}

func TestIsReadySoonAfterThereIsALeader(t *testing.T) {
	alone := 6 * time.Second
	backend := lonely{storagetest.NewLocalBackend(state.Options{}), time.Now().Add(alone)}
	f, err := startFixture(backend.LocalBackend, nil, func(c *Config) { c.Backend = backend })
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := f.stop(); err != nil {
			t.Error(err)
		}
	})
	if late := time.Since(backend.found); late > 6*time.Second {
		t.Errorf("ready %s after there was a leader", late)
	} else {
		t.Logf("ready %s after there was a leader", late)
	}
}

func TestTasksRunWhileLeading(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var leading atomic.Bool
		var running, started atomic.Int32
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan struct{})
		go func() {
			defer close(done)
			whileLeading(ctx, leading.Load, func(stop chan struct{}) {
				started.Add(1)
				running.Add(1)
				<-stop
				running.Add(-1)
			})
		}()
		for i, lead := range []bool{false, true, true, false, true} {
			leading.Store(lead)
			time.Sleep(2 * hookRetry)
			want := int32(0)
			if lead {
				want = 1
			}
			if got := running.Load(); got != want {
				t.Errorf("step %d: %d tasks run, want %d", i, got, want)
			}
		}
		cancel()
		<-done
		if running.Load() != 0 || started.Load() != 2 {
			t.Errorf("%d tasks run after the end, %d started, want 0 and 2", running.Load(), started.Load())
		}
	})
}

func TestHealthChecks(t *testing.T) {
	f := shareServer(t)
	c := client(t, f.anonymous())
	set := func(name string, err error) { health[name].Store(&err) }
	defer set("raft", nil)
	defer set("disk", nil)
	for _, test := range []struct {
		failing       string
		readyz, livez int
	}{
		{"", http.StatusOK, http.StatusOK},
		{"raft", http.StatusInternalServerError, http.StatusOK},
		{"disk", http.StatusInternalServerError, http.StatusInternalServerError},
	} {
		t.Run(fmt.Sprintf("failing %q", test.failing), func(t *testing.T) {
			if test.failing != "" {
				set(test.failing, errors.New("broken"))
				defer set(test.failing, nil)
			}
			for path, want := range map[string]int{"/readyz": test.readyz, "/livez": test.livez} {
				var code int
				c.RESTClient().Get().AbsPath(path).Do(within(t, 5*time.Second)).StatusCode(&code)
				if code != want {
					t.Errorf("%s: %d, want %d", path, code, want)
				}
			}
		})
	}
}
