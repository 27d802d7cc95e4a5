package desired

import (
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
)

var errFull = errors.New("no space left on device")

// faultyDisk does its first n steps; then it fails, for a while or for good.
type faultyDisk struct {
	files
	mu    sync.Mutex
	steps int
	from  int // the first step that fails
	to    int // the first that works again
}

func (d *faultyDisk) step(do func() error) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.steps++
	if d.from < d.steps && d.steps <= d.to {
		return errFull
	}
	return do()
}

func (d *faultyDisk) replace(path string, raw []byte, durable bool) error {
	return d.step(func() error { return d.files.replace(path, raw, durable) })
}
func (d *faultyDisk) remove(path string) error {
	return d.step(func() error { return d.files.remove(path) })
}
func (d *faultyDisk) syncDir(path string) error {
	return d.step(func() error { return d.files.syncDir(path) })
}

// contents are all files of a store's folder.
func contents(t *testing.T, dir string) map[string]string {
	t.Helper()
	out := map[string]string{}
	require.NoError(t, filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		rel, _ := filepath.Rel(dir, path)
		raw, err := os.ReadFile(path)
		out[rel] = string(raw)
		return err
	}))
	return out
}

// story has a store receive lists and changes, with its writer idle in between,
// and calls after with what a disk that works would hold for each position.
func story(t *testing.T, s *Store, settle func(), after func(revision int64)) {
	pod := func(uid, label string, revision int64) {
		raw, err := (&corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: "pod-" + uid, Namespace: "ns", UID: typesUID(uid), Labels: map[string]string{"l": label}}}).Marshal()
		require.NoError(t, err)
		require.NoError(t, s.SetPod(raw, revision, 0))
	}
	secret := func(value string, revision int64) {
		raw, err := (&corev1.Secret{ObjectMeta: metav1.ObjectMeta{Name: "s", Namespace: "ns"}, Data: map[string][]byte{"k": []byte(value)}}).Marshal()
		require.NoError(t, err)
		require.NoError(t, s.SetObject(KindSecret, raw, revision))
	}
	s.Begin("cluster", true)
	secret("1", 2)
	pod("a", "1", 2)
	pod("b", "1", 2)
	s.Synced(3)
	after(3)
	settle()
	pod("a", "2", 3)
	secret("2", 3)
	s.Synced(5)
	after(5)
	settle()
	s.RemovePod("b", 5)
	pod("c", "1", 5)
	s.Synced(7)
	after(7)
	settle()
	s.RemoveObject(KindSecret, "ns", "s", 7)
	s.RemovePod("c", 7)
	pod("d", "1", 7)
	s.Synced(9)
	after(9)
	settle()
}

// TestDiskFails has each step of the disk fail, for a while: in the end the disk
// holds what the store does. And for good, as when the process is killed there:
// whatever position is on the disk, all that it covers is.
func TestDiskFails(t *testing.T) {
	t.Parallel()
	run := func(t *testing.T, from, to int) (*Store, *faultyDisk, map[int64]map[string]string) {
		dir := t.TempDir()
		s := open(t, dir)
		require.NoError(t, s.writer.close())
		d := &faultyDisk{files: files{dir}, from: from, to: to}
		s.writer = startWriter(dir, nil, d, slog.New(slog.DiscardHandler))
		covered := map[int64]map[string]string{}
		story(t, s, synctest.Wait, func(revision int64) {
			covered[revision] = map[string]string{}
			s.mu.Lock()
			defer s.mu.Unlock()
			for uid, p := range s.pods {
				covered[revision][string(podKey(uid))] = p.Labels["l"]
			}
			if o, ok := s.objects[objectKey(KindSecret, "ns", "s")].(*corev1.Secret); ok {
				covered[revision]["secret"] = string(o.Data["k"])
			}
		})
		return s, d, covered
	}
	steps := 0
	synctest.Test(t, func(t *testing.T) {
		s, d, _ := run(t, 1<<30, 1<<30)
		require.NoError(t, s.Close())
		steps = d.steps
	})
	require.Greater(t, steps, 15)
	for n := range steps {
		for _, long := range []int{1, 3, 10} {
			t.Run(fmt.Sprintf("%d fail from step %d on", long, n), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					s, _, _ := run(t, n, n+long)
					for range 20 { // each ends with the next retry
						waitFor(lastRetry)
					}
					require.NoError(t, s.Close())
					again := open(t, s.dir)
					require.Equal(t, "a d", uids(again))
					p, _ := again.Pod("a")
					require.Equal(t, "2", p.Labels["l"])
					_, ok := again.Secret("ns", "s")
					require.False(t, ok)
					_, revision := again.Position()
					require.EqualValues(t, 9, revision)
					require.NoError(t, again.Close())
				})
			})
		}
		t.Run(fmt.Sprintf("killed at step %d", n), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s, d, covered := run(t, n, 1<<30)
				if err := s.Close(); d.steps > n { // how many there are varies a little with what is written at once
					require.ErrorIs(t, err, errFull)
				}
				again := open(t, s.dir)
				defer again.Close()
				_, revision := again.Position()
				if revision == 0 {
					return
				}
				// Later changes may be there too: what is covered must not be older.
				for what, value := range covered[revision] {
					if what == "secret" {
						if sec, ok := again.Secret("ns", "s"); ok {
							require.GreaterOrEqual(t, string(sec.Data["k"]), value)
						} else {
							require.EqualValues(t, 7, revision, "only a later removal takes it away")
						}
						continue
					}
					uid := strings.TrimPrefix(what, "pods/")
					if p, ok := again.Pod(typesUID(uid)); ok {
						require.GreaterOrEqual(t, p.Labels["l"], value)
					} else {
						require.Contains(t, []string{"b", "c"}, uid, "only a later removal takes it away")
					}
				}
				require.Nil(t, again.Have())
			})
		})
	}
}

// TestWhatComesAndGoesWhileTheDiskFails is not kept: a disk that is full for days
// costs no memory beyond what the node has.
func TestWhatComesAndGoesWhileTheDiskFails(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		dir := t.TempDir()
		d := &faultyDisk{files: files{dir}, to: 1 << 30}
		w := startWriter(dir, nil, d, slog.New(slog.DiscardHandler))
		for i := range 200 {
			w.put(key(fmt.Sprintf("pods/%d", i)), make([]byte, 1024))
			if i%7 == 0 {
				waitFor(lastRetry)
			}
			w.remove(key(fmt.Sprintf("pods/%d", i)))
		}
		waitFor(2 * lastRetry)
		w.mu.Lock()
		require.Empty(t, w.pending)
		w.mu.Unlock()
		require.NoError(t, w.close())
		require.Empty(t, contents(t, dir))
	})
}

func typesUID(uid string) types.UID { return types.UID(uid) }

// waitFor lets time pass in a bubble.
func waitFor(d time.Duration) {
	time.Sleep(d)
	synctest.Wait()
}
