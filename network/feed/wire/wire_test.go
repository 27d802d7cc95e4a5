package wire

import (
	"testing"

	"github.com/stretchr/testify/require"
	"google.golang.org/protobuf/proto"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	pb "timonel/proto/timonel/v1"
)

const svc = pb.NetworkKind_NETWORK_KIND_SERVICE

func TestADigestIsOfWhatIsThere(t *testing.T) {
	t.Parallel()
	var one, other Digest
	put := func(d *Digest, name, body string) {
		b, s := SumOf(Key{svc, "default", name}, []byte(body))
		d.Toggle(b, s)
	}
	put(&one, "a", "1")
	put(&one, "b", "2")
	put(&other, "b", "2")
	put(&other, "a", "0")
	require.NotEqual(t, one.Whole(), other.Whole())
	set, any := one.Differing(&other)
	require.True(t, any)
	a, _ := SumOf(Key{svc, "default", "a"}, nil)
	b, _ := SumOf(Key{svc, "default", "b"}, nil)
	require.NotEqual(t, a, b)
	require.True(t, set.Has(a))
	require.False(t, set.Has(b))
	put(&other, "a", "0")
	put(&other, "a", "1")
	require.Equal(t, one, other)

	read, err := Unmarshal(one.Marshal())
	require.NoError(t, err)
	require.Equal(t, &one, read)
	none, err := Unmarshal(nil)
	require.NoError(t, err)
	require.Equal(t, &Digest{}, none)
	_, err = Unmarshal(make([]byte, 100))
	require.ErrorContains(t, err, "want 4096")

	var sum Digest
	sum.Add(&one)
	require.Equal(t, one.Whole(), sum.Whole())
	sum.Add(&one)
	require.Equal(t, Digest{}, sum)
}

// Where the parts of a name end is part of the name.
func TestKeysThatReadAlikeDiffer(t *testing.T) {
	t.Parallel()
	_, a := SumOf(Key{svc, "ab", "c"}, nil)
	_, b := SumOf(Key{svc, "a", "bc"}, nil)
	require.NotEqual(t, a, b)
}

// FuzzDecode is what a peer that sends rubbish gets: an error, or an object with a
// name.
func FuzzDecode(f *testing.F) {
	body, _ := (&corev1.Service{ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: "web"}}).Marshal()
	f.Add(int32(svc), body)
	f.Add(int32(pb.NetworkKind_NETWORK_KIND_SLICE), body)
	f.Add(int32(pb.NetworkKind_NETWORK_KIND_NODE), []byte("\x0a\x02a1"))
	f.Add(int32(17), body)
	for kind, m := range map[pb.NetworkKind]proto.Message{
		pb.NetworkKind_NETWORK_KIND_POLICY:  &pb.NetworkPolicyItem{Namespace: "default", Name: "p", Ingress: []*pb.NetworkRule{{Groups: []string{"g"}}}},
		pb.NetworkKind_NETWORK_KIND_GROUP:   &pb.NetworkGroup{Name: "g.x", Of: "g", V4: []byte{10, 0, 0, 1}},
		pb.NetworkKind_NETWORK_KIND_ADDRESS: &pb.AddressHolder{Address: "2001:db8::"},
		pb.NetworkKind_NETWORK_KIND_POD:     &pb.NetworkPod{Namespace: "default", Name: "web"},
	} {
		raw, err := proto.Marshal(m)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(int32(kind), raw)
	}
	f.Fuzz(func(t *testing.T, kind int32, body []byte) {
		o, err := Decode(&pb.NetworkItem{Kind: pb.NetworkKind(kind), Object: body})
		if err == nil && (o.Key.Name == "" || o.Node == nil && o.Service == nil && o.Slice == nil && o.Policy == nil && o.Group == nil && o.Pod == nil && o.Address == nil) {
			t.Fatalf("%+v", o)
		}
	})
}

// What a policy's items are called must be what they are.
func TestNamesOfPolicyItems(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		kind pb.NetworkKind
		m    proto.Message
		ok   bool
	}{
		"policy":                             {pb.NetworkKind_NETWORK_KIND_POLICY, &pb.NetworkPolicyItem{Namespace: "default", Name: "p"}, true},
		"policy without a namespace":         {pb.NetworkKind_NETWORK_KIND_POLICY, &pb.NetworkPolicyItem{Name: "p"}, false},
		"cluster's policy":                   {pb.NetworkKind_NETWORK_KIND_POLICY, &pb.NetworkPolicyItem{Name: "p", Tier: pb.NetworkPolicyItem_ADMIN}, true},
		"cluster's policy with a namespace":  {pb.NetworkKind_NETWORK_KIND_POLICY, &pb.NetworkPolicyItem{Namespace: "default", Name: "p", Tier: pb.NetworkPolicyItem_BASELINE}, false},
		"group":                              {pb.NetworkKind_NETWORK_KIND_GROUP, &pb.NetworkGroup{Of: "abc", Name: "abc.x01"}, true},
		"group of another name":              {pb.NetworkKind_NETWORK_KIND_GROUP, &pb.NetworkGroup{Of: "abd", Name: "abc.x01"}, false},
		"group that is no part":              {pb.NetworkKind_NETWORK_KIND_GROUP, &pb.NetworkGroup{Of: "", Name: "abc"}, false},
		"group with half an address":         {pb.NetworkKind_NETWORK_KIND_GROUP, &pb.NetworkGroup{Of: "abc", Name: "abc.x01", V4: []byte{10, 0, 0, 1, 10}}, false},
		"group with a port too high":         {pb.NetworkKind_NETWORK_KIND_GROUP, &pb.NetworkGroup{Of: "abc", Name: "abc.x01", Targets: []*pb.NetworkTarget{{Address: []byte{10, 0, 0, 1}, Port: 1 << 16}}}, false},
		"pod":                                {pb.NetworkKind_NETWORK_KIND_POD, &pb.NetworkPod{Namespace: "default", Name: "web"}, true},
		"pod without a namespace":            {pb.NetworkKind_NETWORK_KIND_POD, &pb.NetworkPod{Name: "web"}, false},
		"pod whose name begins another line": {pb.NetworkKind_NETWORK_KIND_POD, &pb.NetworkPod{Namespace: "default", Name: "web\nx"}, false},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			raw, err := proto.Marshal(c.m)
			require.NoError(t, err)
			_, err = Decode(&pb.NetworkItem{Kind: c.kind, Object: raw})
			require.Equal(t, c.ok, err == nil, "%v", err)
			require.True(t, OfPolicies(c.kind))
		})
	}
	require.False(t, OfPolicies(svc))
}
