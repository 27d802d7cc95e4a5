package replica

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"strconv"
	"time"

	"timonel/consensus"
	"timonel/state"
	"timonel/test/history"
)

// Cluster is where clients find replicas.
type Cluster interface {
	Names() []string
	// Replica returns a replica, and a context that ends with it: an answer that
	// comes later was never heard. ok is false while it is down.
	Replica(name string) (r Replica, life context.Context, ok bool)
	// Problem reports what must not be.
	Problem(format string, args ...any)
}

// Client works on one replica at a time.
type Client struct {
	Cluster  Cluster
	Recorder *history.Recorder
	ID       int
	Random   *rand.Rand

	Timeout time.Duration // of an operation
	KeyLife time.Duration // then other keys are used, so that porcupine's parts stay small
	Pause   time.Duration // the longest between two operations
	Reads   bool          // it does nothing but read
	Stays   bool          // as a watcher, it leaves a replica only when its stream ends

	known map[string]int64 // the revision it last saw of a key
}

// Use works until the deadline.
func (c *Client) Use(deadline time.Time) {
	names := c.Cluster.Names()
	begin := time.Now()
	for i := 0; time.Now().Before(deadline); i++ {
		replica, life, ok := c.Cluster.Replica(names[(c.ID+i/20)%len(names)])
		if !ok {
			time.Sleep(50 * time.Millisecond)
			continue
		}
		c.Operate(replica, life, fmt.Sprintf("/k%04d-", int(time.Since(begin)/c.KeyLife)), fmt.Sprintf("%d-%d", c.ID, i))
		time.Sleep(time.Duration(c.Random.Int64N(int64(c.Pause))))
	}
}

// Operate does one operation on a key that begins with epoch, and writes value if
// it writes.
func (c *Client) Operate(r Replica, life context.Context, epoch, value string) {
	ctx, cancel := context.WithTimeout(life, c.Timeout)
	defer cancel()
	key := epoch + strconv.Itoa(c.Random.IntN(3))
	at := c.known[key]
	o := history.Operation{Key: key}
	var do func() history.Outcome
	kinds := 100
	if c.Reads {
		kinds = 45
	}
	switch p := c.Random.IntN(kinds); {
	case p < 35:
		o.Kind = history.Get
		do = func() history.Outcome { return c.get(ctx, r, key) }
	case p < 45:
		o.Kind, o.Key = history.List, epoch
		do = func() history.Outcome { return c.list(ctx, r, epoch, p < 40) }
	case p < 55 && at != 0:
		o.Kind, o.If = history.Delete, at
		do = func() history.Outcome { return c.commit(ctx, r, at, state.Change{Key: key, Delete: true}) }
	case at != 0:
		o.Kind, o.If, o.Value = history.Update, at, value
		do = func() history.Outcome { return c.commit(ctx, r, at, state.Change{Key: key, Value: []byte(value)}) }
	default:
		o.Kind, o.Value = history.Create, value
		do = func() history.Outcome { return c.commit(ctx, r, 0, state.Change{Key: key, Value: []byte(value)}) }
	}
	op := c.Recorder.Begin(c.ID, o)
	outcome := do()
	if life.Err() != nil { // its connection broke: it never heard the answer
		outcome = history.Outcome{Status: history.Unknown}
	}
	c.Recorder.End(op, outcome)
	switch {
	case outcome.Status != history.OK || o.Kind == history.Delete:
		delete(c.known, key)
	case o.Kind != history.List && outcome.Revision != 0:
		if c.known == nil {
			c.known = map[string]int64{}
		}
		c.known[key] = outcome.Revision
	}
}

// commit changes a key if its last change was at a revision, 0 if there is none, as
// the API server's storage does.
func (c *Client) commit(ctx context.Context, r Replica, at int64, change state.Change) history.Outcome {
	result, err := r.Commit(ctx, &state.Txn{
		Conditions: []state.Condition{{Key: change.Key, ModRevision: at}}, Changes: []state.Change{change}, Time: time.Now().Unix(),
	})
	switch {
	case errors.Is(err, consensus.ErrUnknownOutcome): // the log is held to its word: this alone leaves it open
		return history.Outcome{Status: history.Unknown}
	case err != nil:
		return history.Outcome{Status: history.NoEffect}
	case result.Err != nil:
		c.Cluster.Problem("commit: %v", result.Err)
		return history.Outcome{Status: history.Unknown}
	case !result.Succeeded:
		return history.Outcome{Status: history.Refused}
	case change.Delete:
		return history.Outcome{Status: history.OK}
	}
	return history.Outcome{Status: history.OK, Revision: result.Revision}
}

func (c *Client) get(ctx context.Context, r Replica, key string) history.Outcome {
	kv, found, err := r.Get(ctx, key)
	if err != nil {
		return history.Outcome{Status: history.NoEffect}
	}
	return history.Outcome{Status: history.OK, Found: found, Value: string(kv.Value), Revision: kv.ModRevision}
}

// list lists the keys with a prefix, at once or by pages, of which all but the
// first come from another replica at the revision of the first.
func (c *Client) list(ctx context.Context, r Replica, prefix string, paged bool) history.Outcome {
	limit := 0
	if paged {
		limit = 1
	}
	kvs, revision, err := r.List(ctx, prefix, limit)
	if err != nil {
		return history.Outcome{Status: history.NoEffect}
	}
	if paged && len(kvs) == limit {
		names := c.Cluster.Names()
		other, _, ok := c.Cluster.Replica(names[c.Random.IntN(len(names))])
		if !ok {
			return history.Outcome{Status: history.NoEffect}
		}
		rest, err := other.Page(ctx, prefix, kvs[0].Key, revision)
		if err != nil {
			c.tooOld("page", err)
			return history.Outcome{Status: history.NoEffect}
		}
		kvs = append(kvs, rest...)
	}
	out := history.Outcome{Status: history.OK, Revision: revision, Items: map[string]history.Item{}}
	for _, kv := range kvs {
		out.Items[kv.Key] = history.Item{Value: string(kv.Value), Revision: kv.ModRevision}
	}
	return out
}

// tooOld says whether a revision was refused as too old, and reports one that was
// although it is in the window.
func (c *Client) tooOld(what string, err error) bool {
	var e *TooOld
	if !errors.As(err, &e) {
		return false
	}
	if e.Asked >= e.Oldest {
		c.Cluster.Problem("%s: %v", what, err)
	}
	return true
}

// Watch follows the keys that clients use, from a revision on, and resumes on the
// next replica at the last revision it saw, whenever its replica dies and now and
// then. One that falls behind the window lists and begins again, as clients do.
func (c *Client) Watch(ctx context.Context, from int64) {
	names := c.Cluster.Names()
	var record *history.Watch
	last := from
	for i := 0; ctx.Err() == nil; i++ {
		replica, life, ok := c.Cluster.Replica(names[(c.ID+i)%len(names)])
		if !ok {
			time.Sleep(20 * time.Millisecond)
			continue
		}
		if record == nil {
			record = c.Recorder.Watch(fmt.Sprintf("watcher %d/%d", c.ID, i), last)
		}
		stream, cancel := context.WithTimeout(life, time.Duration(100+c.Random.IntN(2000))*time.Millisecond)
		if c.Stays {
			cancel()
			stream, cancel = context.WithCancel(life)
		}
		stop := context.AfterFunc(ctx, cancel)
		closed := c.Recorder.Opened(record, names[(c.ID+i)%len(names)], last)
		err := replica.Follow(stream, "/k", last, func(e state.Event) {
			if life.Err() != nil {
				return
			}
			last = e.KV.ModRevision
			c.Recorder.Saw(record, history.Event{Delete: e.Type == state.Delete, Key: e.KV.Key, Value: string(e.KV.Value), Revision: last})
		})
		closed()
		refused := err != nil && stream.Err() == nil
		stop()
		cancel()
		if c.tooOld("watch", err) {
			record = nil // what it saw so far ends here
			if now, err := replica.Revision(ctx); err == nil {
				last = max(last, now)
			}
		} else if refused {
			time.Sleep(20 * time.Millisecond)
		}
	}
}

// Return reads as of a revision that was the newest not longer ago than promised, and
// watches from it on, on any replica, until the deadline. None of them may have cut the
// history there.
func (c *Client) Return(deadline time.Time, promised time.Duration) {
	names := c.Cluster.Names()
	for time.Now().Before(deadline) {
		time.Sleep(time.Duration(c.Random.Int64N(int64(c.Pause))))
		replica, life, ok := c.Cluster.Replica(names[c.Random.IntN(len(names))])
		if !ok {
			continue
		}
		ctx, cancel := context.WithTimeout(life, c.Timeout)
		began := time.Now() // what is newer came later
		_, revision, err := replica.List(ctx, "/k", 1)
		cancel()
		if err != nil {
			continue
		}
		time.Sleep(time.Duration(c.Random.Int64N(int64(promised))))
		name := names[c.Random.IntN(len(names))]
		replica, life, ok = c.Cluster.Replica(name)
		if !ok {
			continue
		}
		ctx, cancel = context.WithTimeout(life, c.Timeout)
		_, err = replica.Page(ctx, "/k", "", revision)
		c.promise(name, "read at", err, began, promised)
		cancel()
		ctx, cancel = context.WithTimeout(life, 10*time.Millisecond)
		err = replica.Follow(ctx, "/k", revision, func(state.Event) {})
		c.promise(name, "watched from", err, began, promised)
		cancel()
	}
}

// promise reports a refusal of what was promised.
func (c *Client) promise(name, what string, err error, began time.Time, promised time.Duration) {
	var e *TooOld
	if age := time.Since(began); errors.As(err, &e) && age < promised {
		c.Cluster.Problem("%s cannot be %s revision %d, which was the newest %v ago, within the %v promised: %v", name, what, e.Asked, age, promised, err)
	}
}
