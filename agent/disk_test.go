package agent

import (
	"testing"

	"github.com/stretchr/testify/require"

	"timonel/agent/node"
)

func TestImageRoom(t *testing.T) {
	t.Parallel()
	for name, tt := range map[string]struct {
		fs  node.FileSystem
		why string
	}{
		"room":                {node.FileSystem{Capacity: 500 << 30, Available: 2 << 30, Inodes: 1000, InodesFree: 500}, ""},
		"a large disk":        {node.FileSystem{Capacity: 500 << 30, Available: 1<<30 - 1}, "1023 MiB left"},
		"a small one":         {node.FileSystem{Capacity: 10 << 30, Available: 400 << 20}, ""},
		"a small one, full":   {node.FileSystem{Capacity: 10 << 30, Available: 300 << 20}, "300 MiB left"},
		"no inodes":           {node.FileSystem{Capacity: 10 << 30, Available: 9 << 30, Inodes: 1000, InodesFree: 20}, "20 inodes left"},
		"as many as it needs": {node.FileSystem{Capacity: 10 << 30, Available: 9 << 30}, ""},
	} {
		err := checkImageRoom(tt.fs)
		if tt.why == "" {
			require.NoError(t, err, name)
		} else {
			require.ErrorContains(t, err, tt.why, name)
		}
	}
}
