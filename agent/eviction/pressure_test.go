package eviction

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// A node looks at some seconds, and each time this much is left of 1,000. What it
// says of itself, and what it is short of, follows.
func TestPressure(t *testing.T) {
	t.Parallel()
	type look struct {
		second                       int
		memory, nodefs, imagefs, pid int64 // -1: cannot be seen
		want                         string
	}
	const enough = 500
	for _, tc := range []struct {
		name       string
		thresholds string
		reclaim    string
		looks      []look
	}{
		{"enough of everything", DefaultHard, "", []look{{0, enough, enough, enough, enough, "[] []"}}},
		{"as much as the threshold is enough", "nodefs.available<10%", "", []look{{0, enough, 100, enough, enough, "[] []"}, {10, enough, 99, enough, enough, "[DiskPressure] [nodefs.available]"}}},
		{"quantities", "memory.available<100", "", []look{{0, 100, enough, enough, enough, "[] []"}, {10, 99, enough, enough, enough, "[MemoryPressure] [memory.available]"}}},
		{"a condition stays for five minutes after it was seen last", "nodefs.available<10%", "", []look{
			{0, enough, 50, enough, enough, "[DiskPressure] [nodefs.available]"},
			{10, enough, enough, enough, enough, "[DiskPressure] []"},
			{200, enough, 50, enough, enough, "[DiskPressure] [nodefs.available]"},
			{499, enough, enough, enough, enough, "[DiskPressure] []"},
			{500, enough, enough, enough, enough, "[] []"},
			{510, enough, enough, enough, enough, "[] []"},
		}},
		{"memory before all, and each of its own condition", DefaultHard, "", []look{
			{0, enough, 10, enough, 10, "[DiskPressure PIDPressure] [nodefs.available pid.available]"},
			{10, 0, 10, enough, 10, "[MemoryPressure DiskPressure PIDPressure] [memory.available nodefs.available pid.available]"},
			{310, enough, enough, 10, enough, "[DiskPressure] [imagefs.available]"},
		}},
		{"what cannot be seen is enough, and what was short stays so for a while", "nodefs.available<10%", "", []look{
			{0, enough, -1, -1, enough, "[] []"}, {10, enough, 50, -1, enough, "[DiskPressure] [nodefs.available]"}, {20, enough, -1, -1, enough, "[DiskPressure] []"},
		}},
		{"none", "none", "", []look{{0, 0, 0, 0, 0, "[] []"}}},
		{"once short, more has to be freed", "nodefs.available<10%", "nodefs.available=5%", []look{
			{0, enough, 120, enough, enough, "[] []"},
			{10, enough, 90, enough, enough, "[DiskPressure] [nodefs.available]"},
			{20, enough, 120, enough, enough, "[DiskPressure] [nodefs.available]"},
			{30, enough, 150, enough, enough, "[DiskPressure] []"},
			{40, enough, 120, enough, enough, "[DiskPressure] []"},
		}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			thresholds, err := ParseHard(tc.thresholds)
			require.NoError(t, err)
			require.NoError(t, ParseMinReclaim(tc.reclaim, thresholds))
			var p Pressure
			for _, l := range tc.looks {
				seen := Observations{}
				for s, left := range map[Signal]int64{MemoryAvailable: l.memory, NodeFsAvailable: l.nodefs, ImageFsAvailable: l.imagefs, PIDAvailable: l.pid} {
					if left >= 0 {
						seen[s] = Observation{Available: left, Capacity: 1000}
					}
				}
				if tc.thresholds == DefaultHard { // 100Mi of it
					seen[MemoryAvailable] = Observation{Available: l.memory * mib, Capacity: 1000 * mib}
				}
				before := p
				var d Decision
				p, d = p.Next(thresholds, seen, 5*time.Minute, time.Unix(int64(l.second), 0))
				var short []string
				for _, th := range d.Short {
					short = append(short, string(th.Signal))
				}
				require.Equal(t, l.want, fmt.Sprintf("%v [%s]", d.Conditions, strings.Join(short, " ")), "at %d s", l.second)
				_, again := before.Next(thresholds, seen, 5*time.Minute, time.Unix(int64(l.second), 0))
				require.Equal(t, d, again, "the state before is not changed")
			}
		})
	}
}

func TestRelieved(t *testing.T) {
	t.Parallel()
	thresholds, err := ParseHard("nodefs.available<10%,memory.available<10%")
	require.NoError(t, err)
	require.NoError(t, ParseMinReclaim("nodefs.available=5%", thresholds))
	at := func(memory, nodefs int64) Observations {
		return Observations{MemoryAvailable: {memory, 1000}, NodeFsAvailable: {nodefs, 1000}}
	}
	require.True(t, Relieved(thresholds, at(500, 150)))
	require.False(t, Relieved(thresholds, at(500, 149)), "less than was to be freed")
	require.False(t, Relieved(thresholds, at(50, 500)), "it is short of something else")
}
