package main

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"timonel/consensus"
	"timonel/state"
	"timonel/state/storage"
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
	if errors.Is(err, consensus.ErrRefused) { // in the words of the leader's quota, wherever that is
		said := errors.New(strings.TrimPrefix(err.Error(), consensus.ErrRefused.Error()+": "))
		return state.Result{}, &storage.CommitError{Outcome: storage.NoSpace, Err: said}
	}
	if err != nil {
		return state.Result{}, known(err)
	}
	result, ok := v.(state.Result)
	if !ok {
		return state.Result{}, fmt.Errorf("the state machine answered %T", v)
	}
	return result, result.Err
}

func (b backend) ReadBarrier(ctx context.Context) error { return b.replica.ReadBarrier(ctx) }

func (b backend) InTouch() (lost <-chan struct{}, err error) { return b.replica.InTouch() }

// outcomes are the log's in the storage's terms.
var outcomes = map[consensus.WriteOutcome]storage.Outcome{
	consensus.WriteUnknown:  storage.Unknown,
	consensus.WriteNotDone:  storage.NotDone,
	consensus.WriteFenced:   storage.Fenced,
	consensus.WriteTooLarge: storage.TooLarge,
}

// known says of an error of the log what became of the write.
func known(err error) error {
	return &storage.CommitError{Outcome: outcomes[consensus.OutcomeOf(err)], Err: err}
}
