package storage

import (
	"context"
	"fmt"
	"strings"
	"sync/atomic"
	"testing"

	"timonel/state"
	"timonel/state/storage/storagetest"
)

// countingBackend counts commits and lets a test act before each.
type countingBackend struct {
	*storagetest.LocalBackend
	commits atomic.Int64
	before  func(commit int64, txn *state.Txn)
}

func (b *countingBackend) Commit(ctx context.Context, txn *state.Txn) (state.Result, error) {
	n := b.commits.Add(1)
	if b.before != nil {
		b.before(n, txn)
	}
	return b.LocalBackend.Commit(ctx, txn)
}

// put writes keys that expire, past the count of commits.
func (b *countingBackend) put(t *testing.T, at int64, keys ...string) {
	t.Helper()
	txn := &state.Txn{}
	for _, key := range keys {
		txn.Changes = append(txn.Changes, state.Change{Key: key, Value: []byte("v"), ExpiresAt: at})
	}
	if _, err := b.LocalBackend.Commit(context.Background(), txn); err != nil {
		t.Fatal(err)
	}
}

func (b *countingBackend) has(key string) bool {
	_, ok := b.Store().View().Get(key)
	return ok
}

func eventKeys(from, to int) (keys []string) {
	for i := from; i < to; i++ {
		keys = append(keys, fmt.Sprintf("/registry/events/ns/e%06d", i))
	}
	return keys
}

// One look deletes all that is due, whatever it is, in few commits.
func TestExpireAll(t *testing.T) {
	t.Parallel()
	const due = 20_000
	b := &countingBackend{LocalBackend: storagetest.NewLocalBackend(state.Options{})}
	b.put(t, 100, eventKeys(0, due)...)
	b.put(t, 101, "/registry/events/ns/later")
	b.put(t, 0, "/registry/pods/ns/stays")
	if err := expire(t.Context(), b, 99); err != nil || b.commits.Load() != 0 {
		t.Fatalf("%d commits while nothing expired, %v", b.commits.Load(), err)
	}
	if err := expire(t.Context(), b, 100); err != nil {
		t.Fatal(err)
	}
	if n := b.Store().View().Len(); n != 2 || !b.has("/registry/events/ns/later") || !b.has("/registry/pods/ns/stays") {
		t.Errorf("%d keys are left, want the one that is not due and the one that never is", n)
	}
	if n := b.commits.Load(); n > due/expireKeys+1 {
		t.Errorf("%d keys took %d commits", due, n)
	}
	commits := b.commits.Load()
	if err := expire(t.Context(), b, 100); err != nil || b.commits.Load() != commits {
		t.Errorf("%d commits while nothing was left to expire, %v", b.commits.Load()-commits, err)
	}
}

// Keys that are renewed or deleted between the look and the commit do not keep the
// others, and the renewed ones stay.
func TestExpireRenewed(t *testing.T) {
	t.Parallel()
	b := &countingBackend{LocalBackend: storagetest.NewLocalBackend(state.Options{})}
	keys := eventKeys(0, 2000)
	b.put(t, 100, keys...)
	var renewed []string
	b.before = func(_ int64, txn *state.Txn) {
		if len(renewed) >= 30 || len(txn.Changes) < 3 {
			return
		}
		first, last := txn.Changes[0].Key, txn.Changes[len(txn.Changes)-1].Key
		b.put(t, 200, first)
		renewed = append(renewed, first)
		if _, err := b.LocalBackend.Commit(context.Background(), &state.Txn{Changes: []state.Change{{Key: last, Delete: true}}}); err != nil {
			t.Error(err)
		}
	}
	if err := expire(t.Context(), b, 100); err != nil {
		t.Fatal(err)
	}
	if n := b.Store().View().Len(); n != len(renewed) {
		t.Errorf("%d keys are left, want the %d that were renewed", n, len(renewed))
	}
	for _, key := range renewed {
		if !b.has(key) {
			t.Errorf("%s was renewed and is gone", key)
		}
	}
	if n := int(b.commits.Load()); len(renewed) != 30 || n > len(keys)/expireKeys+len(renewed)+2 {
		t.Errorf("%d commits for %d keys, of which %d were renewed", n, len(keys), len(renewed))
	}
}

// A transaction is bounded by what its keys take too.
func TestExpireLongKeys(t *testing.T) {
	t.Parallel()
	for _, size := range []int{20, 1000, 100_000, 1 << 20} {
		b := &countingBackend{LocalBackend: storagetest.NewLocalBackend(state.Options{})}
		for i := range 30 {
			b.put(t, 100, fmt.Sprintf("/%06d%s", i, strings.Repeat("x", size)))
		}
		b.before = func(_ int64, txn *state.Txn) {
			if n := len(txn.Marshal()); n > expireBytes+2*size+4096 {
				t.Errorf("with keys of %d bytes, a transaction has %d", size, n)
			}
		}
		if err := expire(t.Context(), b, 100); err != nil || b.Store().View().Len() != 0 {
			t.Errorf("with keys of %d bytes, %d are left, %v", size, b.Store().View().Len(), err)
		}
	}
}

// An error ends the round: the next is a second later.
func TestExpireError(t *testing.T) {
	t.Parallel()
	b := &countingBackend{LocalBackend: storagetest.NewLocalBackend(state.Options{})}
	b.put(t, 100, eventKeys(0, 3*expireKeys)...)
	ctx, cancel := context.WithCancel(t.Context())
	b.before = func(commit int64, _ *state.Txn) {
		if commit == 2 {
			cancel()
		}
	}
	if err := expire(ctx, b, 100); err == nil || b.commits.Load() != 2 {
		t.Errorf("%d commits, error %v, want an error at the second", b.commits.Load(), err)
	}
}
