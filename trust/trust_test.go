package trust

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"timonel/state"
)

// replica is a state that applies what is committed to it at once.
type replica struct {
	store *state.Store
	mu    sync.Mutex
	index uint64
	// before, when set, is called before each commit, without the lock.
	before func()
}

func newReplica() *replica { return &replica{store: state.New(state.Options{})} }

func (r *replica) Store() *state.Store               { return r.store }
func (r *replica) ReadBarrier(context.Context) error { return nil }

func (r *replica) Commit(_ context.Context, txn *state.Txn) (state.Result, error) {
	if r.before != nil {
		r.before()
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.index++
	return r.store.ApplyBatch([]state.Entry{{Index: r.index, Term: 1, Command: txn.Marshal()}})[0], nil
}

// clock is a test's time.
type clock struct {
	mu sync.Mutex
	t  time.Time
}

func newClock() *clock { return &clock{t: time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)} }

func (c *clock) now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.t
}

func newRegistry(t *testing.T) (*Registry, *replica, *clock) {
	t.Helper()
	s, c := newReplica(), newClock()
	return New(Config{State: s, Now: c.now, Reserved: func(name string) string {
		if name == "pilot" {
			return "a controller's"
		}
		return ""
	}}), s, c
}

func key(n int) string { return KeyOfInfo(fmt.Appendf(nil, "key %d", n)) }

func newToken(t *testing.T, r *Registry, spec TokenSpec) (Token, string) {
	t.Helper()
	token, secret, err := r.CreateToken(context.Background(), spec)
	require.NoError(t, err)
	return token, secret
}

// refused requires a refusal whose words contain part.
func refused(t *testing.T, err error, part string) {
	t.Helper()
	var r *RefusedError
	require.ErrorAs(t, err, &r)
	require.ErrorContains(t, err, part)
}

func TestOneOfManyThatJoinAtOnceGetsTheName(t *testing.T) {
	t.Parallel()
	r, _, _ := newRegistry(t)
	_, secret := newToken(t, r, TokenSpec{Uses: 3})
	const racers = 16
	errs := make([]error, racers)
	var wait sync.WaitGroup
	for i := range racers {
		wait.Go(func() {
			_, errs[i] = r.Join(context.Background(), Join{Secret: secret, Node: "a1", Key: key(i)})
		})
	}
	wait.Wait()
	won := -1
	for i, err := range errs {
		if err == nil {
			require.Equal(t, -1, won, "two of them won")
			won = i
			continue
		}
		refused(t, err, "bound to another key")
	}
	require.NotEqual(t, -1, won)
	node, found, err := r.Node("a1")
	require.NoError(t, err)
	require.True(t, found)
	require.Equal(t, key(won), node.Key)
	require.Equal(t, 1, r.Tokens()[0].Used, "a use was counted for one that was refused")
	require.NoError(t, r.CheckNode("a1", key(won)))
	refused(t, r.CheckNode("a1", key(won+1)), "another key")
}

func TestUsesAreCountedOnce(t *testing.T) {
	t.Parallel()
	r, _, _ := newRegistry(t)
	_, secret := newToken(t, r, TokenSpec{Uses: 3})
	const nodes = 12
	errs := make([]error, nodes)
	var wait sync.WaitGroup
	for i := range nodes {
		wait.Go(func() {
			_, errs[i] = r.Join(context.Background(), Join{Secret: secret, Node: fmt.Sprintf("a%d", i), Key: key(i)})
		})
	}
	wait.Wait()
	joined := 0
	for i, err := range errs {
		if err == nil {
			joined++
			_, err := r.Join(context.Background(), Join{Secret: secret, Node: fmt.Sprintf("a%d", i), Key: key(i)})
			require.NoError(t, err, "whoever lost the answer asks again")
			continue
		}
		require.ErrorIs(t, err, ErrToken)
	}
	require.Equal(t, 3, joined)
	require.Equal(t, 3, r.Tokens()[0].Used)
}

func TestFollowTellsWhatChanged(t *testing.T) {
	t.Parallel()
	r, _, _ := newRegistry(t)
	_, secret := newToken(t, r, TokenSpec{})
	ctx, cancel := context.WithCancel(context.Background())
	changes := make(chan Changes, 16)
	done := make(chan error, 1)
	go func() { done <- r.Follow(ctx, func(c Changes) { changes <- c }) }()
	require.True(t, (<-changes).Reset)
	_, err := r.Join(ctx, Join{Secret: secret, Node: "a1", Key: key(1)})
	require.NoError(t, err)
	require.Equal(t, []string{"a1"}, (<-changes).Nodes)
	_, err = r.RevokeNode(ctx, "a1", By{User: "admin", Reason: "stolen"})
	require.NoError(t, err)
	c := <-changes
	require.Equal(t, []string{"a1"}, c.Nodes)
	require.Equal(t, []string{key(1)}, c.Revoked)
	cancel()
	require.True(t, errors.Is(<-done, context.Canceled))
}

// A token that is issued when a node has joined again is of after its reset.
func TestTokensOfANodeThatJoinedAgain(t *testing.T) {
	t.Parallel()
	r := New(Config{State: newReplica()})
	_, secret := newToken(t, r, TokenSpec{})
	_, err := r.Join(context.Background(), Join{Secret: secret, Node: "a1", Key: key(1)})
	require.NoError(t, err)
	before := time.Now()
	_, err = r.ResetNode(context.Background(), "a1", By{User: "admin"})
	require.NoError(t, err)
	refused(t, r.CheckNodeToken("a1", before.Truncate(time.Second)), "before it was reset")
	_, err = r.Join(context.Background(), Join{Secret: secret, Node: "a1", Key: key(2)})
	require.NoError(t, err)
	require.NoError(t, r.CheckNodeToken("a1", time.Now().Truncate(time.Second)))
}
