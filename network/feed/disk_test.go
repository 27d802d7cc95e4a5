package feed

import (
	"bufio"
	"bytes"
	"log/slog"
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"

	"timonel/network/feed/wire"
	pb "timonel/proto/timonel/v1"
)

var quiet = slog.New(slog.DiscardHandler)

func known() *View {
	s := NewStore("a1")
	s.Update(func(t *Txn) {
		t.SetNode(&pb.NodeRoute{NodeName: "a1", PodCidrs: []string{"10.1.0.0/24"}, NodeAddress: "192.0.2.1"})
		t.SetService(service("default", "web", "10.96.0.1"))
		t.SetSlice(slice("default", "web-a", "web", "10.1.0.1"))
		t.SetPolicy(&pb.NetworkPolicyItem{Namespace: "default", Name: "p", IngressIsolated: true, Ingress: []*pb.NetworkRule{{Groups: []string{"g"}}}})
		t.SetGroup(&pb.NetworkGroup{Of: "g", Name: "g.x", V4: []byte{10, 1, 0, 1}})
		t.SetPod(&pb.NetworkPod{Namespace: "default", Name: "web-0", Uid: "u", Policies: []*pb.NetworkPolicyRef{{Namespace: "default", Name: "p"}}})
		t.SetTold(7)
		t.SetAddress(&pb.AddressHolder{Address: "192.0.2.9", NodeName: "a1", Number: 7})
		t.SetZone("z1")
		t.setSynced("cluster")
	})
	return s.View()
}

func TestWhatIsKeptComesBack(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "feed")
	require.NoError(t, write(path, known()))
	s := NewStore("a1")
	c := NewClient(Config{Store: s, Path: path, Logger: quiet})
	v := s.View()
	require.True(t, v.Synced())
	require.Equal(t, "z1", v.Zone())
	require.Equal(t, "cluster", c.epoch)
	require.Equal(t, "192.0.2.1", v.Node("a1").NodeAddress)
	require.Equal(t, "10.96.0.1", v.Service(Name{"default", "web"}).Spec.ClusterIP)
	require.Equal(t, []string{"web-a"}, sliceNames(v, Name{"default", "web"}))
	require.NotEqual(t, wire.Digest{}, c.digest)
	require.EqualValues(t, 7, v.Told())
	for a := range v.Addresses() {
		require.EqualValues(t, 7, a.Number)
		require.Equal(t, "a1", a.NodeName)
	}
	require.Equal(t, "p", v.Pod(Name{"default", "web-0"}).Policies[0].Name)
	require.Equal(t, "g", v.Policy("default", "p").Ingress[0].Groups[0])
	parts, ok := v.Group("g")
	require.True(t, ok)
	require.Equal(t, []byte{10, 1, 0, 1}, parts[0].V4)
}

// Whatever became of the file, what cannot be trusted is as nothing.
func TestADamagedFileIsAsNone(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "feed")
	require.NoError(t, write(path, known()))
	whole, err := os.ReadFile(path)
	require.NoError(t, err)
	for i := 0; i < len(whole); i += 7 {
		damaged := bytes.Clone(whole)
		damaged[i] ^= 0x10
		for _, raw := range [][]byte{damaged, whole[:i]} {
			require.NoError(t, os.WriteFile(path, raw, 0o600))
			s := NewStore("a1")
			c := NewClient(Config{Store: s, Path: path, Logger: quiet})
			require.Zero(t, s.View().Revision(), "byte %d", i)
			require.Empty(t, c.items)
			require.Equal(t, wire.Digest{}, c.digest)
		}
	}
}

func FuzzFile(f *testing.F) {
	var whole bytes.Buffer
	if err := encode(&whole, known()); err != nil {
		f.Fatal(err)
	}
	f.Add(whole.Bytes())
	f.Add([]byte(magic + "\x00\x00\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01"))
	f.Fuzz(func(t *testing.T, raw []byte) {
		c := NewClient(Config{Store: NewStore("a1"), Logger: quiet})
		if err := c.decode(bufio.NewReader(bytes.NewReader(raw))); err == nil && !c.cfg.Store.View().Synced() {
			t.Fatal("read, and nothing is known")
		}
	})
}
