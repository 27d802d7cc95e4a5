package network

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"google.golang.org/protobuf/proto"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"pgregory.net/rapid"

	pb "timonel/proto/timonel/v1"
)

// testChecks refuse one address and its range, which may change.
type testChecks struct{ forbidden netip.Addr }

func (c *testChecks) CheckRange(text string) (netip.Prefix, error) {
	p, err := netip.ParsePrefix(text)
	if err == nil && p.Contains(c.forbidden) {
		err = fmt.Errorf("%s holds %s", p, c.forbidden)
	}
	return p, err
}

func (c *testChecks) CheckAddress(ip netip.Addr) error {
	if ip == c.forbidden {
		return fmt.Errorf("%s is taken", ip)
	}
	return nil
}

func node(name, address string, created int64, cidrs ...string) *corev1.Node {
	n := &corev1.Node{
		ObjectMeta: metav1.ObjectMeta{Name: name, CreationTimestamp: metav1.Unix(created, 0)}, Spec: corev1.NodeSpec{PodCIDRs: cidrs},
	}
	if address != "" {
		n.Status.Addresses = []corev1.NodeAddress{{Type: corev1.NodeInternalIP, Address: address}}
	}
	return n
}

func TestARangeGoesToTheNextWhenItsOwnerGoes(t *testing.T) {
	t.Parallel()
	r := NewRoutes(&testChecks{})
	r.Set(node("b", "192.0.2.1", 2, "10.1.0.0/24"))
	require.Equal(t, map[string]struct{}{"a": {}, "b": {}}, r.Set(node("a", "192.0.2.1", 1, "10.1.0.0/24")))
	route, why := r.Route("b")
	require.Empty(t, route.PodCidrs)
	require.Len(t, why, 2)
	require.Empty(t, r.Set(node("a", "192.0.2.1", 1, "10.1.0.0/24")), "nothing changed")
	require.Equal(t, map[string]struct{}{"a": {}, "b": {}}, r.Remove("a"))
	route, why = r.Route("b")
	require.Equal(t, []string{"10.1.0.0/24"}, route.PodCidrs)
	require.Equal(t, "192.0.2.1", route.NodeAddress)
	require.Empty(t, why)
	route, _ = r.Route("a")
	require.Nil(t, route)
}

// A node is told of by one address of each family, the first, whatever else it says.
func TestAddressesOfTwoFamilies(t *testing.T) {
	t.Parallel()
	for want, all := range map[string][]string{
		"192.0.2.1 [2001:db8::1]": {"192.0.2.1", "192.0.2.7", "2001:db8::1", "2001:db8::7"},
		"2001:db8::1 [192.0.2.1]": {"2001:db8::1", "192.0.2.1", "192.0.2.7"},
		"192.0.2.1 []":            {"192.0.2.1", "192.0.2.7"},
	} {
		n := node("a", "", 1)
		for _, ip := range all {
			n.Status.Addresses = append(n.Status.Addresses, corev1.NodeAddress{Type: corev1.NodeInternalIP, Address: ip})
		}
		r := NewRoutes(&testChecks{})
		r.Set(n)
		route, why := r.Route("a")
		require.Empty(t, why)
		require.Equal(t, want, fmt.Sprint(route.NodeAddress, " ", route.MoreAddresses))
	}
}

// The routes that follow changes, of those of which they say that they changed, are
// those of looking at all Nodes.
func TestRoutesAreAFold(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		checks := &testChecks{}
		r, nodes, told := NewRoutes(checks), map[string]*corev1.Node{}, map[string]*pb.NodeRoute{}
		name := rapid.SampledFrom([]string{"a", "b", "c", "d"})
		address := rapid.SampledFrom([]string{"", "192.0.2.1", "192.0.2.2", "10.1.0.7", "nonsense"})
		second := rapid.SampledFrom([]string{"", "192.0.2.2", "2001:db8::1", "2001:db8::2"})
		cidrs := rapid.SliceOfN(rapid.SampledFrom([]string{"10.1.0.0/24", "10.1.1.0/24", "10.1.2.0/24", "nonsense"}), 0, 3)
		tell := func(touched map[string]struct{}) {
			for n := range touched {
				if route, _ := r.Route(n); route != nil {
					told[n] = route
				} else {
					delete(told, n)
				}
			}
		}
		t.Repeat(map[string]func(*rapid.T){
			"set": func(t *rapid.T) {
				n := node(name.Draw(t, "name"), address.Draw(t, "address"), rapid.Int64Range(1, 3).Draw(t, "created"), cidrs.Draw(t, "cidrs")...)
				if text := second.Draw(t, "second address"); text != "" {
					n.Status.Addresses = append(n.Status.Addresses, corev1.NodeAddress{Type: corev1.NodeInternalIP, Address: text})
				}
				nodes[n.Name] = n
				tell(r.Set(n))
			},
			"remove": func(t *rapid.T) {
				n := name.Draw(t, "name")
				delete(nodes, n)
				tell(r.Remove(n))
			},
			"recheck": func(t *rapid.T) {
				checks.forbidden, _ = netip.ParseAddr(address.Draw(t, "forbidden"))
				tell(r.Recheck())
			},
			"": func(t *rapid.T) {
				want, _ := AllRoutes(checks, maps.Values(nodes))
				if len(want) != len(told) {
					t.Fatalf("told of %v, want %v", told, want)
				}
				for _, w := range want {
					if !proto.Equal(w, told[w.NodeName]) {
						t.Fatalf("told %v, want %v", told[w.NodeName], w)
					}
				}
				owners := map[string]string{}
				for _, w := range want {
					for _, what := range slices.Concat(w.PodCidrs, []string{w.NodeAddress}, w.MoreAddresses) {
						if what != "" && owners[what] != "" {
							t.Fatalf("%s is of %s and of %s", what, owners[what], w.NodeName)
						}
						owners[what] = w.NodeName
					}
				}
			},
		})
	})
}

func BenchmarkRoutesOfOneNodeAmong5000(b *testing.B) {
	r := NewRoutes(&testChecks{})
	for i := range 5000 {
		r.Set(node(fmt.Sprint("n", i), fmt.Sprintf("192.0.%d.%d", i/250, i%250), time.Now().Unix(), fmt.Sprintf("10.%d.%d.0/24", i/250, i%250)))
	}
	for i := 0; b.Loop(); i++ {
		for name := range r.Set(node("n7", "192.0.0.7", 1, fmt.Sprintf("10.99.%d.0/24", i%2))) {
			r.Route(name)
		}
	}
}
