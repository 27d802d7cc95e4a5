package dns

import (
	"net"
	"net/netip"
	"path/filepath"
	"runtime"
	"testing"

	"github.com/stretchr/testify/require"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"

	"timonel/test/needs"
)

// TestAddresses puts the server's addresses on a machine of its own, a namespace, and
// takes no other away.
func TestAddresses(t *testing.T) {
	needs.Root(t, "makes a network namespace")
	runtime.LockOSThread() // and never unlocked: the thread ends with the test
	space, err := netns.New()
	require.NoError(t, err)
	defer space.Close()
	dns4, dns6, other := netip.MustParseAddr("10.96.0.10"), netip.MustParseAddr("fd00:96::a"), netip.MustParseAddr("10.96.0.11")
	lo, err := netlink.LinkByName(loopback)
	require.NoError(t, err)
	has := func() (out []string) {
		list, err := netlink.AddrList(lo, netlink.FAMILY_ALL)
		require.NoError(t, err)
		for _, a := range list {
			if !a.IP.IsLoopback() {
				out = append(out, a.IP.String())
			}
		}
		return out
	}
	path := filepath.Join(t.TempDir(), "addresses.json")
	a := NewAddresses(path)
	for range 2 {
		require.NoError(t, a.Set([]netip.Addr{dns4, dns6}))
		require.Equal(t, []string{"10.96.0.10", "fd00:96::a"}, has())
	}
	for _, ip := range []netip.Addr{dns4, dns6} {
		l, err := net.Listen("tcp", netip.AddrPortFrom(ip, 53).String())
		require.NoError(t, err, "it can be listened on")
		require.NoError(t, l.Close())
	}
	// A new process, and another address.
	a = NewAddresses(path)
	require.NoError(t, netlink.AddrAdd(lo, addressOf(other)))
	require.NoError(t, a.Set([]netip.Addr{dns4, other}))
	require.Equal(t, []string{"10.96.0.10", "10.96.0.11"}, has())
	require.NoError(t, netlink.AddrDel(lo, addressOf(dns4)))
	require.NoError(t, a.Set(nil), "one that is gone already")
	require.Equal(t, []string{"10.96.0.11"}, has(), "somebody else's stays")
	require.NoError(t, a.Set(nil))
}
