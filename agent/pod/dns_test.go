package pod

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

func TestDNS(t *testing.T) {
	t.Parallel()
	file := filepath.Join(t.TempDir(), "resolv.conf")
	require.NoError(t, os.WriteFile(file, []byte("# mine\nnameserver 9.9.9.9\nsearch example.com svc.cluster.local\noptions timeout:1\n"), 0o644))
	two := "2"
	var many []string
	for i := range 33 {
		many = append(many, fmt.Sprintf("s%d.example", i))
	}
	long := strings.Repeat("a.", 126) + "bc" // 254
	wide := strings.Repeat("a.", 120) + "bc" // 242
	search := func(paths ...string) *corev1.PodDNSConfig {
		return &corev1.PodDNSConfig{Nameservers: []string{"1.1.1.1"}, Searches: paths}
	}
	nine := make([]string, 9)
	for i := range nine {
		nine[i] = string(rune('a'+i)) + wide[1:]
	}
	none := corev1.DNSNone
	cluster := []string{"10.96.0.10"}
	for _, tc := range []struct {
		name    string
		spec    corev1.PodSpec
		cluster []string
		want    [3][]string // servers, searches, options
		events  []string
	}{
		{"default", corev1.PodSpec{DNSPolicy: corev1.DNSDefault}, cluster, [3][]string{{"9.9.9.9"}, {"example.com", "svc.cluster.local"}, {"timeout:1"}}, nil},
		{"cluster", corev1.PodSpec{DNSPolicy: corev1.DNSClusterFirst}, cluster,
			[3][]string{cluster, {"ns.svc.cluster.local", "svc.cluster.local", "cluster.local", "example.com"}, {"ndots:5"}}, nil},
		{"cluster without one", corev1.PodSpec{DNSPolicy: corev1.DNSClusterFirst}, nil, [3][]string{{"9.9.9.9"}, {"example.com", "svc.cluster.local"}, {"timeout:1"}},
			[]string{`pod: "p_ns(u)". kubelet does not have ClusterDNS IP configured and cannot create Pod using "ClusterFirst" policy. Falling back to "Default" policy.`}},
		{"host network", corev1.PodSpec{DNSPolicy: corev1.DNSClusterFirst, HostNetwork: true}, cluster, [3][]string{{"9.9.9.9"}, {"example.com", "svc.cluster.local"}, {"timeout:1"}}, nil},
		{"host network with the cluster's", corev1.PodSpec{DNSPolicy: corev1.DNSClusterFirstWithHostNet, HostNetwork: true}, cluster,
			[3][]string{cluster, {"ns.svc.cluster.local", "svc.cluster.local", "cluster.local", "example.com"}, {"ndots:5"}}, nil},
		{"none but the pod's", corev1.PodSpec{DNSPolicy: none, DNSConfig: &corev1.PodDNSConfig{Nameservers: []string{"1.1.1.1"}, Options: []corev1.PodDNSConfigOption{{Name: "ndots", Value: &two}, {Name: "edns0"}}}},
			nil, [3][]string{{"1.1.1.1"}, nil, {"ndots:2", "edns0"}}, nil},
		{"the pod's are added", corev1.PodSpec{DNSPolicy: corev1.DNSClusterFirst, DNSConfig: &corev1.PodDNSConfig{
			Nameservers: []string{"10.96.0.10", "1.1.1.1"}, Searches: []string{"cluster.local", "a.example"}, Options: []corev1.PodDNSConfigOption{{Name: "ndots", Value: &two}}}},
			cluster, [3][]string{{"10.96.0.10", "1.1.1.1"}, {"ns.svc.cluster.local", "svc.cluster.local", "cluster.local", "example.com", "a.example"}, {"ndots:2"}}, nil},
		{"too many servers", corev1.PodSpec{DNSPolicy: corev1.DNSDefault, DNSConfig: &corev1.PodDNSConfig{Nameservers: []string{"1.1.1.1", "2.2.2.2", "3.3.3.3"}}}, cluster,
			[3][]string{{"9.9.9.9", "1.1.1.1", "2.2.2.2"}, {"example.com", "svc.cluster.local"}, {"timeout:1"}},
			[]string{"Nameserver limits were exceeded, some nameservers have been omitted, the applied nameserver line is: 9.9.9.9 1.1.1.1 2.2.2.2"}},
		{"too many paths", corev1.PodSpec{DNSPolicy: none, DNSConfig: search(many...)}, cluster, [3][]string{{"1.1.1.1"}, many[:32], nil},
			[]string{"Search Line limits were exceeded, some search paths have been omitted, the applied search line is: " + strings.Join(many[:32], " ")}},
		{"a path that is too long", corev1.PodSpec{DNSPolicy: none, DNSConfig: search("a", long, "b")}, cluster, [3][]string{{"1.1.1.1"}, {"a", "b"}, nil},
			[]string{"Search Line limits were exceeded, some search paths have been omitted, the applied search line is: a b"}},
		{"a line that is too long", corev1.PodSpec{DNSPolicy: none, DNSConfig: search(nine...)}, cluster, [3][]string{{"1.1.1.1"}, nine[:8], nil},
			[]string{"Search Line limits were exceeded, some search paths have been omitted, the applied search line is: " + strings.Join(nine[:8], " ")}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			m := &Manager{cfg: Config{ResolvConf: file, DNS: func() DNS { return DNS{tc.cluster, "cluster.local"} }}}
			got, err := m.dnsConfig(&corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: "p", UID: "u"}, Spec: tc.spec})
			require.NoError(t, err)
			want := func(i int) []string {
				if tc.want[i] == nil {
					return []string{}
				}
				return tc.want[i]
			}
			require.Equal(t, want(0), append([]string{}, got.Servers...))
			require.Equal(t, want(1), append([]string{}, got.Searches...))
			require.Equal(t, want(2), append([]string{}, got.Options...))
			events := got.omitted
			if got.missing != "" {
				events = append(events, got.missing)
			}
			require.Equal(t, tc.events, events)
		})
	}
}
