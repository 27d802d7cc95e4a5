package pki

import (
	"crypto/tls"
	"net"
	"testing"

	"github.com/stretchr/testify/require"
)

// TestCallToOneController: who is called is told by the certificate, wherever the
// connection led.
func TestCallToOneController(t *testing.T) {
	t.Parallel()
	bundle := newBundle(t)
	one, err := bundle.Controller("c1", nil, nil)
	require.NoError(t, err)
	two, err := bundle.Controller("c2", nil, nil)
	require.NoError(t, err)
	call := func(name string) error {
		listener, err := tls.Listen("tcp", "127.0.0.1:0", two.ClusterServerTLS())
		require.NoError(t, err)
		defer listener.Close()
		go func() {
			conn, err := listener.Accept()
			if err == nil {
				_ = conn.(*tls.Conn).Handshake()
				conn.Close()
			}
		}()
		raw, err := net.Dial("tcp", listener.Addr().String())
		require.NoError(t, err)
		defer raw.Close()
		return tls.Client(raw, one.ClusterClientTLSTo(name)).Handshake()
	}
	require.NoError(t, call("c2"))
	require.ErrorContains(t, call("c1"), "the other end is not controller c1 but")
}
