package main

import (
	"bytes"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"testing"

	"github.com/stretchr/testify/require"

	"timonel/pki"
)

// TestGossipKeysAreKept: what a controller tells is on the disk before it is said to be
// kept, and is what the agent starts with; what cannot be kept is used and not said.
func TestGossipKeysAreKept(t *testing.T) {
	j, _ := serve(t)
	o := &options{name: "a1", dataDir: t.TempDir()}
	dir := credentialsDir(o.dataDir)
	request, err := pki.NewNodeRequest("a1")
	require.NoError(t, err)
	cert, err := j.bundle.SignNode(request.CSR, "a1")
	require.NoError(t, err)
	node := &pki.Node{CA: j.bundle.CA(), Pair: pki.KeyPair{Cert: cert, Key: request.Key}, GossipKeys: [][]byte{j.bundle.GossipKey()}}
	require.NoError(t, node.Save(dir))
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	require.NoError(t, l.Close())
	_, port, err := net.SplitHostPort(l.Addr().String())
	require.NoError(t, err)
	o.gossipPort, err = strconv.Atoi(port)
	require.NoError(t, err)

	p := &pool{o: o, keys: node.GossipKeys, log: slog.New(slog.DiscardHandler), advertise: "127.0.0.1"}
	next := bytes.Repeat([]byte{1}, pki.GossipKeySize)
	// Before the pool is open, as when the agent has just started.
	install := [][]byte{j.bundle.GossipKey(), next}
	require.NoError(t, p.setKeys(install))
	require.Equal(t, pki.GossipKeyIDs(install), p.keyIDs())
	p.open(j.bundle.ClusterID())
	defer p.close()
	require.NotNil(t, p.p)
	for _, keys := range [][][]byte{{next, j.bundle.GossipKey()}, {next}} {
		require.NoError(t, p.setKeys(keys))
		require.Equal(t, pki.GossipKeyIDs(keys), p.keyIDs())
		again, err := pki.LoadNode(dir, "a1")
		require.NoError(t, err)
		require.Equal(t, keys, again.GossipKeys)
	}
	for _, bad := range [][][]byte{nil, {next[:16]}, {next, next, next, next, next}} {
		require.Error(t, p.setKeys(bad))
	}
	require.Equal(t, pki.GossipKeyIDs([][]byte{next}), p.keyIDs())

	// The disk takes nothing: a folder is in the way.
	require.NoError(t, os.MkdirAll(filepath.Join(dir, "gossip.keys.tmp"), 0o700))
	last := bytes.Repeat([]byte{2}, pki.GossipKeySize)
	require.Error(t, p.setKeys([][]byte{last}))
	require.Equal(t, pki.GossipKeyIDs([][]byte{next}), p.keyIDs(), "it is not said to be kept")
	_, err = p.p.ProbeAddr(t.Context(), "a1", p.p.Addr())
	require.NoError(t, err)
}
