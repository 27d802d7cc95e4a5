package dns

import (
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/miekg/dns"
	"github.com/stretchr/testify/require"
)

func TestClients(t *testing.T) {
	t.Parallel()
	now, looks := time.Unix(1000, 0), 0
	own := []string{"192.0.2.7/24", "fd00::7/64", "127.0.0.1/8", "::1/128", "fe80::1/64"}
	c := newClients([]netip.Prefix{netip.MustParsePrefix("10.244.0.0/16"), netip.MustParsePrefix("fd00:244::/48")})
	c.now = func() time.Time { return now }
	c.own = func() (out []net.Addr, err error) {
		looks++
		for _, text := range own {
			ip, n, err := net.ParseCIDR(text)
			require.NoError(t, err)
			out = append(out, &net.IPNet{IP: ip, Mask: n.Mask})
		}
		return out, nil
	}
	for text, want := range map[string]bool{
		"10.244.3.9": true, "fd00:244:0:3::9": true, "127.0.0.1": true, "127.0.0.53": true, "::1": true,
		"192.0.2.7": true, "fd00::7": true, "fe80::1%eth0": true,
		"192.0.2.8": false, "198.51.100.1": false, "fd00::8": false, "10.245.0.1": false,
	} {
		now = now.Add(2 * ownEvery)
		require.Equal(t, want, c.has(netip.MustParseAddr(text)), text)
	}
	// Strangers do not have it look all the time, and an address that comes is found.
	before := looks
	for range 1000 {
		require.False(t, c.has(netip.MustParseAddr("192.0.2.9")))
	}
	require.LessOrEqual(t, looks, before+1)
	own = append(own, "192.0.2.9/24")
	now = now.Add(2 * ownEvery)
	require.True(t, c.has(netip.MustParseAddr("192.0.2.9")))
	require.True(t, newClients(nil).has(netip.MustParseAddr("198.51.100.1")), "a server that is told of no pods")
}

func TestStrangersAreNotAnswered(t *testing.T) {
	t.Parallel()
	pods := []netip.Prefix{netip.MustParsePrefix("10.244.0.0/16")}
	s, addr := server(t, cluster(), func(c *Config) { c.Pods = pods })
	require.Equal(t, dns.RcodeSuccess, exchange(t, "udp", addr, ask("svc1.testns.svc.cluster.local.", dns.TypeA)).Rcode, "this machine asks")
	s.clients.mu.Lock()
	s.clients.known, s.clients.own = nil, func() ([]net.Addr, error) { return nil, nil } // the address that this test asks from is nobody's
	s.clients.mu.Unlock()
	for _, network := range []string{"udp", "tcp"} {
		c := dns.Client{Net: network, Timeout: 300 * time.Millisecond}
		r, _, err := c.Exchange(ask("svc1.testns.svc.cluster.local.", dns.TypeA), addr)
		require.Error(t, err, "%s: %v", network, r)
	}
}
