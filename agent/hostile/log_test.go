package hostile

import (
	"bytes"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"
)

func TestRenameNewReplacesNothing(t *testing.T) {
	dir := t.TempDir()
	r := open(t, dir)
	for _, name := range []string{"a", "b"} {
		require.NoError(t, os.WriteFile(filepath.Join(dir, name), []byte(name), 0o600))
	}
	require.ErrorIs(t, r.RenameNew("a", "b"), fs.ErrExist)
	require.NoError(t, r.RenameNew("a", "c"))
	require.Error(t, r.RenameNew("c", "../c"))
	raw, err := os.ReadFile(filepath.Join(dir, "b"))
	require.NoError(t, err)
	require.Equal(t, "b", string(raw))
}

func TestHasWriter(t *testing.T) {
	path := filepath.Join(t.TempDir(), "log")
	w, err := os.OpenFile(path, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	require.NoError(t, err)
	f, err := open(t, filepath.Dir(path)).Open("log")
	require.NoError(t, err)
	defer f.Close()
	busy, err := HasWriter(f)
	require.NoError(t, err)
	require.True(t, busy)
	require.NoError(t, w.Close())
	busy, err = HasWriter(f)
	require.NoError(t, err)
	require.False(t, busy)
	// Asking leaves nothing in the way of the next one.
	w, err = os.OpenFile(path, os.O_WRONLY|os.O_APPEND, 0)
	require.NoError(t, err)
	require.NoError(t, w.Close())
}

// TestKeepTailAndSpill cuts files of all kinds, in a folder with everything that
// is none.
func TestKeepTailAndSpill(t *testing.T) {
	dir := t.TempDir()
	r := open(t, dir)
	lines := bytes.Repeat([]byte("0123456789abcde\n"), 1<<16) // 1 MiB
	for _, tc := range []struct {
		name string
		old  []byte
		want []byte
	}{
		{"short", []byte("x\n"), []byte("x\n")},
		{"lines", lines, lines[:100<<10]},
		{"no lines", bytes.Repeat([]byte("x"), 1<<20), bytes.Repeat([]byte("x"), 100<<10+5)},
	} {
		path := filepath.Join(dir, tc.name)
		require.NoError(t, os.WriteFile(path, tc.old, 0o640))
		require.NoError(t, r.KeepTail(tc.name, "tmp", 100<<10+5), tc.name)
		raw, err := os.ReadFile(path)
		require.NoError(t, err)
		require.True(t, bytes.Equal(tc.want, raw), "%s: %d bytes", tc.name, len(raw))
		st, err := os.Stat(path)
		require.NoError(t, err)
		require.Equal(t, fs.FileMode(0o640), st.Mode(), tc.name)
		_, err = os.Stat(filepath.Join(dir, "tmp"))
		require.ErrorIs(t, err, fs.ErrNotExist)
	}
	path := filepath.Join(dir, "spilled")
	w, err := os.OpenFile(path, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	require.NoError(t, err)
	defer w.Close()
	_, err = w.Write(lines)
	require.NoError(t, err)
	require.NoError(t, r.Spill("spilled", "old", 2<<20))
	_, err = os.Stat(filepath.Join(dir, "old"))
	require.ErrorIs(t, err, fs.ErrNotExist, "it is not too long")
	require.NoError(t, os.Symlink("/etc/passwd", filepath.Join(dir, "old")))
	require.NoError(t, r.Spill("spilled", "old", 100<<10))
	_, err = w.WriteString("goes on")
	require.NoError(t, err)
	raw, err := os.ReadFile(path)
	require.NoError(t, err)
	require.Equal(t, "goes on", string(raw))
	raw, err = os.ReadFile(filepath.Join(dir, "old"))
	require.NoError(t, err)
	require.True(t, bytes.Equal(lines[:100<<10], raw))

	traps := t.TempDir()
	tr := open(t, traps)
	for _, name := range plant(t, traps, "SECRET") {
		within(t, func() {
			require.Error(t, tr.KeepTail(name, "tmp", 1), name)
			require.Error(t, tr.Spill(name, "tmp", 1), name)
		})
	}
	require.True(t, errors.Is(tr.KeepTail("absent", "tmp", 1), fs.ErrNotExist))
}
