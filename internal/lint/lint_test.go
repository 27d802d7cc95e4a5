package main

import (
	"testing"

	"github.com/stretchr/testify/require"
)

// TestTheTree is what make lint checks.
func TestTheTree(t *testing.T) {
	t.Parallel()
	found, err := check("../..", allowed)
	require.NoError(t, err)
	require.Empty(t, found)
}

// TestPlantedViolations has a tree with one of each.
func TestPlantedViolations(t *testing.T) {
	t.Parallel()
	found, err := check("testdata", []allowance{
		{"agent/bad/bad.go", "os.Stat os.Lchown", "the test's"},
		{"agent/bad/gone.go", "os.Open", ""},
	})
	require.NoError(t, err)
	var got []string
	for _, f := range found {
		got = append(got, f.String())
	}
	require.Equal(t, []string{
		"internal/lint/allow.go: agent/bad/gone.go: say why",
		`agent/bad/bad.go:6: import . "io/ioutil" by path or without a limit`,
		"agent/bad/bad.go:18: os.ReadFile by path or without a limit",
		"agent/bad/bad.go:19: io.ReadAll by path or without a limit",
		"agent/bad/bad.go:20: os.RemoveAll by path or without a limit",
		"agent/bad/bad.go:21: unix.Open by path or without a limit",
		"agent/bad/bad.go:22: filepath.Walk by path or without a limit",
		"agent/bad/bad.go:23: ReadString by path or without a limit",
		"internal/lint/allow.go: nothing needs agent/bad/bad.go os.Lchown any more",
		"internal/lint/allow.go: nothing needs agent/bad/gone.go os.Open any more",
	}, got)
}
