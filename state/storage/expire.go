package storage

import (
	"context"
	"errors"
	"log/slog"
	"time"

	"golang.org/x/sync/errgroup"

	"timonel/state"
)

const (
	expireEvery   = time.Second // how often the clock is compared; times are in seconds
	expireAtOnce  = 512         // keys looked at in one round
	expireCommits = 32          // commits under way at once, which share log appends
)

// Expire deletes keys whose time to live has ended, until ctx ends, whose error
// it returns. It is to be run by the leader alone: another replica's clock does
// not count. Each delete is conditional on the key's revision, so one that was
// renewed stays. Nothing is committed while nothing expires.
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

// expire deletes what has expired at now.
func expire(ctx context.Context, b Backend, now int64) error {
	view := b.Store().View()
	if next, ok := view.NextExpiry(); !ok || next > now {
		return nil
	}
	keys := view.Expired(now)
	if len(keys) > expireAtOnce {
		keys = keys[:expireAtOnce]
	}
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(expireCommits)
	for _, kv := range keys {
		g.Go(func() error {
			result, err := b.Commit(ctx, &state.Txn{
				Conditions: []state.Condition{{Key: kv.Key, ModRevision: kv.ModRevision}},
				Changes:    []state.Change{{Key: kv.Key, Delete: true}},
				Time:       now,
			})
			return errors.Join(err, result.Err)
		})
	}
	return g.Wait()
}
