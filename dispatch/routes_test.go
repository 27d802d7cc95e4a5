package dispatch

import (
	"fmt"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"timonel/dispatch/network"
	"timonel/internal/podrange"
)

var testNetwork = Network{
	Pods:     podrange.Ranges{Networks: []netip.Prefix{netip.MustParsePrefix("10.244.0.0/16"), netip.MustParsePrefix("fd00:244::/48"), netip.MustParsePrefix("10.12.0.0/20")}},
	Services: []netip.Prefix{netip.MustParsePrefix("10.244.255.0/24"), netip.MustParsePrefix("fd00:96::/112")},
	Controllers: func() []netip.Addr {
		return []netip.Addr{netip.MustParseAddr("192.0.2.11"), netip.MustParseAddr("10.244.40.1")}
	},
}

// TestRoutesAreOnesOwn is about what a node can claim with the Node it has.
func TestRoutesAreOnesOwn(t *testing.T) {
	t.Parallel()
	made := time.Unix(1_700_000_000, 0)
	node := func(name string, address string, cidrs ...string) *corev1.Node {
		made = made.Add(time.Second)
		return &corev1.Node{
			ObjectMeta: metav1.ObjectMeta{Name: name, CreationTimestamp: metav1.NewTime(made)}, Spec: corev1.NodeSpec{PodCIDRs: cidrs},
			Status: corev1.NodeStatus{Addresses: []corev1.NodeAddress{{Type: corev1.NodeInternalIP, Address: address}}},
		}
	}
	var many []string
	for i := range 300 {
		many = append(many, fmt.Sprintf("192.%d.2.0/24", i%256), fmt.Sprintf("0.0.0.0/%d", i%32))
	}
	for _, tc := range []struct {
		name    string
		node    *corev1.Node
		address string
		cidrs   []string
		why     string
	}{
		{"as it should be", node("b", "192.0.2.102", "10.244.2.0/24"), "192.0.2.102", []string{"10.244.2.0/24"}, ""},
		{"everything", node("b", "192.0.2.102", "0.0.0.0/0"), "192.0.2.102", nil, "not of the pods' network"},
		{"half of it", node("b", "192.0.2.102", "128.0.0.0/1"), "192.0.2.102", nil, "is not"},
		{"all pods", node("b", "192.0.2.102", "10.244.0.0/16"), "192.0.2.102", nil, "is not"},
		{"half a range", node("b", "192.0.2.102", "10.244.2.0/25"), "192.0.2.102", nil, "is not"},
		{"an address in a range", node("b", "192.0.2.102", "10.244.2.7/24"), "192.0.2.102", nil, "is not"},
		{"the controllers", node("b", "192.0.2.102", "192.0.2.0/24"), "192.0.2.102", nil, "is not"},
		{"a controller among the pods", node("b", "192.0.2.102", "10.244.40.0/24"), "192.0.2.102", nil, "controller's address"},
		{"the Services", node("b", "192.0.2.102", "10.244.255.0/24"), "192.0.2.102", nil, "Services"},
		{"IPv6", node("b", "192.0.2.102", "::/0", "fd00::/64"), "192.0.2.102", nil, "is not"},
		{"nonsense", node("b", "192.0.2.102", "all"), "192.0.2.102", nil, "not a network"},
		{"an older node's range", node("b", "192.0.2.102", "10.244.1.0/24"), "192.0.2.102", nil, "is the range of node a"},
		{"hundreds", node("b", "192.0.2.102", append(many, "10.244.2.0/24")...), "192.0.2.102", []string{"10.244.2.0/24"}, "is not"},
		{"an older node's address", node("b", "192.0.2.101", "10.244.2.0/24"), "", []string{"10.244.2.0/24"}, "is the address of node a"},
		{"a controller's address", node("b", "192.0.2.11", "10.244.2.0/24"), "", []string{"10.244.2.0/24"}, "controller's address"},
		{"loopback", node("b", "127.0.0.1", "10.244.2.0/24"), "", []string{"10.244.2.0/24"}, "not a unicast"},
		{"metadata", node("b", "169.254.169.254", "10.244.2.0/24"), "", []string{"10.244.2.0/24"}, "not a unicast"},
		{"multicast", node("b", "224.0.0.1", "10.244.2.0/24"), "", []string{"10.244.2.0/24"}, "not a unicast"},
		{"a Service", node("b", "10.244.255.1", "10.244.2.0/24"), "", []string{"10.244.2.0/24"}, "network"},
		{"IPv4 in IPv6", node("b", "::ffff:192.0.2.102", "10.244.2.0/24"), "", []string{"10.244.2.0/24"}, "not a unicast"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			older := &corev1.Node{
				ObjectMeta: metav1.ObjectMeta{Name: "z", CreationTimestamp: metav1.NewTime(time.Unix(1, 0))}, Spec: corev1.NodeSpec{PodCIDR: "10.244.1.0/24"},
				Status: corev1.NodeStatus{Addresses: []corev1.NodeAddress{{Type: corev1.NodeInternalIP, Address: "192.0.2.101"}}},
			}
			older.Name = "a"
			routes, why := network.AllRoutes(testNetwork, slices.Values([]*corev1.Node{tc.node, older}))
			require.Len(t, routes, 2)
			require.Equal(t, "192.0.2.101", routes[0].NodeAddress)
			require.Equal(t, []string{"10.244.1.0/24"}, routes[0].PodCidrs)
			require.Equal(t, tc.address, routes[1].NodeAddress)
			require.Equal(t, tc.cidrs, routes[1].PodCidrs)
			if tc.why == "" {
				require.Empty(t, why)
			} else {
				require.Contains(t, why[0], tc.why)
			}
		})
	}
}

func TestAddressesThatANodeMayNotHave(t *testing.T) {
	t.Parallel()
	c := newCluster(t, "c1")
	other := nodeObject("a2")
	other.Status.Addresses = []corev1.NodeAddress{{Type: corev1.NodeInternalIP, Address: "192.0.2.102"}}
	c.put(other)
	d := c.controllers["c1"]
	require.Eventually(t, func() bool { return d.CheckNodeAddress("a1", netip.MustParseAddr("192.0.2.102")) != nil }, patience, time.Millisecond)
	require.ErrorContains(t, d.CheckNodeAddress("a1", netip.MustParseAddr("192.0.2.102")), "the address of node a2")
	require.NoError(t, d.CheckNodeAddress("a2", netip.MustParseAddr("192.0.2.102")))
	require.NoError(t, d.CheckNodeAddress("a1", netip.MustParseAddr("192.0.2.103")))
	require.ErrorContains(t, d.CheckNodeAddress("a1", netip.MustParseAddr("192.0.2.11")), "controller's")
	require.ErrorContains(t, d.CheckNodeAddress("a1", netip.MustParseAddr("10.244.3.1")), "pods' network")
}

func TestAddressesThatAPodMayNotHave(t *testing.T) {
	t.Parallel()
	c := newCluster(t, "c1")
	for name, ranges := range map[string][]string{"a1": {"10.244.1.0/24", "fd00:244:0:1::/64"}, "a2": {"10.244.2.0/24"}, "liar": {"192.0.2.0/24", "0.0.0.0/0"}} {
		n := nodeObject(name)
		n.Spec.PodCIDRs = ranges
		n.Status.Addresses = []corev1.NodeAddress{{Type: corev1.NodeInternalIP, Address: nodeAddress(name)}, {Type: corev1.NodeHostName, Address: name}}
		c.put(n)
	}
	d := c.controllers["c1"]
	require.Eventually(t, func() bool {
		return d.CheckPodAddress("a1", false, netip.MustParseAddr("10.244.1.7")) == nil && d.CheckPodAddress("a2", false, netip.MustParseAddr("10.244.2.7")) == nil
	}, patience, time.Millisecond)
	for _, tc := range []struct {
		node, ip    string
		hostNetwork bool
		why         string
	}{
		{"a1", "fd00:244:0:1::7", false, ""},
		{"a1", "10.244.2.7", false, "not of the ranges of node a1"},
		{"a1", "fd00:244:0:2::7", false, "not of the ranges"},
		{"a1", "192.0.2.11", false, "not of the ranges"}, // a controller's
		{"a1", "10.244.255.1", false, "not of the ranges"},
		{"a1", "127.0.0.1", false, "not of the ranges"},
		{"a1", "169.254.169.254", false, "not of the ranges"},
		{"a1", "::ffff:10.244.1.7", false, "not of the ranges"},
		{"a1", nodeAddress("a1"), false, "not of the ranges"},
		{"a1", nodeAddress("a1"), true, ""},
		{"a1", nodeAddress("a2"), true, "not one of the addresses of node a1"},
		{"a1", "10.244.1.7", true, "not one of the addresses"},
		{"a1", "127.0.0.1", true, "not one of the addresses"},
		{"liar", "192.0.2.7", false, "not of the ranges"}, // a range that no node has
		{"nobody", "10.244.1.7", false, "there is no node nobody"},
	} {
		err := d.CheckPodAddress(tc.node, tc.hostNetwork, netip.MustParseAddr(tc.ip))
		if tc.why == "" {
			require.NoError(t, err, "%+v", tc)
		} else {
			require.ErrorContains(t, err, tc.why, "%+v", tc)
		}
	}
	foreign := &Dispatcher{config: d.config}
	foreign.config.Network.ForeignPods = true
	require.NoError(t, foreign.CheckPodAddress("a1", false, netip.MustParseAddr("10.244.2.7")))
	require.ErrorContains(t, foreign.CheckPodAddress("a1", false, netip.MustParseAddr("192.0.2.11")), "not of the pods' network")
	require.Error(t, foreign.CheckPodAddress("a1", true, netip.MustParseAddr("10.244.2.7")))
}
