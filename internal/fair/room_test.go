package fair

import (
	"context"
	"errors"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

func TestRoom(t *testing.T) {
	t.Parallel()
	const most = 128
	ctx := t.Context()
	r := New(100, most)
	take := func(who string, n int64) func() {
		t.Helper()
		give, err := r.Take(ctx, who, n)
		if err != nil {
			t.Fatalf("%s: %v", who, err)
		}
		return give
	}
	// waits begins a take that has to wait, and returns when it does.
	waits := func(who string, n int64) <-chan func() {
		t.Helper()
		got := make(chan func(), 1)
		before := r.Stats().Waiting
		go func() {
			give, err := r.Take(ctx, who, n)
			if err != nil {
				t.Error(err)
			}
			got <- give
		}()
		require.Eventually(t, func() bool { return r.Stats().Waiting != before }, 10*time.Second, time.Millisecond, "%s does not wait for %d", who, n)
		return got
	}
	first := take("a", 40)
	more := waits("a", 20) // it would have more than half
	other := take("b", 50) // who has nothing may have more
	first()
	fromA := <-more
	alone := waits("c", 1000) // more than there are: all
	late := waits("a", 5)
	other()
	fromA()
	// The source that has least is first, and what gets free is kept for it.
	(<-alone)()
	(<-late)()
	require.Equal(t, Stats{}, r.Stats())

	// Who does not want to wait does not.
	if give, ok := r.TryTake("a", 90); !ok {
		t.Error("there is room")
	} else {
		if _, ok := r.TryTake("b", 20); ok {
			t.Error("there is no room")
		}
		give()
	}
	require.Equal(t, Stats{}, r.Stats())

	// There is a bound of those who wait, and who gives up is forgotten.
	all := take("a", 100)
	short, cancel := context.WithCancel(ctx)
	var wg sync.WaitGroup
	for range most / 4 {
		wg.Go(func() {
			if _, err := r.Take(short, "b", 1); !errors.Is(err, context.Canceled) {
				t.Error(err)
			}
		})
	}
	require.Eventually(t, func() bool { return r.Stats().Waiting == most/4 }, 10*time.Second, time.Millisecond)
	if _, err := r.Take(short, "b", 1); !errors.Is(err, ErrNoRoom) {
		t.Errorf("one more: %v", err)
	}
	cancel()
	wg.Wait()
	all()
	require.Equal(t, Stats{Refused: most/4 + 1}, r.Stats())
}
