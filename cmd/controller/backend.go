package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	"timonel/consensus"
	"timonel/state"
)

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
	if errors.Is(err, consensus.ErrRefused) && !errors.Is(err, state.ErrNoSpace) {
		// Another controller said so, in words.
		return state.Result{}, fmt.Errorf("%w (%w)", state.ErrNoSpace, err)
	}
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
