package logs

import (
	"bytes"
	"compress/gzip"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"timonel/test/needs"
)

// TestALogIsRotated writes far more than all files may be, first slower than it
// is looked at and then as fast as it goes.
func TestALogIsRotated(t *testing.T) {
	t.Parallel()
	for _, fast := range []bool{false, true} {
		t.Run(fmt.Sprintf("fast=%v", fast), func(t *testing.T) {
			t.Parallel()
			b := newBench(t, nil)
			b.rt.start(t, "id", b.path)
			b.run()
			const each = 1300 // a little more than a file
			n := 10000
			for round := range 12 {
				b.rt.write("id", entries(n, n+each))
				n += each
				if !fast {
					b.until("a rotation", func() bool { return b.rt.reopens() > round })
				}
			}
			b.until("a rotation", func() bool { st, err := os.Stat(b.path); return err == nil && st.Size() < testSize })
			if fast {
				b.until("what is over to be removed", func() bool { return b.used() <= b.cfg.room()+testSize })
				return
			}
			b.rt.write("id", entries(n, n+1))
			b.until("all but the newest to be compressed", func() bool { return strings.Count(strings.Join(b.names(), " "), ".gz") == 3 })
			names := b.names()
			require.Len(t, names, 5, "%v", names)
			require.NotContains(t, strings.Join(names, " "), tmpSuffix)
			// Nothing of what is left is missing or there twice.
			var all bytes.Buffer
			for _, name := range append(names[1:], names[0]) {
				raw, err := os.ReadFile(filepath.Join(b.dir, name))
				require.NoError(t, err)
				if strings.HasSuffix(name, gzSuffix) {
					z, err := gzip.NewReader(bytes.NewReader(raw))
					require.NoError(t, err)
					raw, err = io.ReadAll(z)
					require.NoError(t, err)
				}
				all.Write(raw)
			}
			require.Equal(t, string(entries(n-4*each, n+1)), all.String())
			st, err := os.Stat(filepath.Join(b.dir, names[1]))
			require.NoError(t, err)
			require.Equal(t, os.FileMode(0o640), st.Mode(), "who may read the log may read what is compressed")
		})
	}
}

// TestTheDiskIsBounded has several containers write what cannot be compressed,
// as fast as they may, and looks at the disk all the while.
func TestTheDiskIsBounded(t *testing.T) {
	t.Parallel()
	const size, rate, writers = 1 << 20, 64 << 20, 2
	b := newBench(t, func(c *Config) { c.MaxSize = size })
	b.run()
	var dirs []string
	for i := range writers {
		dir := filepath.Join(b.cfg.Dir, fmt.Sprintf("ns_pod%d_uid", i), "c")
		require.NoError(t, os.MkdirAll(dir, 0o755))
		dirs = append(dirs, dir)
		id := fmt.Sprint("id", i)
		b.rt.start(t, id, filepath.Join(dir, "0.log"))
		b.Started(id)
	}
	var wg sync.WaitGroup
	most := make([]int64, writers)
	for i, dir := range dirs {
		wg.Go(func() {
			noise := make([]byte, 64<<10)
			rng := rand.NewChaCha8([32]byte{byte(i)})
			var written int64
			for began := time.Now(); written < 128<<20; {
				_, _ = rng.Read(noise)
				b.rt.write(fmt.Sprint("id", i), noise)
				written += int64(len(noise))
				list, err := os.ReadDir(dir)
				if err != nil {
					t.Error(err)
					return
				}
				var sum int64
				for _, e := range list {
					if info, err := e.Info(); err == nil {
						sum += info.Size()
					}
				}
				most[i] = max(most[i], sum)
				if ahead := time.Duration(written*int64(time.Second)/rate) - time.Since(began); ahead > 0 {
					time.Sleep(ahead)
				}
			}
		})
	}
	wg.Wait()
	for _, m := range most {
		// On a loaded machine it may be looked at a second late.
		require.LessOrEqual(t, m, int64(5*size+size/4+size+rate))
	}
}

// TestWhatAnAgentLeftIsPutRight begins with what is there after an agent ended
// between two steps, or after somebody's pod that collects logs was at work.
func TestWhatAnAgentLeftIsPutRight(t *testing.T) {
	t.Parallel()
	const old, older = "0.log.20260102-030405", "0.log.20260102-030401"
	for _, tc := range []struct {
		name  string
		ended bool
		leave func(b *bench)
		want  func(b *bench) bool
	}{
		{"renamed, not opened anew", false, func(b *bench) {
			require.NoError(b.t, os.Rename(b.path, filepath.Join(b.dir, old)))
		}, func(b *bench) bool { return b.writes("0.log") }},
		{"renamed, and the container has ended", true, func(b *bench) {
			b.rt.write("id", []byte("last words\n"))
			require.NoError(b.t, os.Rename(b.path, filepath.Join(b.dir, old)))
		}, func(b *bench) bool {
			raw, err := os.ReadFile(b.path)
			return err == nil && string(raw) == "last words\n" && len(b.names()) == 1
		}},
		{"compressing", false, func(b *bench) {
			b.put(older, entries(0, 10))
			b.put(older+tmpSuffix, []byte("half"))
			b.put(old, entries(10, 20))
		}, func(b *bench) bool { return strings.Join(b.names(), " ") == "0.log "+older+".gz "+old }},
		{"compressed, the plain one not removed", false, func(b *bench) {
			b.put(older, entries(0, 10))
			b.put(older+gzSuffix, []byte("whole"))
			b.put(old, entries(10, 20))
		}, func(b *bench) bool { return strings.Join(b.names(), " ") == "0.log "+older+".gz "+old }},
		{"removed by somebody", false, func(b *bench) { require.NoError(b.t, os.Remove(b.path)) },
			func(b *bench) bool { return b.writes("0.log") }},
		{"replaced by somebody", false, func(b *bench) {
			require.NoError(b.t, os.Remove(b.path))
			b.put("0.log", []byte("mine\n"))
		}, func(b *bench) bool { return b.writes("0.log") }},
		{"a link in its place", false, func(b *bench) {
			require.NoError(b.t, os.Remove(b.path))
			require.NoError(b.t, os.Symlink("/etc/hostname", b.path))
		}, func(b *bench) bool { return b.writes("0.log") }},
		{"a FIFO in its place", false, func(b *bench) {
			require.NoError(b.t, os.Remove(b.path))
			require.NoError(b.t, unix.Mkfifo(b.path, 0o666))
		}, func(b *bench) bool { return b.writes("0.log") }},
		{"a folder in its place", false, func(b *bench) {
			require.NoError(b.t, os.Remove(b.path))
			require.NoError(b.t, os.MkdirAll(filepath.Join(b.path, "a", "b"), 0o755))
		}, func(b *bench) bool { return b.writes("0.log") }},
		{"traps among the rotated ones", false, func(b *bench) {
			require.NoError(b.t, os.Symlink("/etc/passwd", filepath.Join(b.dir, older)))
			require.NoError(b.t, unix.Mkfifo(filepath.Join(b.dir, older+"_001"), 0o666))
			require.NoError(b.t, os.MkdirAll(filepath.Join(b.dir, older+"_002.gz", "x"), 0o755))
			b.put(old, entries(10, 20))
			b.put("others.txt", []byte("stays"))
		}, func(b *bench) bool { return strings.Join(b.names(), " ") == "0.log "+old+" others.txt" }},
		{"far too many", false, func(b *bench) {
			for i := range 30 {
				b.put(fmt.Sprintf("%s_%03d", older, i+1), make([]byte, 10))
			}
			b.rt.write("id", entries(0, 1500))
		}, func(b *bench) bool { return len(b.names()) == 5 && b.writes("0.log") }},
		{"written while there was no agent", false, func(b *bench) { b.rt.write("id", entries(0, 20000)) },
			func(b *bench) bool {
				u := b.used() // while a file is renamed it is not in it
				return u <= b.cfg.room() && u > b.cfg.room()*9/10 && len(b.names()) == 2 && b.ends(19999)
			}},
		{"written and ended while there was no agent", true, func(b *bench) {
			b.put(old, entries(0, 1500))
			b.rt.write("id", entries(0, 20000))
		}, func(b *bench) bool {
			u := b.used()
			return u <= 5*testSize+testSize/4 && u > testSize && len(b.names()) == 1 && b.ends(19999)
		}},
		{"the clock went back", false, func(b *bench) {
			b.put("0.log.20990102-030405", entries(0, 10))
			b.rt.write("id", entries(10, 1500))
		}, func(b *bench) bool {
			return strings.Join(b.names(), " ") == "0.log 0.log.20990102-030405.gz 0.log.20990102-030405_001"
		}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			b := newBench(t, nil)
			b.rt.start(t, "id", b.path)
			tc.leave(b)
			if tc.ended {
				b.rt.stop("id")
			}
			stop := b.run()
			b.until("it to be put right", func() bool { return tc.want(b) })
			stop()
			require.True(t, tc.want(b), "it stays so: %v, %d bytes of %d", b.names(), b.used(), b.cfg.room())
		})
	}
}

// writes says whether what the container writes now is in the file of a name.
func (b *bench) writes(name string) bool {
	mark := fmt.Sprintf("mark %d\n", time.Now().UnixNano())
	b.rt.write("id", []byte(mark))
	st, err := os.Lstat(filepath.Join(b.dir, name))
	if err != nil || !st.Mode().IsRegular() {
		return false
	}
	raw, err := os.ReadFile(filepath.Join(b.dir, name))
	return err == nil && bytes.Contains(raw, []byte(mark))
}

// ends says whether the newest entry is that of number n, and each file begins
// where a line does.
func (b *bench) ends(n int) bool {
	found := false
	for _, name := range b.names() {
		raw, err := os.ReadFile(filepath.Join(b.dir, name))
		if err != nil || len(raw) > 0 && !bytes.HasPrefix(raw, []byte("2026-")) {
			return false
		}
		found = found || bytes.HasSuffix(raw, fmt.Appendf(nil, "line %d\n", n))
	}
	return found
}

// TestALogThatCannotBeOpenedAnewKeepsItsName has containerd fail for a while.
func TestALogThatCannotBeOpenedAnewKeepsItsName(t *testing.T) {
	t.Parallel()
	b := newBench(t, nil)
	b.rt.start(t, "id", b.path)
	b.rt.breakDown(errors.New("not now"))
	b.rt.write("id", entries(0, 1500))
	b.run()
	b.until("two attempts", func() bool { return b.rt.reopens() >= 2 })
	b.rt.breakDown(nil)
	b.until("a rotation", func() bool { return len(b.names()) == 2 })
	raw, err := os.ReadFile(filepath.Join(b.dir, b.names()[1]))
	require.NoError(t, err)
	require.Equal(t, string(entries(0, 1500)), string(raw))
	require.True(t, b.writes("0.log"))
}

// TestASilentLogCostsNothing counts how often one is looked at.
func TestASilentLogCostsNothing(t *testing.T) {
	t.Parallel()
	b := newBench(t, nil)
	if b.notify == nil {
		needs.Skip(t, "no inotify here")
	}
	b.rt.start(t, "id", b.path)
	b.run()
	waits := func() bool {
		b.notify.mu.Lock()
		defer b.notify.mu.Unlock()
		return len(b.notify.waiting) == 1
	}
	b.until("the first write to be waited for", waits)
	b.rt.write("id", entries(0, 1500))
	b.until("that write to be noticed", func() bool { return b.rt.reopens() == 1 })
	b.until("the next one to be waited for", waits)
}

func TestRemove(t *testing.T) {
	t.Parallel()
	b := newBench(t, nil)
	for _, name := range []string{"0.log", "0.log.20260102-030405", "0.log.20260102-030401.gz", "0.log.20260102-030402.tmp", "1.log", "1.log.20260102-030405"} {
		b.put(name, nil)
	}
	require.NoError(t, Remove(t.Context(), b.path))
	require.Equal(t, []string{"1.log", "1.log.20260102-030405"}, b.names())
	require.NoError(t, Remove(t.Context(), filepath.Join(b.cfg.Dir, "gone", "c", "0.log")))
}

// TestOthersLogsAreLeftAlone has a container of somebody else's in the same
// containerd.
func TestOthersLogsAreLeftAlone(t *testing.T) {
	t.Parallel()
	b := newBench(t, nil)
	for _, path := range []string{"/var/log/pods/a_b_c/d/0.log", filepath.Join(b.cfg.Dir, "0.log"), filepath.Join(b.cfg.Dir, "a/b/c/0.log"), filepath.Join(b.cfg.Dir, "../a/b/0.log"), ""} {
		require.Empty(t, b.below(path), path)
	}
	require.Equal(t, "ns_pod_uid/c/0.log", b.below(b.path))
}
