package main

import (
	"testing"

	"github.com/stretchr/testify/require"
)

func TestMemoryShares(t *testing.T) {
	for name, tt := range map[string]struct {
		memory, limit string
		want          shares
		err           string
	}{
		"a small machine": {memory: "512Mi", want: shares{memory: 512 << 20, state: 64 << 20, history: 64 << 20, objects: 16 << 20, logCache: 16 << 20, queue: 32 << 20, proposals: 40 << 20, watches: 16 << 20, bodies: 96 << 20, answers: 96 << 20, reports: 16 << 20, usage: 16 << 20, tunnels: 64 << 20, network: 32 << 20, connections: 24 << 20}},
		"a large one":     {memory: "64Gi", want: shares{memory: 64 << 30, state: 8 << 30, history: 1 << 30, objects: 1 << 30, logCache: 128 << 20, queue: 256 << 20, proposals: 160 << 20, watches: 256 << 20, bodies: 4 << 30, answers: 4 << 30, reports: 256 << 20, usage: 256 << 20, tunnels: 1 << 30, network: 256 << 20, connections: 2 << 30}},
		"a limit":         {memory: "4Gi", limit: "64Mi", want: shares{memory: 4 << 30, state: 64 << 20, history: 128 << 20, objects: 64 << 20, logCache: 32 << 20, queue: 64 << 20, proposals: 40 << 20, watches: 32 << 20, bodies: 512 << 20, answers: 512 << 20, reports: 32 << 20, usage: 64 << 20, tunnels: 128 << 20, network: 128 << 20, connections: 128 << 20}},
		"no quantity":     {memory: "much", err: "--memory"},
		"too little":      {memory: "1Mi", err: "--memory"},
		"negative":        {memory: "4Gi", limit: "-1", err: "--state-limit"},
		"beyond memory":   {memory: "4Gi", limit: "5Gi", err: "--state-limit"},
	} {
		t.Run(name, func(t *testing.T) {
			c := config{memory: tt.memory, stateLimit: tt.limit}
			got, err := c.memoryShares()
			if tt.err != "" {
				require.ErrorContains(t, err, tt.err)
				return
			}
			require.NoError(t, err)
			require.Equal(t, tt.want, got)
		})
	}
}
