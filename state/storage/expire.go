package storage

import (
	"context"
	"log/slog"
	"time"

	"timonel/state"
)

const (
	expireEvery = time.Second // how often the clock is compared; times are in seconds
	// One transaction deletes up to expireKeys keys and about expireBytes of them: the
	// log takes it at once, and other writes wait for it for milliseconds.
	expireKeys  = 512
	expireBytes = 256 << 10
)

// Expire deletes keys whose time to live has ended, until ctx ends, whose error
// it returns. It is to be run by the leader alone: another replica's clock does
// not count. Each delete is conditional on the key's revision, so one that was
// renewed stays. It goes on while something is due; nothing is committed while
// nothing expires.
func Expire(ctx context.Context, b Backend, log *slog.Logger) error {
	ticker := time.NewTicker(expireEvery)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case now := <-ticker.C:
			if err := expire(ctx, b, now.Unix()); err != nil && ctx.Err() == nil {
				log.Warn("expired keys could not be deleted, trying again", "err", err)
			}
		}
	}
}

// expire deletes all that has expired at now, in the order of its times.
func expire(ctx context.Context, b Backend, now int64) error {
	for {
		txn := expiry(b.Store().View(), now)
		for len(txn.Changes) > 0 {
			result, err := b.Commit(ctx, txn)
			if err == nil {
				err = result.Err
			}
			if err != nil {
				return err
			}
			if result.Succeeded {
				break
			}
			if !without(txn, result.Failed) {
				break // asks the state again
			}
		}
		if next, ok := b.Store().View().NextExpiry(); !ok || next > now {
			return nil
		}
		if err := ctx.Err(); err != nil {
			return err
		}
	}
}

// expiry is the transaction that deletes the first of what has expired at now.
func expiry(view state.View, now int64) *state.Txn {
	txn := &state.Txn{Time: now}
	bytes := 0
	for kv := range view.Expired(now) {
		txn.Conditions = append(txn.Conditions, state.Condition{Key: kv.Key, ModRevision: kv.ModRevision})
		txn.Changes = append(txn.Changes, state.Change{Key: kv.Key, Delete: true})
		bytes += 2 * len(kv.Key)
		if len(txn.Changes) == expireKeys || bytes >= expireBytes {
			break
		}
	}
	return txn
}

// without takes out of the transaction the keys that have changed since, so that one
// that was renewed does not keep the others. It says whether there were any.
func without(txn *state.Txn, changed []state.KV) bool {
	out := make(map[string]bool, len(changed))
	for i := range changed {
		out[changed[i].Key] = true
	}
	n := 0
	for i := range txn.Changes {
		if !out[txn.Changes[i].Key] {
			txn.Conditions[n], txn.Changes[n] = txn.Conditions[i], txn.Changes[i]
			n++
		}
	}
	had := n < len(txn.Changes)
	txn.Conditions, txn.Changes = txn.Conditions[:n], txn.Changes[:n]
	return had
}
