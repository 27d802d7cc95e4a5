package main

import (
	"context"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"timonel/state"
	"timonel/state/objects"
)

func TestReadsThatDoNotFollowAreUnhealthy(t *testing.T) {
	t.Parallel()
	store := state.New(state.Options{})
	k := &controller{store: store, cache: objects.NewCache(store)}
	txn := state.Txn{Changes: []state.Change{{Key: "/registry/other/a", Value: []byte("x")}}}
	require.NoError(t, store.ApplyBatch([]state.Entry{{Index: 1, Term: 1, Command: txn.Marshal()}})[0].Err)
	late, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancel()
	require.ErrorContains(t, k.readsFollow(late), "behind the state", "nobody loads objects")

	ctx, stop := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { defer close(done); _ = k.cache.Run(ctx) }()
	require.NoError(t, k.readsFollow(t.Context()))
	stop()
	<-done
}
