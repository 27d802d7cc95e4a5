package dispatch

import (
	"context"
	"log/slog"
	"sync"
	"testing"

	"github.com/stretchr/testify/require"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/status"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"timonel/agent/stream"
	netfeed "timonel/network/feed"
	pb "timonel/proto/timonel/v1"
)

// An agent that calls Network learns there of the other nodes, and is not sent all of
// them whenever one changes; an older agent is, as before.
func TestRoutesAreToldByNetwork(t *testing.T) {
	t.Parallel()
	c := newCluster(t, "c1", "c2")
	c.put(&corev1.Service{ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: "web"}})
	store := netfeed.NewStore("a1")
	client := netfeed.NewClient(netfeed.Config{Store: store, Logger: slog.New(slog.DiscardHandler)})
	var mu sync.Mutex
	var told []*pb.Cluster
	c.realAgentWith(func(config *stream.Config) {
		config.Network = client.Follow
		config.Cluster = func(news *pb.Cluster) {
			mu.Lock()
			defer mu.Unlock()
			told = append(told, news)
		}
	}, "a1", c.addr("c1"), c.addr("c2"))
	eventually(t, "the Service is known", func() bool {
		return store.View().Synced() && store.View().Service(netfeed.Name{Namespace: "default", Name: "web"}) != nil
	})
	older, _ := c.realAgent("a2", c.addr("c1"))
	other := nodeObject("a3")
	other.Spec.PodCIDRs = []string{"10.244.3.0/24"}
	c.put(other)
	eventually(t, "the nodes are known", func() bool {
		return store.View().Node("a1") != nil && store.View().Node("a2") != nil &&
			len(store.View().Node("a3").GetPodCidrs()) == 1 && store.View().Node("a3").GetNodeAddress() == nodeAddress("a3")
	})
	eventually(t, "the older agent is connected", func() bool {
		_, _, connected := older.Connected()
		return connected
	})
	mu.Lock()
	defer mu.Unlock()
	require.NotEmpty(t, told)
	for _, cl := range told {
		require.True(t, cl.RoutesInNetwork)
		require.Empty(t, cl.Routes)
		require.Equal(t, "10.244.0.0/16", cl.PodNetwork)
		require.Equal(t, []string{"10.244.0.0/16", "fd00:244::/48", "10.12.0.0/20"}, cl.PodNetworks)
		require.Equal(t, []string{"10.244.255.0/24", "fd00:96::/112"}, cl.ServiceNetworks)
	}
}

// The feed goes on at another controller when this one loses touch.
func TestNetworkGoesOnElsewhere(t *testing.T) {
	t.Parallel()
	c := newCluster(t, "c1", "c2")
	store := netfeed.NewStore("a1")
	client := netfeed.NewClient(netfeed.Config{Store: store, Logger: slog.New(slog.DiscardHandler)})
	c.realAgentWith(func(config *stream.Config) { config.Network = client.Follow }, "a1", c.addr("c1"), c.addr("c2"))
	eventually(t, "synced", func() bool { return store.View().Synced() })
	for _, k := range []string{"c1", "c2"} {
		if c.controllers[k].NetworkFigures().Streams > 0 {
			c.controllers[k].cutOff()
			break
		}
	}
	c.put(&corev1.Service{ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: "web"}})
	eventually(t, "the Service is known", func() bool { return store.View().Service(netfeed.Name{Namespace: "default", Name: "web"}) != nil })
}

func TestNetworkIsForNodes(t *testing.T) {
	t.Parallel()
	c := newCluster(t, "c1")
	admin, err := c.bundle.Controller("c9", nil, nil)
	require.NoError(t, err)
	conn, err := grpc.NewClient("passthrough:///"+c.addr("c1"), append(DialOptions(), grpc.WithTransportCredentials(credentials.NewTLS(admin.ClusterClientTLS())))...)
	require.NoError(t, err)
	defer conn.Close()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	s, err := pb.NewAgentsClient(conn).Network(ctx)
	if err == nil {
		_, err = s.Recv()
	}
	require.Equal(t, codes.PermissionDenied, status.Code(err), "%v", err)
}
