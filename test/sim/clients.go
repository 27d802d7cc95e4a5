package sim

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"strconv"
	"strings"
	"time"

	"timonel/consensus"
	"timonel/state"
	"timonel/test/history"
)

const (
	perOperation = 2 * time.Second
	keyLife      = 1500 * time.Millisecond // then others are used, so that porcupine's parts stay small
)

// client works on one replica at a time.
type client struct {
	c      *cluster
	id     int
	random *rand.Rand
	known  map[string]int64 // the revision it last saw of a key
}

// use works until the deadline.
func (k *client) use(deadline time.Time) {
	begin := time.Now()
	for i := 0; time.Now().Before(deadline); i++ {
		name := k.c.names[(k.id+i/20)%len(k.c.names)]
		l := k.c.alive(name)
		if l == nil {
			time.Sleep(50 * time.Millisecond)
			continue
		}
		epoch := fmt.Sprintf("/k%03d-", int(time.Since(begin)/keyLife))
		k.operate(l, epoch, fmt.Sprintf("%d-%d", k.id, i))
		time.Sleep(time.Duration(k.random.IntN(60)) * time.Millisecond)
	}
}

func (k *client) operate(l *life, epoch, value string) {
	ctx, cancel := context.WithTimeout(l.ctx, perOperation)
	defer cancel()
	key := epoch + strconv.Itoa(k.random.IntN(3))
	o := history.Operation{Key: key}
	var do func() history.Outcome
	switch p := k.random.IntN(100); {
	case p < 35:
		o.Kind = history.Get
		do = func() history.Outcome { return k.get(ctx, l, key) }
	case p < 45:
		o.Kind, o.Key = history.List, epoch
		do = func() history.Outcome { return k.list(ctx, l, epoch, p < 40) }
	case p < 55 && k.known[key] != 0:
		o.Kind, o.If = history.Delete, k.known[key]
		do = func() history.Outcome {
			return k.commit(ctx, l, state.Condition{Key: key, ModRevision: o.If}, state.Change{Key: key, Delete: true})
		}
	case k.known[key] != 0:
		o.Kind, o.If, o.Value = history.Update, k.known[key], value
		do = func() history.Outcome {
			return k.commit(ctx, l, state.Condition{Key: key, ModRevision: o.If}, state.Change{Key: key, Value: []byte(value)})
		}
	default:
		o.Kind, o.Value = history.Create, value
		do = func() history.Outcome {
			return k.commit(ctx, l, state.Condition{Key: key}, state.Change{Key: key, Value: []byte(value)})
		}
	}
	op := k.c.recorder.Begin(k.id, o)
	outcome := do()
	if l.ctx.Err() != nil { // its connection broke: it never heard the answer
		outcome = history.Outcome{Status: history.Unknown}
	}
	k.c.recorder.End(op, outcome)
	switch {
	case outcome.Status != history.OK || o.Kind == history.Delete:
		delete(k.known, key)
	case o.Kind != history.List && outcome.Revision != 0:
		k.known[key] = outcome.Revision
	}
}

// commit does a conditional change as the API server's storage does.
func (k *client) commit(ctx context.Context, l *life, condition state.Condition, change state.Change) history.Outcome {
	txn := state.Txn{Conditions: []state.Condition{condition}, Changes: []state.Change{change}, Time: time.Now().Unix()}
	v, err := l.replica.Apply(ctx, txn.Marshal())
	if err != nil {
		return outcomeOf(err)
	}
	result := v.(state.Result)
	switch {
	case result.Err != nil:
		k.c.problem("commit: %v", result.Err)
		return history.Outcome{Status: history.Unknown}
	case !result.Succeeded:
		return history.Outcome{Status: history.Refused}
	case change.Delete:
		return history.Outcome{Status: history.OK}
	}
	return history.Outcome{Status: history.OK, Revision: result.Revision}
}

// outcomeOf holds the log to its word: only ErrUnknownOutcome leaves it open.
func outcomeOf(err error) history.Outcome {
	if errors.Is(err, consensus.ErrUnknownOutcome) {
		return history.Outcome{Status: history.Unknown}
	}
	return history.Outcome{Status: history.NoEffect}
}

func (k *client) get(ctx context.Context, l *life, key string) history.Outcome {
	if err := l.replica.ReadBarrier(ctx); err != nil {
		return history.Outcome{Status: history.NoEffect}
	}
	kv, found := l.store.View().Get(key)
	return history.Outcome{Status: history.OK, Found: found, Value: string(kv.Value), Revision: kv.ModRevision}
}

// list lists the keys with a prefix, at once or by pages, of which all but the
// first come from another replica at the revision of the first.
func (k *client) list(ctx context.Context, l *life, prefix string, paged bool) history.Outcome {
	if err := l.replica.ReadBarrier(ctx); err != nil {
		return history.Outcome{Status: history.NoEffect}
	}
	view := l.store.View()
	out := history.Outcome{Status: history.OK, Revision: view.Revision(), Items: map[string]history.Item{}}
	for kv := range view.Range(prefix, "") {
		out.Items[kv.Key] = history.Item{Value: string(kv.Value), Revision: kv.ModRevision}
		if !paged {
			continue
		}
		other := k.c.alive(k.c.names[k.random.IntN(len(k.c.names))])
		if other == nil || other.store.WaitRevision(ctx, out.Revision) != nil {
			return history.Outcome{Status: history.NoEffect}
		}
		past, err := other.store.At(out.Revision)
		if err != nil {
			if errors.Is(err, state.ErrCompacted) && out.Revision >= other.store.CompactRevision() {
				k.c.problem("page at revision %d refused as too old, the window begins at %d: %v", out.Revision, other.store.CompactRevision(), err)
			}
			return history.Outcome{Status: history.NoEffect}
		}
		for kv := range past.Range(prefix, kv.Key+"\x00") {
			out.Items[kv.Key] = history.Item{Value: string(kv.Value), Revision: kv.ModRevision}
		}
		break
	}
	return out
}

// watch follows the keys, and resumes on the next replica at the last revision
// it saw, whenever its replica dies and now and then. One that falls behind the
// window lists and begins again, as clients do.
func (k *client) watch(ctx context.Context) {
	var record *history.Watch
	var last int64
	for i := 0; ctx.Err() == nil; i++ {
		l := k.c.alive(k.c.names[(k.id+i)%len(k.c.names)])
		if l == nil {
			time.Sleep(20 * time.Millisecond)
			continue
		}
		stream, cancel := context.WithTimeout(l.ctx, time.Duration(100+k.random.IntN(2000))*time.Millisecond)
		stop := context.AfterFunc(ctx, cancel)
		if record == nil {
			last = 1
			record = k.c.recorder.Watch(fmt.Sprintf("watcher %d/%d", k.id, i), last)
		}
		err := k.follow(stream, l, record, &last)
		stop()
		cancel()
		if !errors.Is(err, state.ErrCompacted) {
			continue
		}
		compact := l.store.CompactRevision()
		if last >= compact {
			k.c.problem("watcher at revision %d refused as too old, the window begins at %d", last, compact)
		}
		last = l.store.View().Revision() // what it saw so far ends here: list, and begin again
		record = k.c.recorder.Watch(fmt.Sprintf("watcher %d/%d", k.id, i), last)
	}
}

func (k *client) follow(ctx context.Context, l *life, record *history.Watch, last *int64) error {
	// A replica that is behind what the watcher saw comes to it first.
	if err := l.store.WaitRevision(ctx, *last); err != nil {
		return err
	}
	w, err := l.store.Watch("/k", *last)
	if err != nil {
		return err
	}
	defer w.Close()
	for {
		events, err := w.Next(ctx)
		if l.ctx.Err() != nil || err != nil {
			return err
		}
		for _, e := range events {
			*last = e.KV.ModRevision
			k.c.recorder.Saw(record, history.Event{Delete: e.Type == state.Delete, Key: e.KV.Key, Value: strings.Clone(string(e.KV.Value)), Revision: e.KV.ModRevision})
		}
	}
}
