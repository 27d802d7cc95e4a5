package storage

import (
	"fmt"
	"testing"

	"k8s.io/apimachinery/pkg/runtime"
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
