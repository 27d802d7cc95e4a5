package podnet

import (
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"testing"

	"github.com/stretchr/testify/require"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"timonel/test/needs"
)

// inNamespace runs f in a network namespace of its own, where a device has the
// addresses.
func inNamespace(t *testing.T, addresses []string, f func()) {
	t.Helper()
	needs.Root(t, "makes a network namespace")
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread() // and never unlocked: the thread ends with its namespace
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			t.Error(err)
			return
		}
		link := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "eth0"}, PeerName: "eth1"}
		for _, err := range []error{netlink.LinkAdd(link), netlink.LinkSetUp(link)} {
			if err != nil {
				t.Error(err)
				return
			}
		}
		for _, text := range addresses {
			addr, err := netlink.ParseAddr(text)
			if err == nil {
				err = netlink.AddrAdd(link, addr)
			}
			if err != nil {
				t.Error(err)
				return
			}
		}
		f()
	}()
	<-done
}

func newTestNetwork(t *testing.T, dir string) *Network {
	bin := filepath.Join(dir, "bin")
	require.NoError(t, os.MkdirAll(bin, 0o755))
	for _, plugin := range []string{"bridge", "host-local", "loopback"} {
		require.NoError(t, os.WriteFile(filepath.Join(bin, plugin), nil, 0o755))
	}
	n, err := New(Config{
		Name: "n", Bridge: "br-test", ConfDir: filepath.Join(dir, "conf"), StateDir: filepath.Join(dir, "state"), BinDir: bin,
		Table: "timonel-test", Keep: testGuard.Keep, Logger: slog.New(slog.DiscardHandler),
	})
	require.NoError(t, err)
	return n
}

// routesVia lists the routes of the namespace that have a next hop.
func routesVia(t *testing.T) (out []string) {
	routes, err := netlink.RouteList(nil, netlink.FAMILY_ALL)
	require.NoError(t, err)
	for _, r := range routes {
		if r.Gw != nil && r.Dst != nil {
			out = append(out, r.Dst.String()+" via "+r.Gw.String())
		}
	}
	slices.Sort(out)
	return out
}

// TestRoutesOfAHostileNode is what a node that joined did to all the others: its pod
// ranges covered the controllers.
func TestRoutesOfAHostileNode(t *testing.T) {
	inNamespace(t, []string{"10.9.0.101/24"}, func() {
		dir := t.TempDir()
		n := newTestNetwork(t, dir)
		good := Peer{Name: "a2", CIDRs: []string{"10.244.2.0/24"}, Addresses: []string{"10.9.0.102"}}
		evil := Peer{Name: "evil", CIDRs: []string{"10.9.0.0/28", "10.9.0.11/32", "0.0.0.0/1", "10.244.2.0/25", "10.244.66.0/24"}, Addresses: []string{"10.9.0.166"}}
		_, err := n.Update([]string{"10.244.1.0/24"}, []Peer{good, evil}, testGuard)
		require.ErrorContains(t, err, "pod range of node evil")
		require.Equal(t, []string{"10.244.2.0/24 via 10.9.0.102", "10.244.66.0/24 via 10.9.0.166"}, routesVia(t))

		// What an older controller lets through is refused too.
		_, err = n.Update([]string{"10.244.1.0/24"}, []Peer{good, evil}, Guard{Keep: testGuard.Keep})
		require.Error(t, err)
		require.Equal(t, []string{"10.244.2.0/24 via 10.9.0.102", "10.244.66.0/24 via 10.9.0.166"}, routesVia(t))

		// A Node that is gone has no routes.
		_, err = n.Update([]string{"10.244.1.0/24"}, []Peer{good}, testGuard)
		require.NoError(t, err)
		require.Equal(t, []string{"10.244.2.0/24 via 10.9.0.102"}, routesVia(t))

		// A range that this node should have, and cannot, changes nothing.
		changed, err := n.Update([]string{"0.0.0.0/1"}, []Peer{good}, testGuard)
		require.ErrorContains(t, err, "own pod range")
		require.False(t, changed)
		require.Equal(t, []string{"10.244.1.0/24"}, n.CIDRs())
		require.Equal(t, []string{"10.244.2.0/24 via 10.9.0.102"}, routesVia(t))

		// Routes that are not ours stay: an administrator's to the same place too.
		_, elsewhere, _ := net.ParseCIDR("10.244.3.0/24")
		link, err := netlink.LinkByName("eth0")
		require.NoError(t, err)
		require.NoError(t, netlink.RouteAdd(&netlink.Route{Dst: elsewhere, Gw: net.ParseIP("10.9.0.1"), LinkIndex: link.Attrs().Index, Protocol: unix.RTPROT_STATIC}))
		_, err = n.Update([]string{"10.244.1.0/24"}, []Peer{good, {Name: "a3", CIDRs: []string{"10.244.3.0/24"}, Addresses: []string{"10.9.0.103"}}}, testGuard)
		require.ErrorContains(t, err, "not the agent's")
		require.Equal(t, []string{"10.244.2.0/24 via 10.9.0.102", "10.244.3.0/24 via 10.9.0.1"}, routesVia(t))

		// An agent that starts removes what an earlier version let in, without having
		// reached a controller.
		_, away, _ := net.ParseCIDR("10.9.0.0/28")
		require.NoError(t, netlink.RouteAdd(&netlink.Route{Dst: away, Gw: net.ParseIP("10.9.0.166"), LinkIndex: link.Attrs().Index, Protocol: routeProtocol}))
		n = newTestNetwork(t, dir)
		require.Equal(t, []string{"10.244.2.0/24 via 10.9.0.102", "10.244.3.0/24 via 10.9.0.1"}, routesVia(t))
		require.Equal(t, []string{"10.244.1.0/24"}, n.CIDRs())

		require.NoError(t, Remove(n.cfg))
		require.Equal(t, []string{"10.244.3.0/24 via 10.9.0.1"}, routesVia(t))
	})
}

func FuzzSift(f *testing.F) {
	f.Add("10.244.1.0/24", "10.9.0.2", "0.0.0.0/1", "::1")
	f.Fuzz(func(t *testing.T, cidr1, via1, cidr2, via2 string) {
		hops, _ := testGuard.sift(nil, []Peer{{Name: "x", CIDRs: []string{cidr1, cidr2}, Addresses: []string{via1}}, {Name: "y", CIDRs: []string{cidr2, cidr1}, Addresses: []string{via2}}}, nil)
		for i, h := range hops {
			require.NoError(t, testGuard.Pods.CheckPart(h.dst))
			require.False(t, slices.ContainsFunc(hops[:i], func(o hop) bool { return o.dst.Overlaps(h.dst) }))
			for _, ip := range h.addresses {
				require.False(t, testGuard.Pods.Contains(ip))
				require.NotEqual(t, netip.MustParseAddr("10.9.0.11"), ip)
			}
		}
	})
}
