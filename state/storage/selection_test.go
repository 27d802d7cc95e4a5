package storage

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync/atomic"
	"testing"

	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/sharding"
	"k8s.io/apimachinery/pkg/types"
	apiwatch "k8s.io/apimachinery/pkg/watch"
	"k8s.io/apiserver/pkg/apis/example"
	"k8s.io/apiserver/pkg/features"
	"k8s.io/apiserver/pkg/storage"
	utilfeature "k8s.io/apiserver/pkg/util/feature"
	featuregatetesting "k8s.io/component-base/featuregate/testing"
)

// TestSelectionIsMatches compares what a selection selects, with the labels and
// fields known and not, with what upstream's predicate matches.
func TestSelectionIsMatches(t *testing.T) { // not parallel: it sets a feature gate
	shard := func(key, start, end string) sharding.Selector {
		return sharding.NewSelector(sharding.ShardRangeRequirement{Key: key, Start: start, End: end})
	}
	half := shard("object.metadata.uid", "0x0000000000000000", "0x8000000000000000")
	a, notA := labels.SelectorFromSet(labels.Set{"l": "a"}), labels.NewSelector()
	if r, err := labels.ParseToRequirements("l!=a"); err == nil {
		notA = notA.Add(r...)
	}
	name := fields.OneTermEqualSelector("metadata.name", "p1")
	predicates := map[string]storage.SelectionPredicate{
		"none":                     {},
		"everything":               storage.Everything,
		"nothing":                  {Label: labels.Nothing(), Field: fields.Everything()},
		"label":                    {Label: a},
		"label, any field":         {Label: a, Field: fields.Everything()},
		"not the label":            {Label: notA, Field: fields.Everything()},
		"field, any label":         {Label: labels.Everything(), Field: name},
		"label and field":          {Label: a, Field: name},
		"unknown field":            {Label: labels.Everything(), Field: fields.OneTermEqualSelector("no.such", "x")},
		"shard":                    {ShardSelector: half},
		"shard, any label":         {Label: labels.Everything(), Field: fields.Everything(), ShardSelector: half},
		"shard and label":          {Label: a, Field: fields.Everything(), ShardSelector: half},
		"every shard and label":    {Label: a, Field: fields.Everything(), ShardSelector: sharding.Everything()},
		"shard that cannot be had": {Label: a, Field: fields.Everything(), ShardSelector: shard("object.spec", "0x0000000000000000", "0x8000000000000000")},
	}
	fails := func(runtime.Object) (labels.Set, fields.Set, error) { return nil, nil, errors.New("no attributes") }
	for _, gate := range []bool{false, true} {
		featuregatetesting.SetFeatureGateDuringTest(t, utilfeature.DefaultFeatureGate, features.ShardedListAndWatch, gate)
		for _, of := range []struct {
			storage, predicate storage.AttrFunc
		}{
			{storage.DefaultNamespaceScopedAttr, storage.DefaultNamespaceScopedAttr},
			{nil, storage.DefaultNamespaceScopedAttr},
			{fails, storage.DefaultNamespaceScopedAttr},
			{fails, fails},
		} {
			_, s, _ := setup(t, func(c *Config) { c.GetAttrs = of.storage })
			for _, what := range slices.Sorted(maps.Keys(predicates)) {
				p := predicates[what]
				p.GetAttrs = of.predicate
				selection := newSelection(p)
				for i := range 16 {
					pod := newPod(fmt.Sprint("p", i%4))
					pod.UID = types.UID(fmt.Sprint("uid", i))
					if i%2 == 1 {
						pod.Labels = map[string]string{"l": "a"}
					}
					want, err := p.Matches(pod)
					want = want && err == nil
					got := selection.selects(pod, &decoded{store: s, obj: pod})
					if got != want {
						t.Errorf("%q with sharding %v selects %s %v: %v, want %v", what, gate, pod.Name, pod.Labels, got, want)
					}
				}
			}
		}
	}
}

// TestAttrsAreFoundOnce counts how often objects are asked for labels and fields.
func TestAttrsAreFoundOnce(t *testing.T) {
	t.Parallel()
	var asked atomic.Int64
	_, s, _ := setup(t, func(c *Config) {
		c.GetAttrs = func(obj runtime.Object) (labels.Set, fields.Set, error) {
			asked.Add(1)
			return storage.DefaultNamespaceScopedAttr(obj)
		}
	})
	fill(t, s, 50)
	own := func(runtime.Object) (labels.Set, fields.Set, error) {
		t.Error("a predicate asked an object itself")
		return nil, nil, nil
	}
	want := func(what string, n int64) {
		t.Helper()
		if got := asked.Swap(0); got != n {
			t.Errorf("%s asked %d objects, want %d", what, got, n)
		}
	}
	byName := storage.SelectionPredicate{Label: labels.Everything(), Field: fields.OneTermEqualSelector("metadata.name", "p007"), GetAttrs: own}
	byLabel := storage.SelectionPredicate{Label: labels.SelectorFromSet(labels.Set{"l": "x"}), Field: fields.Everything(), GetAttrs: own}

	if n := len(list(t, s, storage.Everything)); n != 50 {
		t.Errorf("everything is %d pods", n)
	}
	want("a list of everything", 0)
	if pods := list(t, s, byName); len(pods) != 1 || pods[0].Name != "p007" {
		t.Errorf("by name there are %v", pods)
	}
	want("the first list by name", 50)
	if pods := list(t, s, byLabel); len(pods) != 0 {
		t.Errorf("by label there are %v", pods)
	}
	label(t, s, "p007", "x")
	if pods := list(t, s, byLabel); len(pods) != 1 || pods[0].Name != "p007" {
		t.Errorf("by label there are %v", pods)
	}
	want("lists by label, one after a write,", 1)

	// Watches that begin with what there is, and see one change.
	for what, watched := range map[string]struct {
		storage.SelectionPredicate
		initial int
		change  apiwatch.EventType
		asks    int64
	}{
		"by name":    {byName, 1, apiwatch.Modified, 1},
		"by label":   {byLabel, 1, apiwatch.Deleted, 1},
		"everything": {storage.Everything, 50, apiwatch.Modified, 0},
	} {
		label(t, s, "p007", "x")
		list(t, s, byName)
		asked.Store(0)
		w, err := s.Watch(t.Context(), "/pods/", storage.ListOptions{ResourceVersion: "0", Recursive: true, Predicate: watched.SelectionPredicate})
		if err != nil {
			t.Fatal(err)
		}
		for range watched.initial {
			if e := <-w.ResultChan(); e.Type != apiwatch.Added {
				t.Errorf("%s: initial event is %v", what, e.Type)
			}
		}
		want("the beginning of a watch "+what, 0)
		label(t, s, "p007", "y")
		if e := <-w.ResultChan(); e.Type != watched.change || e.Object.(*watchObject).GetName() != "p007" {
			t.Errorf("%s: a change is %v", what, e.Type)
		}
		want("a change seen by a watch "+what, watched.asks)
		w.Stop()
	}
}

// TestListMakesRoom lists objects whose share in the list changes on the way.
func TestListMakesRoom(t *testing.T) {
	t.Parallel()
	_, s, _ := setup(t)
	fill(t, s, 300)
	selects := func(do func(i int) bool) storage.SelectionPredicate {
		return storage.SelectionPredicate{
			Label: labels.SelectorFromSet(labels.Set{"in": "true"}), Field: fields.Everything(),
			GetAttrs: func(obj runtime.Object) (labels.Set, fields.Set, error) {
				var i int
				_, err := fmt.Sscanf(obj.(*example.Pod).Name, "p%d", &i)
				return labels.Set{"in": fmt.Sprint(do(i))}, nil, err
			},
		}
	}
	tests := []struct {
		name  string
		in    func(i int) bool
		limit int64
		want  int
	}{
		{"all", func(int) bool { return true }, 0, 300},
		{"none", func(int) bool { return false }, 0, 0},
		{"first", func(i int) bool { return i == 0 }, 0, 1},
		{"last", func(i int) bool { return i == 299 }, 0, 1},
		{"late", func(i int) bool { return i >= 100 }, 0, 200},
		{"early", func(i int) bool { return i < 200 }, 0, 200},
		{"a page", func(int) bool { return true }, 70, 70},
		{"a page bigger than what there is", func(i int) bool { return i%2 == 0 }, 1 << 40, 150},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			p := selects(tt.in)
			p.Limit = tt.limit
			pods := list(t, s, p)
			if len(pods) != tt.want {
				t.Fatalf("list has %d pods, want %d", len(pods), tt.want)
			}
			if room := cap(pods); room > 4*tt.want+17 {
				t.Errorf("list of %d has room for %d", tt.want, room)
			}
			for i := 1; i < len(pods); i++ {
				if pods[i-1].Name >= pods[i].Name {
					t.Errorf("%s is before %s", pods[i-1].Name, pods[i].Name)
				}
			}
		})
	}
}
