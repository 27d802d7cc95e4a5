package storage

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"

	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apiserver/pkg/apis/example"
	"k8s.io/apiserver/pkg/storage"
)

// purse is a Reserver with so many bytes.
type purse struct {
	room, held, most int64
	waits            int
}

func (p *purse) Cost(value []byte, decoded int64) int64 { return int64(len(value)) }

var errWaited = errors.New("waited in vain")

func (p *purse) Reserve(_ context.Context, n int64, wait bool) (func(), error) {
	if p.held+n > p.room {
		if !wait {
			return nil, ErrFull
		}
		if p.waits++; p.held > 0 || n > 2*p.room {
			return nil, errWaited
		}
		p.room = n // what others had gets free
	}
	p.held += n
	p.most = max(p.most, p.held)
	return func() { p.held -= n }, nil
}

// TestReadsReserve has all reads reserve what they take before they decode it.
func TestReadsReserve(t *testing.T) {
	const n, size = 64, 20_000
	plain, s, _ := setup(t)
	for i := range n {
		pod := &example.Pod{}
		pod.Name, pod.Namespace, pod.Labels = fmt.Sprintf("pod-%02d", i), "ns", map[string]string{"half": fmt.Sprint(i % 2), "one": fmt.Sprint(i == 7)}
		pod.Annotations = map[string]string{"a": strings.Repeat("x", size)}
		if err := s.Create(plain, "/pods/ns/"+pod.Name, pod, nil, 0); err != nil {
			t.Fatal(err)
		}
	}
	list := func(selector string, limit int64) func(context.Context) (int, error) {
		return func(ctx context.Context) (int, error) {
			p := storage.Everything
			var err error
			if p.Label, err = labels.Parse(selector); err != nil {
				return 0, err
			}
			p.Limit, p.GetAttrs = limit, storage.DefaultNamespaceScopedAttr
			out := &example.PodList{}
			err = s.GetList(ctx, "/pods/", storage.ListOptions{Predicate: p, Recursive: true}, out)
			seen := map[string]bool{}
			for _, pod := range out.Items {
				seen[pod.Name] = true
			}
			return len(seen), err
		}
	}
	update := func(ctx context.Context) (int, error) {
		err := s.GuaranteedUpdate(ctx, "/pods/ns/pod-00", &example.Pod{}, false, nil, func(obj runtime.Object, _ storage.ResponseMeta) (runtime.Object, *uint64, error) {
			obj.(*example.Pod).Labels["x"] += "x"
			return obj, nil, nil
		}, nil)
		return 1, err
	}
	for name, tt := range map[string]struct {
		read       func(context.Context) (int, error)
		room       int64
		want       int
		least, may int64 // objects reserved at most at once
		waits      int
		err        error
	}{
		"all":                            {list("", 0), 1 << 40, n, n, n, 0, nil},
		"all, others have the room":      {list("", 0), n * size * 3 / 4, n, n, n, 1, nil},
		"too much":                       {list("", 0), size, 0, 0, 0, 1, errWaited},
		"a page":                         {list("", 10), 1 << 40, 10, 10, 10, 0, nil},
		"a half":                         {list("half=1", 0), 1 << 40, n / 2, n / 2, n, 0, nil},
		"a half, that has to begin anew": {list("half=1", 0), 600_000, n / 2, n / 2, n, 1, nil},
		"one":                            {list("one=true", 0), 1 << 40, 1, 1, 16, 0, nil},
		"none":                           {list("none", 0), 0, 0, 0, 0, 0, nil},
		"get": {func(ctx context.Context) (int, error) {
			return 1, s.Get(ctx, "/pods/ns/pod-00", storage.GetOptions{}, &example.Pod{})
		}, 1 << 40, 1, 1, 1, 0, nil},
		"get without room": {func(ctx context.Context) (int, error) {
			return 0, s.Get(ctx, "/pods/ns/pod-00", storage.GetOptions{}, &example.Pod{})
		}, 0, 0, 0, 0, 1, errWaited},
		"update": {update, 1 << 40, 1, copiesOfWrite, copiesOfWrite, 0, nil},
	} {
		t.Run(name, func(t *testing.T) {
			p := &purse{room: tt.room}
			got, err := tt.read(WithReserver(plain, p))
			if !errors.Is(err, tt.err) || got != tt.want || p.waits != tt.waits {
				t.Errorf("%d objects after %d waits, %v; want %d after %d, %v", got, p.waits, err, tt.want, tt.waits, tt.err)
			}
			if objects := float64(p.most) / size; objects < float64(tt.least) || objects > 1.2*float64(tt.may) {
				t.Errorf("what %.1f objects take was reserved, want %d to %d", objects, tt.least, tt.may)
			}
			if name == "update" && p.held != 0 {
				t.Errorf("%d bytes are held after the update", p.held)
			}
		})
	}
}
