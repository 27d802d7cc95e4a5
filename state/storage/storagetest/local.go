// Package storagetest has a Backend for tests and trials: one replica in memory,
// with no log.
package storagetest

import (
	"context"
	"sync"

	"timonel/state"
)

// LocalBackend applies each transaction at once to a state of its own. It
// implements storage.Backend.
type LocalBackend struct {
	store *state.Store

	mu    sync.Mutex
	index uint64
}

// NewLocalBackend returns a backend with an empty state.
func NewLocalBackend(o state.Options) *LocalBackend {
	return &LocalBackend{store: state.New(o)}
}

// Commit applies the transaction, through its encoding as a log would.
func (b *LocalBackend) Commit(ctx context.Context, txn *state.Txn) (state.Result, error) {
	if err := ctx.Err(); err != nil {
		return state.Result{}, err
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.index++
	result := b.store.ApplyBatch([]state.Entry{{Index: b.index, Term: 1, Command: txn.Marshal()}})[0]
	return result, result.Err
}

// ReadBarrier returns at once: everything committed is applied.
func (b *LocalBackend) ReadBarrier(ctx context.Context) error { return ctx.Err() }

// InTouch returns a channel that is never closed.
func (b *LocalBackend) InTouch() (lost <-chan struct{}, err error) { return nil, nil }

// Store is the state.
func (b *LocalBackend) Store() *state.Store { return b.store }
