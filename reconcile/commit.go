package reconcile

import (
	"context"
	"errors"
	"fmt"
	"runtime/debug"
	"sync"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
)

// pass evaluates one key, makes the changes, and waits until the cache shows them.
func (t *term) pass(ctx context.Context, l *lane, it *item, in Input) *outcome {
	o := &outcome{lane: l, item: it}
	slots := t.slots(l)
	select {
	case slots.evaluate <- struct{}{}:
	case <-ctx.Done():
		return o
	}
	result, err := safely(l.reconciler, in, it.key)
	<-slots.evaluate

	o.next, o.err = result.Next, err
	for _, e := range result.Events {
		t.recorder.record(l.reconciler.Name(), e)
	}
	if len(result.Requests) == 0 {
		return o
	}
	slow, others := slowStart(result.Requests)
	var wg sync.WaitGroup
	wg.Go(func() { t.makeAll(ctx, l, others, o) })
	for n := 1; len(slow) > 0 && ctx.Err() == nil; n *= 2 {
		n = min(n, len(slow))
		if bad := t.makeAll(ctx, l, slow[:n], o); bad {
			break
		}
		slow = slow[n:]
	}
	wg.Wait()
	if ctx.Err() != nil {
		return o
	}

	// What was committed is in this replica's state already. The next pass must see it.
	wait, cancel := context.WithTimeout(ctx, catchUp)
	defer cancel()
	if err := t.cfg.Cache.WaitRevision(wait, t.cfg.Revision()); err != nil && ctx.Err() == nil {
		t.cfg.Log.Warn("the object cache is behind", "reconciler", l.reconciler.Name(), "key", it.key.String(), "err", err)
		o.later = true
	}
	return o
}

// slowStart tells the requests that are made in growing batches from the others.
func slowStart(requests []Request) (slow, others []Request) {
	for _, c := range requests {
		if c.SlowStart {
			slow = append(slow, c)
		} else {
			others = append(others, c)
		}
	}
	return slow, others
}

// makeAll makes requests at the same time and notes in o what became of them. It says
// whether one was refused or not answered.
func (t *term) makeAll(ctx context.Context, l *lane, requests []Request, o *outcome) (bad bool) {
	slots := t.slots(l)
	var wg sync.WaitGroup
	defer wg.Wait()
	for _, c := range requests {
		select {
		case slots.requests <- struct{}{}:
		case <-ctx.Done():
			return bad
		}
		wg.Go(func() {
			defer func() { <-slots.requests }()
			failed, kind := t.commit(ctx, l.reconciler.Name(), c)
			o.mu.Lock()
			defer o.mu.Unlock()
			if failed != nil && kind == Refused {
				o.failed = append(o.failed, *failed)
			}
			o.stale = o.stale || kind == Stale
			o.later = o.later || kind == Unknown
			bad = bad || kind == Refused || kind == Unknown
		})
	}
	wg.Wait()
	return bad
}

// safely calls a reconciler and makes an error of a panic: one object that a
// reconciler cannot deal with must not stop the others, or take down the replica.
func safely(r Reconciler, in Input, key Key) (result Result, err error) {
	defer func() {
		if p := recover(); p != nil {
			result, err = Result{}, fmt.Errorf("panic in %s for %s: %v\n%s", r.Name(), key, p, debug.Stack())
		}
	}()
	return r.Reconcile(in, key)
}

// Answer is what the API made of a change.
type Answer int

const (
	Made    Answer = iota
	Stale          // the object is not what the snapshot showed: look again
	Moot           // it need not be tried again
	Refused        // it is wrong or forbidden
	Unknown        // the API did not say: try later
)

// Classify tells what an error of the API means for the next pass.
func Classify(err error) Answer {
	switch {
	case err == nil:
		return Made
	case apierrors.HasStatusCause(err, corev1.NamespaceTerminatingCause):
		return Moot
	case apierrors.IsConflict(err), apierrors.IsNotFound(err), apierrors.IsAlreadyExists(err), apierrors.IsGone(err):
		return Stale
	case apierrors.IsTimeout(err), apierrors.IsServerTimeout(err), apierrors.IsTooManyRequests(err),
		apierrors.IsServiceUnavailable(err), errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded):
		return Unknown
	}
	var status apierrors.APIStatus
	if !errors.As(err, &status) {
		return Unknown // no answer of the API at all
	}
	return Refused
}

// commit makes one change and those that follow it.
func (t *term) commit(ctx context.Context, component string, c Request) (*Failure, Answer) {
	request, cancel := context.WithTimeout(ctx, t.cfg.RequestTimeout)
	err := t.writer.Write(request, c)
	cancel()
	a := Classify(err)
	switch a {
	case Made:
		if c.Event != nil {
			t.recorder.record(component, *c.Event)
			if c.Event.Object.Kind == NodeKind.Kind { // few, and what is asked for at night
				t.cfg.Log.Info(c.Event.Message, "reconciler", component, "node", c.Event.Object.Name, "reason", c.Event.Reason)
			}
		}
		for _, then := range c.Then {
			if failed, a := t.commit(ctx, component, then); a != Made {
				return failed, a
			}
		}
		return nil, Made
	case Refused:
		t.cfg.Log.Warn("change refused", "reconciler", component, "change", c.String(), "err", err)
		if c.FailEvent != nil {
			e := *c.FailEvent
			e.Message += ": " + err.Error()
			t.recorder.record(component, e)
		}
	case Unknown:
		if ctx.Err() == nil {
			t.cfg.Log.Warn("change not made, will try again", "reconciler", component, "change", c.String(), "err", err)
		}
	default:
		t.cfg.Log.Debug("change not made", "reconciler", component, "change", c.String(), "err", err)
	}
	return &Failure{Request: c, Err: err}, a
}
