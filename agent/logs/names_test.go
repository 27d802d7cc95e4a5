package logs

import (
	"slices"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

func TestNames(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		name, key   string
		gz, tmp, ok bool
	}{
		{"0.log", "", false, false, false},
		{"0.log.20260102-030405", "20260102-030405", false, false, true},
		{"0.log.20260102-030405.gz", "20260102-030405", true, false, true},
		{"0.log.20260102-030405_007.gz", "20260102-030405_007", true, false, true},
		{"0.log.20260102-030405.tmp", "20260102-030405", false, true, true},
		{"0.log.20260102-030405.gz.tmp", "20260102-030405", true, true, true},
		{"10.log.20260102-030405", "", false, false, false},
		{"0.log.20261302-030405", "", false, false, false},
		{"0.log.20260102-030405_7", "", false, false, false},
		{"0.log.20260102-030405_+07", "", false, false, false},
		{"0.log.20260102-030405.bz2", "", false, false, false},
		{"0.log.", "", false, false, false},
		{"0.log.old", "", false, false, false},
	} {
		k, tmp, ok := parseName("0.log", tc.name)
		require.Equal(t, tc.ok, ok, tc.name)
		if ok {
			require.Equal(t, tc.key, k.key, tc.name)
			require.Equal(t, []bool{tc.gz, tc.tmp}, []bool{k.gz, tmp}, tc.name)
		}
	}
}

// TestNamesAreInTheOrderOfAge rotates faster than names have seconds, with a
// clock that goes back.
func TestNamesAreInTheOrderOfAge(t *testing.T) {
	t.Parallel()
	now := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	last := ""
	for i := range 5000 {
		switch i {
		case 100:
			now = now.Add(-time.Hour)
		case 4000:
			now = now.Add(48 * time.Hour)
		}
		key := nextKey(now, last)
		require.True(t, isKey(key), key)
		// Also compressed, for who sorts names as they are.
		require.True(t, slices.IsSorted([]string{last, last + gzSuffix, key, key + gzSuffix}), "%s %s", last, key)
		require.Greater(t, key, last)
		last = key
	}
	require.True(t, isKey(nextKey(now, "99991231-235959_999")), "what somebody put there does not make names that are none")
}

func FuzzNames(f *testing.F) {
	for _, name := range []string{"0.log.20260102-030405", "0.log.20260102-030405_999.gz.tmp", "0.log", "0.log.99991231-235959_999"} {
		f.Add(name)
	}
	f.Fuzz(func(t *testing.T, name string) {
		k, _, ok := parseName("0.log", name)
		if !ok {
			return
		}
		if !isKey(k.key) || !isKey(nextKey(time.Unix(0, 0), k.key)) {
			t.Fatalf("%q has the key %q, the next is %q", name, k.key, nextKey(time.Unix(0, 0), k.key))
		}
	})
}
