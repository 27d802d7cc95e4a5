package pki

import (
	"crypto/tls"
	"crypto/x509"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// A controller's configs, and their clones, show the certificates of now, without
// being made again.
func TestControllerRenewsWhileItRuns(t *testing.T) {
	t.Parallel()
	b := newBundle(t)
	var ago atomic.Int64
	ago.Store(int64(leafLifetime - time.Minute)) // it was started nearly a year ago
	b.now = func() time.Time { return time.Now().Add(-time.Duration(ago.Load())) }
	c1, err := b.Controller("c1", nil, nil)
	require.NoError(t, err)
	b2 := *b
	b2.now = time.Now
	c2, err := b2.Controller("c2", nil, nil)
	require.NoError(t, err)
	require.WithinDuration(t, time.Now().Add(time.Minute), c1.Expires(), time.Minute)
	require.WithinDuration(t, b.now().Add(leafLifetime*2/3), c1.Renewal(), time.Minute)
	require.True(t, c1.Renewal().Before(time.Now()), "it is overdue")
	files, err := c1.WriteFiles(t.TempDir())
	require.NoError(t, err)

	server, client, raft := c1.ClusterServerTLS().Clone(), c1.ClusterClientTLS().Clone(), c1.RaftTLS().Clone()
	shown := func(config *tls.Config) *x509.Certificate { // as a server
		var leaf *x509.Certificate
		other := c2.ClusterClientTLS()
		verify := other.VerifyConnection
		other.VerifyConnection = func(state tls.ConnectionState) error {
			leaf = state.PeerCertificates[0]
			return verify(state)
		}
		_, serverErr, clientErr := handshake(t, config, other)
		require.NoError(t, serverErr)
		require.NoError(t, clientErr)
		return leaf
	}
	old, oldRaft := shown(server), shown(raft)
	ago.Store(0)
	require.NoError(t, c1.Renew())
	require.WithinDuration(t, time.Now().Add(leafLifetime), c1.Expires(), time.Minute)
	for name, leaf := range map[string][2]*x509.Certificate{"cluster port": {old, shown(server)}, "raft": {oldRaft, shown(raft)}} {
		require.Greater(t, leaf[1].NotAfter.Sub(leaf[0].NotAfter), leafLifetime/2, name)
		require.NotEqual(t, leaf[0].RawSubjectPublicKeyInfo, leaf[1].RawSubjectPublicKeyInfo, name)
	}
	for name, config := range map[string]*tls.Config{"client": client, "raft": raft} {
		seen, serverErr, clientErr := handshake(t, c2.RaftTLS(), config)
		require.NoError(t, serverErr, name)
		require.NoError(t, clientErr, name)
		require.Equal(t, Identity{RoleController, "c1"}, seen)
	}

	before, err := tls.LoadX509KeyPair(files.APIServingCert, files.APIServingKey)
	require.NoError(t, err)
	again, err := c1.WriteFiles(filepath.Dir(files.CA))
	require.NoError(t, err)
	require.Equal(t, files, again)
	after, err := tls.LoadX509KeyPair(files.APIServingCert, files.APIServingKey)
	require.NoError(t, err)
	require.Greater(t, after.Leaf.NotAfter.Sub(before.Leaf.NotAfter), leafLifetime/2)
	require.Equal(t, before.Leaf.DNSNames, after.Leaf.DNSNames)
	require.Equal(t, len(before.Leaf.IPAddresses), len(after.Leaf.IPAddresses))
}

// Towards the end of the authority there is nothing to gain, and renewals do not
// follow one another ever faster.
func TestRenewalsNearTheAuthoritysEnd(t *testing.T) {
	t.Parallel()
	b := newBundle(t)
	now := b.ca.cert.NotAfter.Add(-10 * time.Minute)
	b.now = func() time.Time { return now }
	c, err := b.Controller("c1", nil, nil)
	require.NoError(t, err)
	require.Equal(t, b.ca.cert.NotAfter, c.Expires())
	require.Equal(t, now.Add(minRenewal), c.Renewal())
}
