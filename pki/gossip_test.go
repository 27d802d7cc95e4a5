package pki

import (
	"bytes"
	"encoding/base64"
	"io/fs"
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"
)

func TestSeal(t *testing.T) {
	t.Parallel()
	b := newBundle(t)
	sealed, err := b.Seal([]byte("secret"), []byte("of this"))
	require.NoError(t, err)
	require.NotContains(t, string(sealed), "secret")
	plain, err := b.Unseal(sealed, []byte("of this"))
	require.NoError(t, err)
	require.Equal(t, "secret", string(plain))
	again, err := LoadBundle(b.Dir())
	require.NoError(t, err)
	_, err = again.Unseal(sealed, []byte("of this"))
	require.NoError(t, err, "another controller has the same bundle")
	_, err = b.Unseal(sealed, []byte("of that"))
	require.ErrorContains(t, err, "ca.key")
	_, err = newBundle(t).Unseal(sealed, []byte("of this"))
	require.Error(t, err)
	for i := range sealed {
		bad := bytes.Clone(sealed)
		bad[i]++
		_, err = b.Unseal(bad, []byte("of this"))
		require.Error(t, err)
		_, err = b.Unseal(sealed[:i], []byte("of this"))
		require.Error(t, err)
	}
}

// TestGossipKeysOfANode: an agent of before has one, in a file of its own; what is
// rotated stays when its certificate is renewed.
func TestGossipKeysOfANode(t *testing.T) {
	t.Parallel()
	b := newBundle(t)
	dir := filepath.Join(t.TempDir(), "a1")
	node := newNode(t, b, "a1")
	require.NoError(t, node.Save(dir))
	keys := filepath.Join(dir, gossipKeysFile)
	require.NoError(t, os.Remove(keys))
	before, err := LoadNode(dir, "a1")
	require.NoError(t, err)
	require.Equal(t, node.GossipKeys, before.GossipKeys, "saved by an agent of before")

	next := [][]byte{bytes.Repeat([]byte{1}, GossipKeySize), b.GossipKey()}
	require.NoError(t, SaveGossipKeys(dir, next))
	info, err := os.Stat(keys)
	require.NoError(t, err)
	require.Equal(t, fs.FileMode(0o600), info.Mode().Perm())
	require.NoError(t, node.SaveCertificate(dir))
	loaded, err := LoadNode(dir, "a1")
	require.NoError(t, err)
	require.Equal(t, next, loaded.GossipKeys)

	for _, bad := range [][][]byte{nil, {nil}, {next[0][:31]}, {next[0], next[0], next[0], next[0], next[0]}} {
		require.Error(t, SaveGossipKeys(dir, bad))
	}
	for _, text := range []string{"", "x\n", base64.StdEncoding.EncodeToString(next[0][:5]) + "\n", string(bytes.Repeat([]byte(base64.StdEncoding.EncodeToString(next[0])+"\n"), 9))} {
		require.NoError(t, os.WriteFile(keys, []byte(text), 0o600))
		_, err = LoadNode(dir, "a1")
		require.ErrorContains(t, err, gossipKeysFile)
	}
	require.NoError(t, os.Chmod(keys, 0o644))
	_, err = LoadNode(dir, "a1")
	require.ErrorContains(t, err, "chmod 600")
}
