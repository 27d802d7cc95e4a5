package hostile

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"timonel/test/needs"
)

func open(t *testing.T, dir string) *Root {
	t.Helper()
	r, err := OpenRoot(dir)
	require.NoError(t, err)
	t.Cleanup(func() { r.Close() })
	return r
}

// within fails a test in which something blocks: a FIFO that is opened.
func within(t *testing.T, f func()) {
	t.Helper()
	done := make(chan struct{})
	go func() { defer close(done); f() }()
	select {
	case <-done:
	case <-time.After(20 * time.Second):
		t.Fatal("blocks")
	}
}

// plant makes one of each thing that is not to be read, below dir, and returns
// their names. secret is what must never come out.
func plant(t *testing.T, dir, secret string) []string {
	t.Helper()
	out := t.TempDir()
	require.NoError(t, os.WriteFile(filepath.Join(out, "secret"), []byte(secret), 0o600))
	require.NoError(t, os.Symlink(filepath.Join(out, "secret"), filepath.Join(dir, "absolute")))
	rel, err := filepath.Rel(dir, filepath.Join(out, "secret"))
	require.NoError(t, err)
	require.NoError(t, os.Symlink(rel, filepath.Join(dir, "relative")))
	require.NoError(t, os.Symlink(out, filepath.Join(dir, "folderlink")))
	require.NoError(t, os.Symlink("/proc/self/fd/0", filepath.Join(dir, "magic")))
	require.NoError(t, os.Symlink("loop", filepath.Join(dir, "loop")))
	require.NoError(t, unix.Mkfifo(filepath.Join(dir, "fifo"), 0o666))
	require.NoError(t, os.Mkdir(filepath.Join(dir, "folder"), 0o755))
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM, 0)
	require.NoError(t, err)
	t.Cleanup(func() { unix.Close(fd) })
	require.NoError(t, unix.Fchdir(int(open(t, dir).fd()))) // a socket's path is short
	require.NoError(t, unix.Bind(fd, &unix.SockaddrUnix{Name: "socket"}))
	names := []string{"absolute", "relative", "folderlink", "folderlink/secret", "magic", "loop", "fifo", "folder", "socket", "../x", "/etc/passwd", "fifo/x"}
	if os.Geteuid() == 0 {
		require.NoError(t, unix.Mknod(filepath.Join(dir, "device"), unix.S_IFCHR|0o666, int(unix.Mkdev(1, 5)))) // /dev/zero
		require.NoError(t, unix.Mknod(filepath.Join(dir, "disk"), unix.S_IFBLK|0o666, int(unix.Mkdev(7, 0))))
		names = append(names, "device", "disk")
	}
	return names
}

func TestNothingButRegularFilesIsRead(t *testing.T) {
	dir := t.TempDir()
	r := open(t, dir)
	for _, name := range plant(t, dir, "SECRET") {
		within(t, func() {
			raw, err := r.ReadFile(name, 1<<20)
			require.Error(t, err, name)
			require.Empty(t, raw, name)
			_, err = r.ReadTail(name, 1<<20)
			require.Error(t, err, name)
			if name != "folder" {
				require.Error(t, r.Overwrite(name, []byte("x"), 0o600), name)
				_, err = r.OpenRoot(name)
				require.Error(t, err, name)
				_, err = r.MkdirAll(filepath.Join(name, "new"), 0o755, -1, -1)
				require.Error(t, err, name)
			}
			require.Error(t, r.Create(name, []byte("x"), 0o600, -1, -1), name)
		})
	}
	out, err := os.Readlink(filepath.Join(dir, "folderlink"))
	require.NoError(t, err)
	entries, err := os.ReadDir(out)
	require.NoError(t, err)
	require.Len(t, entries, 1, "nothing was made behind the link")
	raw, err := os.ReadFile(filepath.Join(out, "secret"))
	require.NoError(t, err)
	require.Equal(t, "SECRET", string(raw))

	for _, name := range []string{"relative", "folder", "fifo"} {
		_, err := r.ReadFile(name, 10)
		require.ErrorIs(t, err, ErrKind, name)
	}
}

func TestReadingHasALimit(t *testing.T) {
	dir := t.TempDir()
	r := open(t, dir)
	require.NoError(t, r.Create("huge", []byte("begin"), 0o600, -1, -1))
	require.NoError(t, os.Truncate(filepath.Join(dir, "huge"), 8<<40))
	_, err := r.ReadFile("huge", 4096)
	require.ErrorIs(t, err, ErrTooLarge)
	tail, err := r.ReadTail("huge", 4096)
	require.NoError(t, err)
	require.Len(t, tail, 4096)
	require.NoError(t, r.Overwrite("huge", []byte("small"), 0o640))
	raw, err := r.ReadFile("huge", 5)
	require.NoError(t, err)
	require.Equal(t, "small", string(raw), "as long as the limit is not too long")
	tail, err = r.ReadTail("huge", 3)
	require.NoError(t, err)
	require.Equal(t, "all", string(tail))
	_, err = Read(strings.NewReader("123456"), 5)
	require.ErrorIs(t, err, ErrTooLarge)
}

func TestNewFilesAndFoldersHaveTheModeThatIsAskedFor(t *testing.T) {
	dir := t.TempDir()
	r := open(t, dir)
	sub, err := r.MkdirAll("a/b/c", 0o2777, -1, -1)
	require.NoError(t, err)
	defer sub.Close()
	require.NoError(t, sub.Create("f", []byte("x"), 0o666, -1, -1))
	for name, want := range map[string]uint32{"a": 0o2777, "a/b/c": 0o2777, "a/b/c/f": 0o666} {
		st, err := r.Lstat(name)
		require.NoError(t, err)
		require.Equal(t, want, st.Mode&0o7777, name)
	}
	require.ErrorIs(t, sub.Create("f", nil, 0o600, -1, -1), fs.ErrExist)
}

// TestSwappedFoldersLeadNowhere swaps a folder for a link to another one, as
// fast as it can, while files are made in it.
func TestSwappedFoldersLeadNowhere(t *testing.T) {
	dir, out := t.TempDir(), t.TempDir()
	r := open(t, dir)
	require.NoError(t, os.Mkdir(filepath.Join(dir, "real"), 0o755))
	require.NoError(t, os.Symlink(out, filepath.Join(dir, "trap")))
	var stop atomic.Bool
	done := make(chan struct{})
	go func() {
		defer close(done)
		for !stop.Load() {
			_ = unix.Renameat2(r.fd(), "real", r.fd(), "trap", unix.RENAME_EXCHANGE)
		}
	}()
	made := 0
	for i := range 1500 {
		if r.Create("real/"+strconv.Itoa(i), []byte("x"), 0o600, -1, -1) == nil {
			made++
		}
		if sub, err := r.MkdirAll("real/d"+strconv.Itoa(i)+"/e", 0o755, -1, -1); err == nil {
			sub.Close()
		}
		_ = r.RemoveAll(t.Context(), "real/d"+strconv.Itoa(i))
	}
	stop.Store(true)
	<-done
	require.Positive(t, made)
	entries, err := os.ReadDir(out)
	require.NoError(t, err)
	require.Empty(t, entries)
}

func TestRemovingFollowsNothing(t *testing.T) {
	dir := t.TempDir()
	r := open(t, dir)
	require.NoError(t, os.Mkdir(filepath.Join(dir, "pod"), 0o755))
	plant(t, filepath.Join(dir, "pod"), "SECRET")
	out, err := os.Readlink(filepath.Join(dir, "pod", "folderlink"))
	require.NoError(t, err)
	require.NoError(t, r.RemoveAll(t.Context(), "pod/none"))
	within(t, func() { require.NoError(t, r.RemoveAll(t.Context(), "pod")) })
	require.NoDirExists(t, filepath.Join(dir, "pod"))
	require.FileExists(t, filepath.Join(out, "secret"))
	require.NoError(t, RemoveAll(t.Context(), filepath.Join(dir, "gone", "too")))
}

func TestRemovingCrossesNoMount(t *testing.T) {
	needs.Root(t, "mounts")
	dir, out := t.TempDir(), t.TempDir()
	require.NoError(t, os.WriteFile(filepath.Join(out, "keep"), nil, 0o600))
	at := filepath.Join(dir, "pod", "deep", "mount")
	require.NoError(t, os.MkdirAll(at, 0o755))
	require.NoError(t, unix.Mount(out, at, "", unix.MS_BIND, ""))
	t.Cleanup(func() { _ = unix.Unmount(at, unix.MNT_DETACH) })
	r := open(t, dir)
	require.Error(t, r.RemoveAll(t.Context(), "pod"))
	require.FileExists(t, filepath.Join(out, "keep"))
	_, err := r.ReadFile("pod/deep/mount/keep", 10)
	require.ErrorIs(t, err, ErrKind)
	m, err := OpenRoot(at)
	require.NoError(t, err)
	mounted, _, err := m.IsMountPoint()
	require.NoError(t, errors.Join(err, m.Close()))
	require.True(t, mounted)
	mounted, _, err = r.IsMountPoint()
	require.NoError(t, err)
	require.False(t, mounted)
	require.NoError(t, unix.Unmount(at, 0))
	require.NoError(t, r.RemoveAll(t.Context(), "pod"))
}

// TestRemovingGoesOn: one thing that cannot be removed, near the top or deep down, does
// not keep the room of all else.
func TestRemovingGoesOn(t *testing.T) {
	needs.Root(t, "mounts")
	for _, depth := range []int{1, 3, maxDepth - 1, maxDepth, 5 * maxDepth} {
		dir := t.TempDir()
		r := open(t, dir)
		deep := "pod" + strings.Repeat("/d", depth)
		at, err := r.MkdirAll(deep+"/stays", 0o755, -1, -1)
		require.NoError(t, err)
		at.Close()
		for sub := deep; sub != "."; sub = filepath.Dir(sub) {
			for i := range 20 {
				require.NoError(t, r.Create(sub+"/f"+strconv.Itoa(i), nil, 0o600, -1, -1))
			}
		}
		require.NoError(t, unix.Mount(t.TempDir(), filepath.Join(dir, deep, "stays"), "", unix.MS_BIND, ""))
		t.Cleanup(func() { _ = Unmount(dir) })
		require.ErrorIs(t, r.RemoveAll(t.Context(), "pod"), unix.EBUSY)
		files := 0
		var mounted string
		require.NoError(t, filepath.WalkDir(filepath.Join(dir, "pod"), func(path string, d fs.DirEntry, err error) error {
			if !d.IsDir() {
				files++
			}
			if d.Name() == "stays" {
				mounted = path
			}
			return err
		}))
		require.Zero(t, files, depth)
		require.NotEmpty(t, mounted)
		require.NoError(t, unix.Unmount(mounted, 0))
		require.NoError(t, r.RemoveAll(t.Context(), "pod"))
		require.NoDirExists(t, filepath.Join(dir, "pod"))
	}
}

// TestRemovingATreeOfAnyShape has fewer descriptors than the tree is deep; not
// parallel, as that limit is the process'.
func TestRemovingATreeOfAnyShape(t *testing.T) {
	var old unix.Rlimit
	require.NoError(t, unix.Getrlimit(unix.RLIMIT_NOFILE, &old))
	low := old
	low.Cur = min(old.Cur, 256)
	dir := t.TempDir()
	r := open(t, dir)
	at, err := r.MkdirAll("pod/volume", 0o755, -1, -1)
	require.NoError(t, err)
	require.NoError(t, at.Create("removing-1", nil, 0o600, -1, -1)) // a name that removing would like to use
	for range 1500 {
		next, err := at.Mkdir("d", 0o755, -1, -1)
		require.NoError(t, err)
		require.NoError(t, at.Create("f", nil, 0, -1, -1))
		at.Close()
		at = next
	}
	at.Close()
	wide, err := r.MkdirAll("pod/wide", 0o755, -1, -1)
	require.NoError(t, err)
	for i := range 2500 {
		require.NoError(t, wide.Create(strconv.Itoa(i), nil, 0o600, -1, -1))
	}
	wide.Close()

	ended, cancel := context.WithCancel(t.Context())
	cancel()
	require.ErrorIs(t, r.RemoveAll(ended, "pod"), context.Canceled)
	require.NoError(t, unix.Setrlimit(unix.RLIMIT_NOFILE, &low))
	defer unix.Setrlimit(unix.RLIMIT_NOFILE, &old)
	require.NoError(t, r.RemoveAll(t.Context(), "pod"))
	require.NoDirExists(t, filepath.Join(dir, "pod"))
	entries, err := os.ReadDir(dir)
	require.NoError(t, err)
	require.Empty(t, entries)
}

func TestRemovingTakesTheImmutableFlagAway(t *testing.T) {
	needs.Root(t, "sets file flags")
	dir := t.TempDir()
	r := open(t, dir)
	require.NoError(t, os.MkdirAll(filepath.Join(dir, "pod", "sub"), 0o755))
	require.NoError(t, r.Create("pod/sub/f", nil, 0o600, -1, -1))
	for _, name := range []string{"pod/sub/f", "pod/sub"} {
		f, err := os.Open(filepath.Join(dir, name))
		require.NoError(t, err)
		err = unix.IoctlSetPointerInt(int(f.Fd()), unix.FS_IOC_SETFLAGS, 0x10)
		f.Close()
		if errors.Is(err, unix.ENOTTY) || errors.Is(err, unix.EOPNOTSUPP) {
			t.Skip("this file system has no such flags")
		}
		require.NoError(t, err)
	}
	require.NoError(t, r.RemoveAll(t.Context(), "pod"))
	require.NoDirExists(t, filepath.Join(dir, "pod"))
}

func TestPin(t *testing.T) {
	dir := t.TempDir()
	r := open(t, dir)
	for _, name := range plant(t, dir, "SECRET") {
		if name == "folder" {
			continue
		}
		within(t, func() {
			_, err := r.Pin(name)
			require.Error(t, err, name)
			p, err := r.PinOrMake(name)
			require.Error(t, err, name)
			require.Nil(t, p)
			_, err = r.PinOrMake(filepath.Join(name, "new"))
			require.Error(t, err, name)
		})
	}
	require.NoError(t, unix.Chmod(dir, 0o1770))
	require.NoError(t, os.Symlink("folder", filepath.Join(dir, "inside")))
	require.NoError(t, os.Symlink("nowhere", filepath.Join(dir, "dangling")))
	_, err := r.PinOrMake("dangling")
	require.Error(t, err)
	require.NoFileExists(t, filepath.Join(dir, "nowhere"))
	p, err := r.PinOrMake("inside/new/er")
	require.NoError(t, err)
	require.True(t, p.IsDir())
	require.NoError(t, p.Close())
	st, err := r.Lstat("folder/new/er")
	require.NoError(t, err)
	require.EqualValues(t, 0o1770, st.Mode&0o7777, "as the root has it")
	require.NoError(t, r.Create("folder/file", []byte("pinned"), 0o600, -1, -1))
	p, err = r.Pin("inside/file")
	require.NoError(t, err)
	require.False(t, p.IsDir())
	require.NoError(t, r.Rename("folder/file", "folder/elsewhere"))
	raw, err := os.ReadFile(p.Path())
	require.NoError(t, errors.Join(err, p.Close()))
	require.Equal(t, "pinned", string(raw))
}
