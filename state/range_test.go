package state

import (
	"fmt"
	"testing"
)

// A long range ends where its prefix does, wherever it starts.
func TestLongRange(t *testing.T) {
	t.Parallel()
	for _, n := range []int{0, 1, countAfter - 1, countAfter, countAfter + 1, countAfter + 2, 3 * countAfter} {
		for _, prefix := range []string{"b/", "\xff"} {
			s := New(Options{})
			all := []Change{put("a/before", "")}
			for i := range n {
				all = append(all, put(fmt.Sprintf("%s%04d", prefix, i), ""))
			}
			if prefix == "b/" {
				all = append(all, put("b0", ""), put("c/after", "")) // what follows all of b/
			}
			apply(t, s, changes(all...))
			for _, from := range []int{0, 1, n / 2, n} {
				got := 0
				for kv := range s.View().Range(prefix, fmt.Sprintf("%s%04d", prefix, from)) {
					if want := fmt.Sprintf("%s%04d", prefix, from+got); kv.Key != want {
						t.Fatalf("%d keys with %q: got %q, want %q", n, prefix, kv.Key, want)
					}
					got++
				}
				if got != max(0, n-from) {
					t.Errorf("%d keys with %q: %d from number %d on", n, prefix, got, from)
				}
			}
		}
	}
}
