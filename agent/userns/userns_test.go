package userns

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"testing"

	"github.com/stretchr/testify/require"
	"k8s.io/apimachinery/pkg/types"
)

// Many pods that come and go at once, over restarts of the agent, never have an id in
// common, and each keeps its own.
func TestNoTwoPodsShareIDs(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(t.TempDir(), "userns")
	has := map[types.UID]Range{}
	for life := range 5 {
		u, err := Open(dir)
		require.NoError(t, err)
		require.Len(t, u.Pods(), len(has))
		for uid, r := range has {
			again, err := u.Range(uid)
			require.NoError(t, err)
			require.Equal(t, r, again, "after a restart")
		}
		var mu sync.Mutex
		var wg sync.WaitGroup
		for i := range 40 {
			wg.Go(func() {
				uid := types.UID(fmt.Sprintf("pod-%d-%d", life, i%30)) // some are asked for twice
				r, err := u.Range(uid)
				mu.Lock()
				defer mu.Unlock()
				require.NoError(t, err)
				if old, ok := has[uid]; ok {
					require.Equal(t, old, r)
				}
				has[uid] = r
			})
		}
		wg.Wait()
		owner := map[uint32]types.UID{}
		for uid, r := range has {
			require.Empty(t, owner[r.First], "%s and another have the ids from %d", uid, r.First)
			owner[r.First] = uid
			require.Zero(t, r.First%Length)
			require.GreaterOrEqual(t, r.First, uint32(first*Length))
			require.Less(t, uint64(r.First)+Length, uint64(1)<<31)
		}
		for uid := range has {
			if len(has)%3 == 0 {
				require.NoError(t, u.Release(uid))
				require.NoError(t, u.Release(uid), "twice")
				delete(has, uid)
			}
			break
		}
	}
}

// When all are taken, a pod waits for one that is given back.
func TestAllRangesTaken(t *testing.T) {
	t.Parallel()
	u, err := Open(t.TempDir())
	require.NoError(t, err)
	for i := range ranges - 1 {
		uid := types.UID(strconv.Itoa(i))
		u.slots[uid], u.taken[first+i] = first+i, uid
	}
	last, err := u.Range("last")
	require.NoError(t, err)
	require.Equal(t, uint32(first+ranges-1)*Length, last.First)
	_, err = u.Range("more")
	require.ErrorContains(t, err, "all 20480 ranges")
	require.NoError(t, u.Release("7"))
	r, err := u.Range("more")
	require.NoError(t, err)
	require.Equal(t, uint32(first+7)*Length, r.First)
}

// A range of which it is not known whose it is, or that a pod has beside another, is not
// given to anybody: the agent does not start. What was cut short was given to nobody.
func TestDamage(t *testing.T) {
	t.Parallel()
	for name, files := range map[string]map[string]string{
		"nobody": {"9000": ""}, "one pod, two ranges": {"9000": "a", "9001": "a"},
	} {
		dir := t.TempDir()
		for file, text := range files {
			require.NoError(t, os.WriteFile(filepath.Join(dir, file), []byte(text), 0o600))
		}
		_, err := Open(dir)
		require.ErrorContains(t, err, "is damaged", name)
	}
	dir := t.TempDir()
	for _, file := range []string{"9000.tmp", "notes", "1", "09000", "99999"} {
		require.NoError(t, os.WriteFile(filepath.Join(dir, file), []byte("x"), 0o600))
	}
	u, err := Open(dir)
	require.NoError(t, err)
	require.Empty(t, u.Pods())
	require.NoError(t, os.RemoveAll(dir))
	_, err = u.Range("a")
	require.Error(t, err, "not kept, so not given")
	require.Empty(t, u.Pods())
	_, err = u.Range("")
	require.Error(t, err)
}
