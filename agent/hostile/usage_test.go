package hostile

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"timonel/test/needs"
)

// usage is the size of name, all of it.
func usage(t *testing.T, r *Root, name string) Size {
	t.Helper()
	s, err := r.Usage(t.Context(), name, Measure{})
	require.NoError(t, err)
	require.True(t, s.Whole)
	return s
}

// fill makes a file of so many bytes, on the disk.
func fill(t *testing.T, path string, bytes int) {
	t.Helper()
	f, err := os.Create(path)
	require.NoError(t, err)
	_, err = f.Write(make([]byte, bytes))
	require.NoError(t, errors.Join(err, f.Sync(), f.Close()))
}

func TestUsageCountsWhatTakesRoom(t *testing.T) {
	const mib = 1 << 20
	dir, out := t.TempDir(), t.TempDir()
	r := open(t, dir)
	require.Equal(t, Size{Whole: true}, usage(t, r, "nothing"), "what is not there takes nothing")
	at := filepath.Join(dir, "v")
	require.NoError(t, os.Mkdir(at, 0o755))
	empty := usage(t, r, "v")
	require.EqualValues(t, 1, empty.Inodes)

	fill(t, filepath.Join(at, "f"), mib)
	one := usage(t, r, "v")
	require.InDelta(t, mib, one.Bytes-empty.Bytes, 16<<10)
	require.EqualValues(t, 2, one.Inodes)
	require.InDelta(t, mib, usage(t, r, "v/f").Bytes, 16<<10, "a file by itself")

	fill(t, filepath.Join(at, "sparse"), 0)
	require.NoError(t, os.Truncate(filepath.Join(at, "sparse"), 1<<40))
	require.Equal(t, one.Bytes, usage(t, r, "v").Bytes, "a hole takes nothing")

	require.NoError(t, os.MkdirAll(filepath.Join(at, "a", "b"), 0o755))
	before := usage(t, r, "v")
	for i := range 50 {
		require.NoError(t, os.Link(filepath.Join(at, "f"), filepath.Join(at, "a", "b", strconv.Itoa(i))))
	}
	linked := usage(t, r, "v")
	require.Equal(t, before.Inodes, linked.Inodes, "a file of 51 names is one")
	require.InDelta(t, before.Bytes, linked.Bytes, 16<<10)

	fill(t, filepath.Join(out, "outside"), 8*mib)
	require.NoError(t, os.Symlink(out, filepath.Join(at, "link")))
	require.NoError(t, os.Symlink(filepath.Join(out, "outside"), filepath.Join(at, "a", "link")))
	require.NoError(t, os.Symlink("..", filepath.Join(at, "a", "b", "loop")))
	require.NoError(t, unix.Mkfifo(filepath.Join(at, "fifo"), 0o666))
	within(t, func() {
		got := usage(t, r, "v")
		require.InDelta(t, before.Bytes, got.Bytes, 32<<10, "links lead nowhere")
		require.Equal(t, before.Inodes+4, got.Inodes)
	})

	_, err := r.Usage(t.Context(), "v/link", Measure{})
	require.NoError(t, err, "the link itself")
	_, err = r.Usage(t.Context(), "v/link/outside", Measure{})
	require.ErrorIs(t, err, ErrKind)
	_, err = r.Usage(t.Context(), "../x", Measure{})
	require.Error(t, err)
}

func TestUsageCrossesNoMount(t *testing.T) {
	needs.Root(t, "mounts")
	dir, out := t.TempDir(), t.TempDir()
	fill(t, filepath.Join(out, "big"), 4<<20)
	at, file := filepath.Join(dir, "v", "mount"), filepath.Join(dir, "v", "file")
	require.NoError(t, os.MkdirAll(at, 0o755))
	fill(t, file, 0)
	r := open(t, dir)
	before := usage(t, r, "v")
	require.NoError(t, unix.Mount(out, at, "", unix.MS_BIND, ""))
	t.Cleanup(func() { _ = unix.Unmount(at, unix.MNT_DETACH) })
	require.NoError(t, unix.Mount(filepath.Join(out, "big"), file, "", unix.MS_BIND, ""))
	t.Cleanup(func() { _ = unix.Unmount(file, unix.MNT_DETACH) })
	got := usage(t, r, "v")
	require.LessOrEqual(t, got.Bytes, before.Bytes)
}

// A tree may be deeper than there are descriptors, and go on beside each of its
// folders.
func TestUsageOfATreeOfAnyShape(t *testing.T) {
	const depth, each = 700, 4096
	var old unix.Rlimit
	require.NoError(t, unix.Getrlimit(unix.RLIMIT_NOFILE, &old))
	low := old
	low.Cur = min(old.Cur, 256)
	dir := t.TempDir()
	r := open(t, dir)
	t.Cleanup(func() { require.NoError(t, r.RemoveAll(context.Background(), "v")) }) // deeper than t.TempDir can
	at, err := r.MkdirAll("v", 0o755, -1, -1)
	require.NoError(t, err)
	top := usage(t, r, "v").Bytes
	for range depth {
		for _, name := range []string{"a", "z"} { // one of them is read after the folder
			require.NoError(t, at.Create(name, make([]byte, each), 0o600, -1, -1))
		}
		next, err := at.Mkdir("m", 0o755, -1, -1)
		require.NoError(t, err)
		require.NoError(t, at.Close())
		at = &Root{f: next.f, path: "deep"}
	}
	require.NoError(t, at.Close())
	wide, err := r.MkdirAll("v/wide", 0o755, -1, -1)
	require.NoError(t, err)
	const folders = 1500
	for i := range folders {
		sub, err := wide.Mkdir(strconv.Itoa(i), 0o755, -1, -1)
		require.NoError(t, err)
		require.NoError(t, errors.Join(sub.Create("f", []byte("x"), 0o600, -1, -1), sub.Close()))
	}
	require.NoError(t, wide.Close())

	require.NoError(t, unix.Setrlimit(unix.RLIMIT_NOFILE, &low))
	defer unix.Setrlimit(unix.RLIMIT_NOFILE, &old)
	got := usage(t, r, "v")
	require.EqualValues(t, 1+3*depth+1+2*folders, got.Inodes)
	require.GreaterOrEqual(t, got.Bytes, top+2*depth*each)

	pauses := 0
	part, err := r.Usage(t.Context(), "v", Measure{Stop: 1 << 20, Pause: func() error { pauses++; return nil }})
	require.NoError(t, err)
	require.False(t, part.Whole)
	require.Greater(t, part.Bytes, int64(1<<20))
	require.Less(t, part.Bytes, int64(1<<20)+64<<10, "it stops when it knows enough")
	_, err = r.Usage(t.Context(), "v", Measure{Pause: func() error { pauses++; return nil }})
	require.NoError(t, err)
	require.GreaterOrEqual(t, pauses, (3*depth+2*folders)/walkBatch)
	enough := errors.New("enough")
	_, err = r.Usage(t.Context(), "v", Measure{Pause: func() error { return enough }})
	require.ErrorIs(t, err, enough)
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	_, err = r.Usage(ended, "v", Measure{})
	require.ErrorIs(t, err, context.Canceled)
}

// More hard links than are remembered count in parts, which make one.
func TestUsageOfVeryManyLinks(t *testing.T) {
	dir := t.TempDir()
	r := open(t, dir)
	const n = 3000
	for i := range n {
		name := strconv.Itoa(i)
		require.NoError(t, r.Create(name, []byte("x"), 0o600, -1, -1))
		require.NoError(t, unix.Linkat(r.fd(), name, r.fd(), "l"+name, 0))
	}
	for _, remembered := range []int{1, n / 2, n, usageLinks} {
		s, err := r.Usage(t.Context(), ".", Measure{links: remembered})
		require.NoError(t, err)
		require.EqualValues(t, n+1, s.Inodes)
	}
}

// Folders are moved about beneath the measuring, deep in a tree and out of it.
func TestUsageWhileFoldersAreMoved(t *testing.T) {
	dir := t.TempDir()
	r := open(t, dir)
	t.Cleanup(func() { require.NoError(t, r.RemoveAll(context.Background(), ".v")) })
	at, err := r.MkdirAll(".v", 0o755, -1, -1)
	require.NoError(t, err)
	var deep []*Root
	for range 3 * (walkOuter + walkInner) {
		next, err := at.Mkdir("d", 0o755, -1, -1)
		require.NoError(t, err)
		deep = append(deep, at)
		at = &Root{f: next.f, path: "deep"}
	}
	fill(t, filepath.Join(dir, ".v", "f"), 1<<20)
	var stop atomic.Bool
	var wg sync.WaitGroup
	wg.Go(func() {
		for i := 0; !stop.Load(); i++ {
			from := deep[len(deep)/2+i%(len(deep)/3)]
			if unix.Renameat(from.fd(), "d", deep[0].fd(), "moved") == nil {
				_ = unix.Renameat(deep[0].fd(), "moved", from.fd(), "d")
			}
		}
	})
	for range 100 {
		s, err := r.Usage(t.Context(), ".v", Measure{})
		require.NoError(t, err)
		require.GreaterOrEqual(t, s.Bytes, int64(1<<20), "what lies still is counted")
		require.LessOrEqual(t, s.Inodes, int64(2+2*len(deep)+2))
	}
	stop.Store(true)
	wg.Wait()
	for _, d := range append(deep, at) {
		d.Close()
	}
}

// TestWalkReadsNamesOnce walks folders of very many folders, near the top and deeper
// than stay open: the names of none are read once for each folder in it.
func TestWalkReadsNamesOnce(t *testing.T) {
	const folders, deep = 2000, 3 * (walkOuter + walkInner)
	r := open(t, t.TempDir())
	t.Cleanup(func() { require.NoError(t, r.RemoveAllIn(context.Background(), nil)) })
	at, err := r.OpenRoot(".")
	require.NoError(t, err)
	all := 0
	for i := range deep + 1 {
		if i == 0 || i == deep/2 || i == deep {
			for j := range folders {
				sub, err := at.Mkdir("wide"+strconv.Itoa(j), 0o755, -1, -1)
				require.NoError(t, errors.Join(err, sub.Close()))
			}
			all += folders
		}
		next, err := at.Mkdir("deep", 0o755, -1, -1)
		require.NoError(t, err)
		at.Close()
		at, all = &Root{f: next.f, path: "deep"}, all+1
	}
	at.Close()
	seen, read := 0, 0
	var tree walk
	tree.visit = func(dir int, name string) (bool, error) {
		seen++
		return true, nil
	}
	require.NoError(t, tree.run(t.Context(), r))
	require.False(t, tree.partial)
	require.Equal(t, all, seen, "each once")
	read = tree.reads
	// Each folder is read once and found to be at its end, and the wide ones by buffers.
	require.LessOrEqual(t, read, 2*all+3*folders*40/walkBuffer+2*deep+8)
	require.LessOrEqual(t, len(tree.spare), walkOuter+walkInner+1)
}
