package main

import (
	"testing"

	"github.com/stretchr/testify/require"
)

func TestReleaseProgram(t *testing.T) {
	_, before := residentMemory()
	require.Positive(t, before)
	require.NoError(t, releaseProgram())
	// Code and constants are read again where they were.
	require.Contains(t, command().Long+command().Short, "controllers")
	require.NoError(t, releaseProgram())
	resident, anonymous := residentMemory()
	require.Greater(t, resident, anonymous)
}

func TestBusyGC(t *testing.T) {
	for live, want := range map[uint64]int{0: 400, 50 << 20: 400, 128 << 20: 200, 1 << 30: 100, 64 << 30: 100} {
		require.Equal(t, want, busyGC(live), "%d bytes", live)
	}
}
