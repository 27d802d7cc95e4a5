package reconcile

import (
	"testing"
	"time"
)

func TestBackoff(t *testing.T) {
	t.Parallel()
	last := time.Duration(0)
	for tries := 1; tries < 40; tries++ {
		d := backoff(tries, 7)
		if d <= 0 || d > 75*time.Second || tries < 9 && d <= last {
			t.Errorf("try %d waits %s after %s", tries, d, last)
		}
		last = d
	}
}
