package podnet

import (
	"fmt"
	"net/netip"
	"testing"

	"github.com/stretchr/testify/require"

	"timonel/internal/podrange"
)

var testGuard = Guard{
	Pods:     podrange.Ranges{Networks: []netip.Prefix{netip.MustParsePrefix("10.244.0.0/16"), netip.MustParsePrefix("fd00:244::/48"), netip.MustParsePrefix("172.30.0.0/20")}},
	Services: []netip.Prefix{netip.MustParsePrefix("10.96.0.0/16"), netip.MustParsePrefix("fd00:96::/112")},
	Keep:     []netip.Addr{netip.MustParseAddr("10.9.0.11"), netip.MustParseAddr("10.96.0.10")},
}

func TestRangesThatAreRefused(t *testing.T) {
	t.Parallel()
	own := []netip.Addr{netip.MustParseAddr("10.9.0.101"), netip.MustParseAddr("fd00:9::101")}
	old := Guard{Keep: testGuard.Keep} // an older controller says no more
	for _, tc := range []struct{ text, plain, unknown string }{
		{"10.244.7.0/24", "", ""},
		{"172.30.7.0/24", "", ""},
		{"fd00:244:0:7::/64", "", ""},
		{"172.30.16.0/24", "not of the pods'", ""},
		{"fd00:244:0:7::/65", "not a /64", ""},
		{"nonsense", "not a network", "not a network"},
		{"0.0.0.0/0", "not of the pods'", "wider"},
		{"::/0", "not of the pods'", "wider"},
		{"0.0.0.0/1", "not of the pods'", "wider"},
		{"10.0.0.0/8", "not of the pods'", "wider"},
		{"10.244.0.0/16", "not a /24", ""},
		{"10.244.7.0/25", "not a /24", ""},
		{"10.9.0.0/24", "not of the pods'", "must stay in reach"},
		{"10.9.0.101/32", "not of the pods'", "own address"},
		{"10.9.0.11/32", "not of the pods'", "must stay in reach"},
		{"10.96.0.0/24", "not of the pods'", "must stay in reach"},
		{"127.0.0.0/24", "not of the pods'", "no pods"},
		{"169.254.169.0/24", "not of the pods'", "no pods"},
		{"224.1.0.0/24", "not of the pods'", "no pods"},
		{"255.255.255.0/24", "not of the pods'", "no pods"},
		{"fe80::/64", "not of the pods'", "no pods"},
		{"::ffff:0.0.0.0/96", "not of the pods'", "no pods"},
		{"fd00:9::/64", "not of the pods'", "own address"},
		{"fd00:7::/64", "not of the pods'", ""},
	} {
		for _, c := range []struct {
			guard Guard
			want  string
		}{{testGuard, tc.plain}, {old, tc.unknown}} {
			_, err := c.guard.checkRange(tc.text, own)
			if c.want == "" {
				require.NoError(t, err, tc.text)
			} else {
				require.ErrorContains(t, err, c.want, tc.text)
			}
		}
	}
}

func TestOnlyRangesThatAreOnesOwnBecomeRoutes(t *testing.T) {
	t.Parallel()
	own := []netip.Addr{netip.MustParseAddr("10.9.0.101")}
	ranges := []netip.Prefix{netip.MustParsePrefix("10.244.1.0/24")}
	var many []string
	for i := range 300 {
		many = append(many, fmt.Sprintf("10.%d.0.0/24", i%200))
	}
	hops, err := testGuard.sift(ranges, []Peer{
		{Name: "a2", CIDRs: []string{"10.244.2.0/24"}, Addresses: []string{"10.9.0.102"}},
		{Name: "own-range", CIDRs: []string{"10.244.1.0/24"}, Addresses: []string{"10.9.0.103"}},
		{Name: "a2-again", CIDRs: []string{"10.244.2.0/24"}, Addresses: []string{"10.9.0.104"}},
		{Name: "a2-address", CIDRs: []string{"10.244.5.0/24"}, Addresses: []string{"10.9.0.102"}},
		{Name: "controller", CIDRs: []string{"10.244.6.0/24"}, Addresses: []string{"10.9.0.11"}},
		{Name: "me", CIDRs: []string{"10.244.8.0/24"}, Addresses: []string{"10.9.0.101"}},
		{Name: "loop", CIDRs: []string{"10.244.9.0/24"}, Addresses: []string{"127.0.0.1"}},
		{Name: "all", CIDRs: append(many, "0.0.0.0/0", "0.0.0.0/1", "::/0"), Addresses: []string{"10.9.0.105"}},
	}, own)
	require.ErrorContains(t, err, "and ")
	require.LessOrEqual(t, len(err.Error()), 1000)
	var got []string
	for _, h := range hops {
		for _, ip := range h.addresses {
			got = append(got, h.dst.String()+" via "+ip.String())
		}
	}
	require.Equal(t, []string{"10.244.2.0/24 via 10.9.0.102"}, got)

	// Where the pods' network is not known, ranges of any size are compared.
	old := Guard{Keep: testGuard.Keep}
	hops, err = old.sift(nil, []Peer{
		{Name: "a2", CIDRs: []string{"10.50.2.0/24"}, Addresses: []string{"10.9.0.102"}},
		{Name: "around", CIDRs: []string{"10.50.0.0/16"}, Addresses: []string{"10.9.0.103"}},
		{Name: "within", CIDRs: []string{"10.50.2.128/25"}, Addresses: []string{"10.9.0.104"}},
		{Name: "over-a2", CIDRs: []string{"10.9.0.96/28"}, Addresses: []string{"10.9.0.105"}},
		{Name: "a6", CIDRs: []string{"10.50.3.0/24"}, Addresses: []string{"10.9.0.106"}},
	}, own[:0])
	require.ErrorContains(t, err, "overlaps 10.50.2.0/24")
	require.ErrorContains(t, err, "holds the address")
	require.Len(t, hops, 2)
}
