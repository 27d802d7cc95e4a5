package pod

import (
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

func TestRestartDelay(t *testing.T) {
	t.Parallel()
	b := waits{}
	prev := &container{started: time.Unix(0, 0), finished: time.Unix(5, 0)}
	var got []time.Duration
	for range 8 {
		got = append(got, b.restartDelay("app", prev))
		b.restarted("app", prev)
	}
	s := time.Second
	require.Equal(t, []time.Duration{0, 10 * s, 20 * s, 40 * s, 80 * s, 160 * s, 300 * s, 300 * s}, got)
	long := &container{started: time.Unix(0, 0), finished: time.Unix(601, 0)}
	require.Zero(t, b.restartDelay("app", long), "ten minutes without a crash are forgiven")
	b.restarted("app", long)
	require.Equal(t, 10*s, b.restartDelay("app", prev), "and it begins anew")
	record := &container{restarts: 3, finished: time.Unix(5, 0), started: time.Unix(1, 0)}
	require.Equal(t, 40*s, waits{}.restartDelay("app", record), "a new agent goes on from the record")
	b = waits{}
	b.forgive("app")
	require.Zero(t, b.restartDelay("app", record), "it did not fail")
}

func TestPutOff(t *testing.T) {
	t.Parallel()
	b, now := waits{}, time.Unix(1000, 0)
	var got []time.Duration
	for range 7 {
		got = append(got, b.putOff(waitVolumes, failing, waiting{"r", "m"}, now).Sub(now))
	}
	s := time.Second
	require.Equal(t, []time.Duration{s, 2 * s, 4 * s, 8 * s, 16 * s, 30 * s, 30 * s}, got)
	e, put := b.held(waitVolumes, now.Add(29*s))
	require.True(t, put)
	require.Equal(t, waiting{"r", "m"}, e.why)
	_, put = b.held(waitVolumes, now.Add(30*s))
	require.False(t, put, "it is due")
	_, put = b.held(waitSandbox, now)
	require.False(t, put)

	for _, what := range []waitFor{waitStart("app"), waitStop("s0"), waitClean, waitSweep} {
		b.putOff(what, failing, waiting{}, now)
	}
	b.restarted("app", &container{})
	b.hurry()
	var left []waitFor
	for _, what := range []waitFor{waitVolumes, waitStart("app"), waitStop("s0"), waitClean, waitSweep, waitRestart("app")} {
		if _, is := b[what]; is {
			left = append(left, what)
		}
	}
	require.Equal(t, []waitFor{waitStop("s0"), waitClean, waitSweep, waitRestart("app")}, left)
	b.done(waitStop("s0"))
	_, put = b.held(waitStop("s0"), now)
	require.False(t, put)
}
