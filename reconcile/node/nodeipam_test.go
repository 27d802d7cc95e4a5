package node_test

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"timonel/internal/podrange"
	"timonel/reconcile/node"
	"timonel/reconcile/storytest"
)

// Nodes get a range of each family, of the next network when the first has none left, and
// none at all where one family has none.
func TestRangesOfTwoFamilies(t *testing.T) {
	t.Parallel()
	pods, err := podrange.Parse([]string{"10.244.0.0/22", "fd00:244::/61", "10.12.0.0/21"})
	require.NoError(t, err)
	pods.Bits4 = 23
	w := storytest.NewWorld(t)
	ipam := node.NodeIPAM{Pods: pods}
	require.NoError(t, ipam.Validate())
	s := storytest.New(w, ipam)
	for i := range 7 {
		w.Add(storytest.Node(fmt.Sprintf("a%d", i)))
	}
	s.Start()
	told := s.Run(1000)
	require.Equal(t, 1, strings.Count(told, "CIDRNotAvailable"), told)
	require.Contains(t, told, "event a6 CIDRNotAvailable: All pod ranges of 10.244.0.0/22, 10.12.0.0/21 are taken")
	ranges := map[string][]string{}
	for n := range w.Snapshot().Nodes().All() {
		ranges[n.Name] = n.Spec.PodCIDRs
	}
	require.Equal(t, map[string][]string{
		"a0": {"10.244.0.0/23", "fd00:244::/64"}, "a1": {"10.244.2.0/23", "fd00:244:0:1::/64"},
		"a2": {"10.12.0.0/23", "fd00:244:0:2::/64"}, "a3": {"10.12.2.0/23", "fd00:244:0:3::/64"},
		"a4": {"10.12.4.0/23", "fd00:244:0:4::/64"}, "a5": {"10.12.6.0/23", "fd00:244:0:5::/64"},
		"a6": nil,
	}, ranges)

	// It is tried again when a network is added, as by controllers with another flag.
	pods.Networks = append(pods.Networks, netip.MustParsePrefix("10.13.0.0/23"))
	s = storytest.New(w, node.NodeIPAM{Pods: pods})
	s.Start()
	s.Run(1000)
	for n := range w.Snapshot().Nodes().All() {
		if n.Name == "a6" {
			require.Equal(t, []string{"10.13.0.0/23", "fd00:244:0:6::/64"}, n.Spec.PodCIDRs)
		}
	}
}
