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
