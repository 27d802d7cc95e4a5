package wire

import (
	"testing"

	"github.com/stretchr/testify/require"
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
	f.Add(int32(7), body)
	f.Fuzz(func(t *testing.T, kind int32, body []byte) {
		o, err := Decode(&pb.NetworkItem{Kind: pb.NetworkKind(kind), Object: body})
		if err == nil && (o.Key.Name == "" || o.Node == nil && o.Service == nil && o.Slice == nil) {
			t.Fatalf("%+v", o)
		}
	})
}
