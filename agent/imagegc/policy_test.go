package imagegc

import (
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

func TestExcess(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		name                string
		policy              Policy
		capacity, available int64
		want                int64
	}{
		{"half full", Default(), 1000, 500, 0},
		{"just below the high threshold", Default(), 1000, 160, 0},
		{"at the high threshold, down to the low one", Default(), 1000, 150, 50},
		{"a fraction of a percent counts as one", Default(), 1000, 159, 41},
		{"full", Default(), 1000, 0, 200},
		{"more available than there is", Default(), 1000, 2000, 0},
		{"less than nothing available", Default(), 1000, -10, 210},
		{"an empty answer", Default(), 0, 0, 0},
		{"never", Policy{High: 100, Low: 80}, 1000, 0, 0},
		{"always", Policy{High: 1, Low: 0}, 1000, 900, 100},
		{"as large as it gets", Default(), 1 << 62, 0, (1 << 62) / 5},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			require.InDelta(t, tc.want, tc.policy.Excess(FileSystem{tc.capacity, tc.available}), float64(tc.capacity)/1e9)
		})
	}
}

func TestPolicyNamesTheFlag(t *testing.T) {
	t.Parallel()
	require.NoError(t, Default().Validate())
	require.NoError(t, Policy{High: 100, Low: 99}.Validate())
	require.ErrorContains(t, Policy{High: 101, Low: 80}.Validate(), "--image-gc-high-threshold 101")
	require.ErrorContains(t, Policy{High: -1}.Validate(), "--image-gc-high-threshold -1")
	require.ErrorContains(t, Policy{High: 85, Low: -1}.Validate(), "--image-gc-low-threshold -1")
	require.ErrorContains(t, Policy{High: 80, Low: 80}.Validate(), "must be less")
	require.ErrorContains(t, Policy{High: 85, Low: 80, MinAge: -1}.Validate(), "--minimum-image-ttl-duration")
}

// Images are seen at some minutes, in use or not, and then those that may go are
// listed in their order.
func TestCandidates(t *testing.T) {
	t.Parallel()
	begin := time.Unix(100_000, 0)
	at := func(minute int) time.Time { return begin.Add(time.Duration(minute) * time.Minute) }
	type sight struct {
		minute int
		images []Image
	}
	idle := func(ids ...string) (out []Image) {
		for _, id := range ids {
			out = append(out, Image{ID: id})
		}
		return out
	}
	used := func(ids ...string) (out []Image) {
		for _, id := range ids {
			out = append(out, Image{ID: id, Used: true})
		}
		return out
	}
	join := func(lists ...[]Image) (out []Image) {
		for _, l := range lists {
			out = append(out, l...)
		}
		return out
	}
	for _, tc := range []struct {
		name   string
		sights []sight
		want   []string
	}{
		{"used longest ago first, never used before those", []sight{
			{0, join(used("b", "a"), idle("c"))}, {5, join(used("a"), idle("b", "c"))}, {10, idle("a", "b", "c")},
		}, []string{"c", "b", "a"}},
		{"never used: the one that has been there longest", []sight{
			{0, idle("z")}, {5, idle("z", "b")}, {10, idle("z", "b", "a")}, {20, idle("a", "b", "z")},
		}, []string{"z", "b", "a"}},
		{"in use, pinned and too young ones stay", []sight{
			{0, join(used("used"), idle("old"), []Image{{ID: "pinned", Pinned: true}})},
			{10, join(used("used"), idle("old", "young"), []Image{{ID: "pinned", Pinned: true}})},
			{11, join(used("used"), idle("old", "young"), []Image{{ID: "pinned", Pinned: true}})},
		}, []string{"old"}},
		{"old enough to the second", []sight{{0, idle("a")}, {2, idle("a")}}, []string{"a"}},
		{"one that went and came back is new", []sight{{0, idle("a", "b")}, {5, idle("b")}, {9, idle("a", "b")}, {10, idle("a", "b")}}, []string{"b"}},
		{"nothing there", []sight{{0, idle("a")}, {5, nil}}, nil},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			r := Records{}
			var last sight
			for _, s := range tc.sights {
				r.See(s.images, at(s.minute))
				last = s
			}
			var got []string
			for _, m := range r.Candidates(last.images, Default(), at(last.minute)) {
				got = append(got, m.ID)
			}
			require.Equal(t, tc.want, got)
			require.Len(t, r, len(last.images))
		})
	}
}

func TestSize(t *testing.T) {
	t.Parallel()
	for n, want := range map[int64]string{0: "0 B", 1023: "1023 B", 1 << 10: "1.0 KiB", 3 << 19: "1.5 MiB", 5 << 30: "5.0 GiB", 7 << 40: "7.0 TiB", 1 << 60: "1048576.0 TiB"} {
		require.Equal(t, want, size(n))
	}
}
