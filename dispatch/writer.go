package dispatch

import (
	"context"
	"errors"
	"log/slog"
	"math/rand/v2"
	"net/http"
	"sync"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
)

const (
	writersPerSession = 8
	firstBackoff      = 50 * time.Millisecond
	lastBackoff       = 2 * time.Second
	// settleTime is for how long a refusal may be due to a server that has not
	// heard yet that a pod belongs to this node.
	settleTime = 15 * time.Second
	// waitingMax bounds what waits to be written of one agent, events aside: two
	// entries per pod of a node with many pods.
	waitingMax = 8192
)

// write is one thing to write through the API. It is called again, after a
// while, for as long as it fails with an error that may pass. It reads what it
// writes at the time it runs, so a second one for the same key is not needed
// while it waits.
type write func(ctx context.Context) error

// writer runs writes, those of different keys at once, those of one key in turn.
type writer struct {
	log *slog.Logger

	mu      sync.Mutex
	waiting map[string]write
	order   []string
	busy    map[string]bool
	ready   chan struct{} // capacity writersPerSession: wakes idle workers
}

func newWriter(log *slog.Logger) *writer {
	return &writer{log: log, waiting: make(map[string]write), busy: make(map[string]bool), ready: make(chan struct{}, writersPerSession)}
}

// add queues a write. One that waits under the same key is replaced.
func (w *writer) add(key string, do write) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if _, ok := w.waiting[key]; !ok {
		if len(w.waiting) >= waitingMax {
			w.log.Error("too many writes of one node wait; one is dropped until the agent reconnects", "key", key)
			return
		}
		if !w.busy[key] {
			w.order = append(w.order, key)
			notify(w.ready)
		}
	}
	w.waiting[key] = do
}

// run works until ctx ends. What waits then is dropped: the agent says it again
// to the next controller.
func (w *writer) run(ctx context.Context) {
	var workers sync.WaitGroup
	for range writersPerSession {
		workers.Go(func() {
			for {
				key, do, ok := w.next()
				if !ok {
					select {
					case <-ctx.Done():
						return
					case <-w.ready:
						continue
					}
				}
				w.retry(ctx, key, do)
				w.finish(key)
				if ctx.Err() != nil {
					return
				}
			}
		})
	}
	workers.Wait()
}

func (w *writer) next() (string, write, bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if len(w.order) == 0 {
		return "", nil, false
	}
	key := w.order[0]
	w.order = w.order[1:]
	if len(w.order) > 0 {
		notify(w.ready)
	}
	do := w.waiting[key]
	delete(w.waiting, key)
	w.busy[key] = true
	return key, do, true
}

// newer takes a write that was queued under key meanwhile.
func (w *writer) newer(key string, do write) write {
	w.mu.Lock()
	defer w.mu.Unlock()
	if next, ok := w.waiting[key]; ok {
		delete(w.waiting, key)
		return next
	}
	return do
}

func (w *writer) finish(key string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	delete(w.busy, key)
	if _, ok := w.waiting[key]; ok {
		w.order = append(w.order, key)
		notify(w.ready)
	}
}

// retry calls do, or a newer write of the same key, until it succeeds, fails for
// good, or ctx ends.
func (w *writer) retry(ctx context.Context, key string, do write) {
	start, backoff := time.Now(), firstBackoff
	for {
		err := do(ctx)
		if err == nil || ctx.Err() != nil {
			return
		}
		pause := backoff/2 + rand.N(backoff)
		if apierrors.IsConflict(err) {
			pause = rand.N(firstBackoff) // it reads the object anew
		} else if !mayPass(err, time.Since(start)) {
			w.log.Error("a report of the agent could not be written", "what", key, "err", err)
			return
		} else {
			w.log.Debug("a report of the agent is written later", "what", key, "in", pause, "err", err)
		}
		backoff = min(2*backoff, lastBackoff)
		timer := time.NewTimer(pause)
		select {
		case <-ctx.Done():
			timer.Stop()
			return
		case <-timer.C:
		}
		do = w.newer(key, do)
	}
}

// mayPass reports whether an error may be gone when the write is tried again.
func mayPass(err error, since time.Duration) bool {
	var answer apierrors.APIStatus
	if !errors.As(err, &answer) {
		return true // no answer at all
	}
	if apierrors.IsForbidden(err) || apierrors.IsUnauthorized(err) {
		return since < settleTime
	}
	switch code := answer.Status().Code; {
	case code == http.StatusTooManyRequests, code >= 500, code == http.StatusRequestTimeout:
		return true
	case code == http.StatusConflict:
		return true
	}
	return false
}
