package objects

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"testing"
	"time"

	certificatesv1 "k8s.io/api/certificates/v1"
	certificatesv1beta1 "k8s.io/api/certificates/v1beta1"
	corev1 "k8s.io/api/core/v1"
	apiequality "k8s.io/apimachinery/pkg/api/equality"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"

	"timonel/state"
)

func TestDecode(t *testing.T) {
	t.Parallel()
	kinds := typedKinds()
	stored := encode(t, pod("a", "p", "n"))
	tests := []struct {
		name     string
		resource string
		value    []byte
		want     schema.GroupVersionKind
		typed    bool
		err      error
	}{
		{"protobuf of a typed kind", "pods/", stored, schema.GroupVersionKind{Version: "v1", Kind: "Pod"}, true, nil},
		{"protobuf of another kind", "", stored, schema.GroupVersionKind{Version: "v1", Kind: "Pod"}, false, nil},
		{"protobuf of another version than the table's", "horizontalpodautoscalers/", stored, schema.GroupVersionKind{Version: "v1", Kind: "Pod"}, false, nil},
		{"JSON of a typed kind", "minions/", []byte(`{"apiVersion":"v1","kind":"Node","metadata":{"name":"p"}}`), schema.GroupVersionKind{Version: "v1", Kind: "Node"}, true, nil},
		{"JSON of a custom resource", "", []byte(` {"apiVersion":"a.b/v1","kind":"C","metadata":{"name":"p"},"spec":[1]}`), schema.GroupVersionKind{Group: "a.b", Version: "v1", Kind: "C"}, false, nil},
		{"encrypted", "secrets/", []byte("k8s:enc:aescbc:v1:key1:…"), schema.GroupVersionKind{}, false, errNotAnObject},
		{"empty", "pods/", nil, schema.GroupVersionKind{}, false, errNotAnObject},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			m, err := decode(&state.KV{Key: "/registry/x/p", Value: tt.value, ModRevision: 7}, kinds[tt.resource])
			if !errors.Is(err, tt.err) {
				t.Fatalf("error is %v, want %v", err, tt.err)
			}
			if err != nil {
				return
			}
			if m.GVK != tt.want || (m.Object != nil) != tt.typed || m.Name != "p" || m.ResourceVersion != "7" || m.Revision != 7 {
				t.Errorf("decoded %+v", m)
			}
			if want := tt.name == "JSON of a custom resource"; (m.JSON != nil) != want || want && (m.size < len(m.JSON) || !bytes.Equal(m.JSON, tt.value[1:])) {
				t.Errorf("keeps %q and counts %d bytes", m.JSON, m.size)
			}
		})
	}
}

// TestKindsAreWhatTheirTablesSay checks each typed table against its kind.
func TestKindsAreWhatTheirTablesSay(t *testing.T) {
	t.Parallel()
	for resource, k := range typedKinds() {
		o := k.new()
		if got := fmt.Sprintf("%T", o); got[len(got)-len(k.gvk.Kind):] != k.gvk.Kind {
			t.Errorf("%s: %s is decoded into %s", resource, k.gvk, got)
		}
		if _, ok := o.GetObjectMeta().(*metav1.ObjectMeta); !ok {
			t.Errorf("%s has no ObjectMeta", k.gvk)
		}
		if got := resourceOf(resource + "ns/name"); got != resource {
			t.Errorf("the resource of %sns/name is %s", resource, got)
		}
	}
}

// What is stored in a beta version is decoded whole into the version after it.
func TestDecodeOfTheVersionBefore(t *testing.T) {
	t.Parallel()
	begin := metav1.NewTime(time.Unix(1e9, 0))
	stored := certificatesv1beta1.PodCertificateRequest{
		TypeMeta:   metav1.TypeMeta{APIVersion: "certificates.k8s.io/v1beta1", Kind: "PodCertificateRequest"},
		ObjectMeta: metav1.ObjectMeta{Namespace: "a", Name: "p"},
		Spec: certificatesv1beta1.PodCertificateRequestSpec{
			SignerName: "s", PodName: "pod", PodUID: "1", ServiceAccountName: "sa", ServiceAccountUID: "2", NodeName: "n", NodeUID: "3",
			MaxExpirationSeconds: new(int32(7)), StubPKCS10Request: []byte("stub"), UnverifiedUserAnnotations: map[string]string{"k": "v"},
		},
		Status: certificatesv1beta1.PodCertificateRequestStatus{
			Conditions:       []metav1.Condition{{Type: "Issued", Status: metav1.ConditionTrue, Reason: "R", Message: "m", LastTransitionTime: begin}},
			CertificateChain: "chain", NotBefore: &begin, NotAfter: &begin, BeginRefreshAt: &begin,
		},
	}
	m, err := decode(&state.KV{Key: "/registry/podcertificaterequests/a/p", Value: encode(t, &stored), ModRevision: 7}, typedKinds()["podcertificaterequests/"])
	if err != nil {
		t.Fatal(err)
	}
	stored.ResourceVersion = "7"
	b, err := json.Marshal(stored)
	if err != nil {
		t.Fatal(err)
	}
	var want certificatesv1.PodCertificateRequest // which has all fields but two that ended
	if err := json.Unmarshal(b, &want); err != nil {
		t.Fatal(err)
	}
	if got := m.Object.(*certificatesv1.PodCertificateRequest); !apiequality.Semantic.DeepEqual(got, &want) {
		t.Errorf("decoded %+v\nstored %+v", got, want)
	}
}

func FuzzDecode(f *testing.F) {
	f.Add("pods/", encode(f, pod("a", "p", "n", "owner")))
	f.Add("minions/", []byte(`{"apiVersion":"v1","kind":"Node","metadata":{"name":"p"}}`))
	f.Add("", []byte(`{"metadata":null}`))
	kinds := typedKinds()
	f.Fuzz(func(t *testing.T, resource string, value []byte) {
		m, err := decode(&state.KV{Key: "k", Value: value, ModRevision: 3}, kinds[resource])
		if err == nil && (m.ObjectMeta == nil || m.ResourceVersion != "3") {
			t.Fatalf("decoded %+v", m)
		}
	})
}

// BenchmarkChange is one changed pod among 10,000, to a new snapshot.
func BenchmarkChange(b *testing.B) {
	s := state.New(state.Options{})
	for i := range 10_000 {
		apply(b, s, putPod(b, pod("ns", fmt.Sprintf("p%05d", i), fmt.Sprintf("n%d", i%100), "rs")))
	}
	c := NewCache(s)
	c.load(s.View())
	value := encode(b, pod("ns", "p00007", "n7", "rs"))
	b.ReportAllocs()
	for b.Loop() {
		kv := state.KV{Key: podKey("ns", "p00007"), Value: value, ModRevision: 3}
		c.publish(4, []Changed{c.apply(kv.Key, &kv, false)}, false)
	}
}

// BenchmarkPodsOnNode visits the 100 pods of one of 100 nodes.
func BenchmarkPodsOnNode(b *testing.B) {
	s := state.New(state.Options{})
	for i := range 10_000 {
		apply(b, s, putPod(b, pod("ns", fmt.Sprintf("p%05d", i), fmt.Sprintf("n%d", i%100))))
	}
	c := NewCache(s)
	c.publish(s.View().Revision(), c.load(s.View()), false)
	snapshot := c.Snapshot()
	for b.Loop() {
		n := 0
		for p := range snapshot.PodsOnNode("n7") {
			if p.Status.Phase != corev1.PodSucceeded {
				n++
			}
		}
		if n != 100 {
			b.Fatal(n)
		}
	}
}
