package storage

import (
	"fmt"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/apimachinery/pkg/runtime/serializer/protobuf"
	"k8s.io/apimachinery/pkg/types"
	utilruntime "k8s.io/apimachinery/pkg/util/runtime"
	"k8s.io/apiserver/pkg/apis/example"
	"k8s.io/apiserver/pkg/storage"
)

func BenchmarkCreate(b *testing.B) {
	ctx, s, _ := setup(b)
	b.ReportAllocs()
	for i := 0; b.Loop(); i++ {
		name := fmt.Sprintf("p%d", i)
		if err := s.Create(ctx, "/pods/ns/"+name, newPod(name), &example.Pod{}, 0); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkUpdate(b *testing.B) {
	ctx, s, _ := setup(b)
	if err := s.Create(ctx, "/pods/ns/a", newPod("a"), nil, 0); err != nil {
		b.Fatal(err)
	}
	b.ReportAllocs()
	for i := 0; b.Loop(); i++ {
		err := s.GuaranteedUpdate(ctx, "/pods/ns/a", &example.Pod{}, false, nil, storage.SimpleUpdate(func(obj runtime.Object) (runtime.Object, error) {
			obj.(*example.Pod).Labels = map[string]string{"l": fmt.Sprint(i)}
			return obj, nil
		}), nil)
		if err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkGet(b *testing.B) {
	ctx, s, _ := setup(b)
	if err := s.Create(ctx, "/pods/ns/a", newPod("a"), nil, 0); err != nil {
		b.Fatal(err)
	}
	b.ReportAllocs()
	for b.Loop() {
		if err := s.Get(ctx, "/pods/ns/a", storage.GetOptions{}, &example.Pod{}); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkList lists 5,000 pods.
func BenchmarkList(b *testing.B) {
	ctx, s, _ := setup(b)
	for i := range 5000 {
		name := fmt.Sprintf("p%d", i)
		if err := s.Create(ctx, "/pods/ns/"+name, newPod(name), nil, 0); err != nil {
			b.Fatal(err)
		}
	}
	b.ReportAllocs()
	for b.Loop() {
		if err := s.GetList(ctx, "/pods/", storage.ListOptions{Recursive: true, Predicate: storage.Everything}, &example.PodList{}); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkListConfigMaps lists a namespace of 10,000 config maps of some 600
// bytes, of which it wants all, or each tenth.
func BenchmarkListConfigMaps(b *testing.B) {
	const objects = 10_000
	scheme := runtime.NewScheme()
	utilruntime.Must(corev1.AddToScheme(scheme))
	codecs := serializer.NewCodecFactory(scheme)
	ctx, s, _ := setup(b, func(c *Config) {
		c.Codec = codecs.CodecForVersions(protobuf.NewSerializer(scheme, scheme), codecs.UniversalDeserializer(),
			corev1.SchemeGroupVersion, corev1.SchemeGroupVersion)
		c.NewFunc = func() runtime.Object { return &corev1.ConfigMap{} }
		c.NewListFunc = func() runtime.Object { return &corev1.ConfigMapList{} }
		c.GetAttrs = storage.DefaultNamespaceScopedAttr
		c.ResourcePrefix = "/configmaps/"
		c.Transformer = nil
	})
	for i := range objects {
		m := &corev1.ConfigMap{Data: map[string]string{"data": strings.Repeat("x", 440)}}
		m.Namespace, m.Name, m.UID = "load", fmt.Sprintf("map-%05d", i), types.UID(fmt.Sprintf("uid-%032d", i))
		m.Labels = map[string]string{"app": "load", "group": fmt.Sprint("g", i%10)}
		if err := s.Create(ctx, "/configmaps/load/"+m.Name, m, nil, 0); err != nil {
			b.Fatal(err)
		}
	}
	for _, bb := range []struct {
		name  string
		label labels.Selector
		field fields.Selector
		want  int
	}{
		{"all", labels.Everything(), fields.Everything(), objects},
		{"by=label", labels.SelectorFromSet(labels.Set{"group": "g7"}), fields.Everything(), objects / 10},
		{"by=field", labels.Everything(), fields.OneTermEqualSelector("metadata.namespace", "load"), objects},
	} {
		b.Run(bb.name, func(b *testing.B) {
			opts := storage.ListOptions{Recursive: true, Predicate: storage.SelectionPredicate{
				Label: bb.label, Field: bb.field, GetAttrs: storage.DefaultNamespaceScopedAttr,
			}}
			b.ReportAllocs()
			for b.Loop() {
				list := &corev1.ConfigMapList{}
				if err := s.GetList(ctx, "/configmaps/load/", opts, list); err != nil {
					b.Fatal(err)
				}
				if len(list.Items) != bb.want {
					b.Fatalf("list has %d items, want %d", len(list.Items), bb.want)
				}
			}
		})
	}
}
