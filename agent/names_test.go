package agent

import (
	"log/slog"
	"net/netip"
	"os"
	"testing"

	"github.com/stretchr/testify/require"

	"timonel/agent/pod"
	pb "timonel/proto/timonel/v1"
)

// TestNames: what pods are told is what the flags say, else what the controllers do,
// now or before this process.
func TestNames(t *testing.T) {
	t.Parallel()
	ours := &pb.Cluster{ClusterDomain: "corp.example", ClusterDns: []string{"10.96.0.10", "fd00::a", "none", "127.0.0.1"}}
	for _, tc := range []struct {
		name   string
		config Config
		said   *pb.Cluster
		want   pod.DNS
		serves int
	}{
		{"a controller that does not say", Config{}, &pb.Cluster{}, pod.DNS{Domain: "cluster.local"}, 0},
		{"as controllers say", Config{}, ours, pod.DNS{Servers: []string{"10.96.0.10", "fd00::a"}, Domain: "corp.example"}, 2},
		{"another domain", Config{ClusterDomain: "a.example"}, ours, pod.DNS{Servers: []string{"10.96.0.10", "fd00::a"}, Domain: "a.example"}, 2},
		{"others' servers", Config{ClusterDNS: []string{"10.96.0.10"}}, ours, pod.DNS{Servers: []string{"10.96.0.10"}, Domain: "corp.example"}, 0},
		{"no servers", Config{ClusterDNS: []string{NoClusterDNS}}, ours, pod.DNS{Domain: "corp.example"}, 0},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			tc.config.DataDir = t.TempDir()
			newAgent := func() *Agent {
				a := &Agent{cfg: tc.config, log: slog.New(slog.DiscardHandler), namesChanged: make(chan struct{}, 1)}
				a.names = a.loadNames()
				return a
			}
			a := newAgent()
			a.learnNames(tc.said)
			require.Equal(t, tc.want, a.podDNS())
			require.Len(t, a.serves().Addresses, tc.serves)
			require.Equal(t, tc.said == ours, len(a.namesChanged) == 1)

			next := newAgent()
			require.Equal(t, tc.want, next.podDNS(), "kept")
			next.learnNames(tc.said)
			require.Empty(t, next.namesChanged, "it is the same")
			next.learnNames(&pb.Cluster{}) // an older controller
			require.Equal(t, tc.want, next.podDNS())
			require.NoError(t, os.WriteFile(tc.config.namesPath(), []byte("{"), 0o600))
			require.Equal(t, names{}, newAgent().names, "a damaged file is as none")
		})
	}
	pods := []netip.Prefix{netip.MustParsePrefix("10.244.0.0/16")}
	require.True(t, names{"a", []netip.Addr{{}}, pods}.equal(names{"a", []netip.Addr{{}}, pods}))
	require.False(t, names{"a", nil, nil}.equal(names{"b", nil, nil}))
	require.False(t, names{"a", nil, pods}.equal(names{"a", nil, nil}))
}
