package main

import (
	"runtime"
	"testing"

	"github.com/stretchr/testify/require"
)

func TestReleaseFiles(t *testing.T) {
	_, before := residentMemory()
	require.Positive(t, before)
	require.NoError(t, releaseFiles())
	// Code and constants are read again where they were.
	require.Contains(t, command().Long+command().Short, "controllers")
	require.NoError(t, releaseFiles())
	// Where there is a C library, its own addresses are as they were.
	for range 50 {
		done := make(chan struct{})
		go func() {
			defer close(done)
			runtime.LockOSThread() // and end with it: each time another thread
		}()
		<-done
	}
	resident, anonymous := residentMemory()
	require.Greater(t, resident, anonymous)
}

func TestBusyGC(t *testing.T) {
	for _, tc := range []struct {
		live uint64
		rate float64
		want int
	}{
		{0, 1 << 30, 400}, {50 << 20, 1 << 30, 400}, {128 << 20, 1 << 30, 200}, {1 << 30, 1 << 40, 100}, {64 << 30, 1 << 30, 100},
		{64 << 20, 5 << 20, 31}, {32 << 20, 5 << 20, 62}, {64 << 20, 24 << 20, 150}, {64 << 20, 1 << 20, 25},
		{1 << 30, 5 << 20, 19}, {1 << 30, 10 << 20, 39}, {8 << 30, 10 << 20, 39}, {8 << 30, 100 << 20, 100},
	} {
		require.Equal(t, tc.want, busyGC(tc.live, tc.rate), "%d bytes live, %.0f a second", tc.live, tc.rate)
	}
}

// TestMood goes through a controller's day: nothing is tidied while it works, however long
// and whatever it did before.
func TestMood(t *testing.T) {
	var m mood
	for day := range 3 {
		for range 100 {
			require.Equal(t, works, m.look(busyRate), "day %d", day)
		}
		for look := 1; look <= 4*tidyEvery; look++ {
			want := nothing
			switch {
			case look == quietFor:
				want = comesToRest
			case look > quietFor && look%tidyEvery == 0:
				want = tidies
			}
			require.Equal(t, want, m.look(busyRate-1), "day %d, look %d", day, look)
		}
	}
}
