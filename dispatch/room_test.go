package dispatch

import (
	"testing"
	"testing/synctest"

	"github.com/stretchr/testify/require"
)

func TestRoom(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := newRoom(8 << 20)
		var a, b, c share
		taken := make(chan string, 8)
		take := func(who string, s *share, n int64) {
			go func() {
				if r.take(t.Context().Done(), s, n) {
					taken <- who
				}
			}()
			synctest.Wait()
		}
		got := func() (out []string) {
			for len(taken) > 0 {
				out = append(out, <-taken)
			}
			return out
		}
		take("a", &a, sessionReports)
		take("a again", &a, leastReports+1)
		require.Equal(t, []string{"a"}, got(), "one agent has no more than its share")
		take("b", &b, sessionReports)
		take("c", &c, leastReports+1)
		require.Equal(t, []string{"b"}, got(), "all together have no more than the limit")
		take("c little", &c, leastReports)
		require.Equal(t, []string{"c little"}, got(), "each has a little, whatever the others hold")
		r.give(&c, leastReports)
		synctest.Wait()
		require.Empty(t, got())
		r.give(&a, sessionReports)
		synctest.Wait()
		require.ElementsMatch(t, []string{"a again", "c"}, got())
		r.end(&b)
		r.give(&b, 7)
		require.False(t, r.take(nil, &b, 1), "a session that ended takes nothing")
		r.end(&a)
		r.end(&c)
		require.Zero(t, r.bytes())
	})
}
