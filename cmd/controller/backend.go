package main

import (
	"context"
	"fmt"
	"io"
	"time"

	"timonel/consensus"
	"timonel/state"
)

// machine lets Raft drive the store.
type machine struct{ store *state.Store }

func (m machine) ApplyBatch(entries []consensus.Entry) []any {
	batch := make([]state.Entry, len(entries))
	for i, e := range entries {
		batch[i] = state.Entry{Index: e.Index, Term: e.Term, Command: e.Command}
	}
	results := m.store.ApplyBatch(batch)
	out := make([]any, len(results))
	for i, r := range results {
		out[i] = r
	}
	return out
}

func (m machine) Snapshot() (consensus.SnapshotWriter, error) { return m.store.View(), nil }

func (m machine) Restore(r io.Reader) error { return m.store.Restore(r) }

// Fingerprint implements consensus.Fingerprinter.
func (m machine) Fingerprint() (revision int64, hash uint64) {
	v := m.store.View()
	return v.Revision(), v.Hash()
}

// FingerprintAt implements consensus.Fingerprinter.
func (m machine) FingerprintAt(revision int64) (hash uint64, ok bool) {
	return m.store.HashAt(revision)
}

// AwaitFingerprint implements consensus.Fingerprinter.
func (m machine) AwaitFingerprint(ctx context.Context, revision int64) error {
	return m.store.WaitRevision(ctx, revision)
}

// backend is the API server's storage: transactions through Raft, reads from
// this replica's store.
type backend struct {
	store   *state.Store
	replica *consensus.Replica
}

func (b backend) Store() *state.Store { return b.store }

// Commit returns when this replica has applied the transaction.
func (b backend) Commit(ctx context.Context, txn *state.Txn) (state.Result, error) {
	if txn.Time == 0 {
		stamped := *txn
		stamped.Time = time.Now().Unix()
		txn = &stamped
	}
	v, err := b.replica.Apply(ctx, txn.Marshal())
	if err != nil {
		return state.Result{}, err
	}
	result, ok := v.(state.Result)
	if !ok {
		return state.Result{}, fmt.Errorf("the state machine answered %T", v)
	}
	return result, result.Err
}

func (b backend) ReadBarrier(ctx context.Context) error { return b.replica.ReadBarrier(ctx) }
