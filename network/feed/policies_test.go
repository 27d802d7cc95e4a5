package feed

import (
	"fmt"
	"slices"
	"testing"

	"github.com/stretchr/testify/require"
	"google.golang.org/protobuf/proto"

	"timonel/network/feed/wire"
	pb "timonel/proto/timonel/v1"
)

func policyItem(namespace, name string, groups ...string) *pb.NetworkPolicyItem {
	return &pb.NetworkPolicyItem{Namespace: namespace, Name: name, Ingress: []*pb.NetworkRule{{Groups: groups}}}
}

func partOf(of, part string, address ...byte) *pb.NetworkGroup {
	return &pb.NetworkGroup{Of: of, Name: of + "." + part, V4: address}
}

func TestChangesOfPolicies(t *testing.T) {
	t.Parallel()
	s := NewStore("a1")
	s.Update(func(t *Txn) {
		t.SetService(service("default", "web", ""))
		t.SetPolicy(policyItem("default", "p", "g"))
		t.SetGroup(partOf("g", "x0", 10, 0, 0, 1))
		t.SetGroup(partOf("g", "x1"))
		t.SetGroup(partOf("g2", "x"))
		t.SetPod(&pb.NetworkPod{Namespace: "default", Name: "web-0"})
		t.SetTold(3)
	})
	c, err := s.Changes(t.Context(), 0)
	require.NoError(t, err)
	require.True(t, c.Policy)
	require.Equal(t, map[Name]struct{}{{"default", "p"}: {}}, c.PoliciesChanged)
	require.Equal(t, map[string]struct{}{"g": {}, "g2": {}}, c.GroupsChanged)
	require.Equal(t, map[Name]struct{}{{"default", "web-0"}: {}}, c.PodsChanged)
	require.Equal(t, map[Name]struct{}{{"default", "web"}: {}}, c.Services)
	parts, ok := c.View.Group("g")
	require.True(t, ok)
	require.Equal(t, []string{"g.x0", "g.x1"}, []string{parts[0].Name, parts[1].Name})
	_, ok = c.View.Group("g3")
	require.False(t, ok)
	require.Len(t, slices.Collect(c.View.Policies()), 1)
	require.Len(t, slices.Collect(c.View.Pods()), 1)

	after, before := c.View.Revision(), c.View
	s.Update(func(t *Txn) { t.RemoveGroup("g.x1"); t.RemoveGroup("g.x2"); t.RemovePod(Name{"default", "other"}) })
	c, err = s.Changes(t.Context(), after)
	require.NoError(t, err)
	require.Equal(t, map[string]struct{}{"g": {}}, c.GroupsChanged)
	require.Empty(t, c.PoliciesChanged)
	require.Empty(t, c.PodsChanged)
	parts, _ = before.Group("g")
	require.Len(t, parts, 2, "a view changed")

	after = c.View.Revision()
	s.Update(func(t *Txn) { t.SetTold(3) })
	require.Equal(t, after, s.View().Revision())
	s.Update(func(t *Txn) { t.SetTold(4) })
	c, err = s.Changes(t.Context(), after)
	require.NoError(t, err)
	require.True(t, c.Policy, "who waits for a revision is told")
	require.Empty(t, c.GroupsChanged)

	after = c.View.Revision()
	s.Update(func(t *Txn) { t.SetService(service("default", "web", "10.96.0.1")) })
	c, err = s.Changes(t.Context(), after)
	require.NoError(t, err)
	require.False(t, c.Policy)
}

// What comes of policies is seen when it is whole, over the end of a stream too.
func TestPoliciesAreSeenWhenTheyAreWhole(t *testing.T) {
	t.Parallel()
	c := NewClient(Config{Store: NewStore("a1"), Logger: quiet})
	number := uint64(0)
	take := func(s *following, b *pb.NetworkBatch, set ...proto.Message) {
		t.Helper()
		for _, m := range set {
			raw, err := proto.Marshal(m)
			require.NoError(t, err)
			kind := pb.NetworkKind_NETWORK_KIND_POLICY
			switch m.(type) {
			case *pb.NetworkGroup:
				kind = pb.NetworkKind_NETWORK_KIND_GROUP
			case *pb.NetworkPod:
				kind = pb.NetworkKind_NETWORK_KIND_POD
			}
			b.Set = append(b.Set, &pb.NetworkItem{Kind: kind, Object: raw})
		}
		number++
		b.Sequence = number
		require.NoError(t, s.take(b))
	}
	all := wire.All()
	first := &following{c: c, stream: &said{}, wait: firstAsk}
	defer first.stop()
	take(first, &pb.NetworkBatch{Epoch: "cluster", List: all[:]},
		&pb.NetworkPod{Namespace: "default", Name: "web-0", Policies: []*pb.NetworkPolicyRef{{Namespace: "default", Name: "p"}}}, policyItem("default", "p", "g"))
	require.Nil(t, c.cfg.Store.View().Pod(Name{"default", "web-0"}), "a pod is seen before its policies' groups")
	take(first, &pb.NetworkBatch{Revision: 5}, partOf("g", "x"))
	v := c.cfg.Store.View()
	require.NotNil(t, v.Pod(Name{"default", "web-0"}))
	_, ok := v.Group("g")
	require.True(t, ok)
	require.EqualValues(t, 5, v.Told())
	require.False(t, v.Synced())
	take(first, &pb.NetworkBatch{Synced: true})

	take(first, &pb.NetworkBatch{Remove: []*pb.NetworkKey{{Kind: pb.NetworkKind_NETWORK_KIND_GROUP, Name: "g.x"}}}, partOf("g2", "x"))
	_, ok = c.cfg.Store.View().Group("g")
	require.True(t, ok, "a group went before its policy")
	require.Len(t, c.staged, 2)

	// The stream ends here. The next one knows by the digest that the rest is there.
	second := &following{c: c, stream: &said{}, wait: firstAsk}
	defer second.stop()
	take(second, &pb.NetworkBatch{List: all[:], Epoch: "cluster"}, policyItem("default", "p", "g2"), &pb.NetworkPod{Namespace: "default", Name: "web-0"})
	whole := c.digest.Whole()
	take(second, &pb.NetworkBatch{Synced: true, Revision: 9, Digest: whole[:]}, partOf("g2", "x"))
	v = c.cfg.Store.View()
	_, ok = v.Group("g")
	require.False(t, ok)
	_, ok = v.Group("g2")
	require.True(t, ok)
	require.Equal(t, "g2", v.Policy("default", "p").Ingress[0].Groups[0])
	require.Empty(t, c.staged)
	require.Equal(t, fmt.Sprint(9), fmt.Sprint(v.Told()))
}
