package storage

import (
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apiserver/pkg/storage"
)

// attrs are what selectors select an object by.
type attrs struct {
	labels labels.Set
	fields fields.Set
	known  bool // else each predicate asks for them itself
}

// attrs returns what selects the object, found once however many ask.
func (d *decoded) attrs() *attrs {
	if a := d.selectable.Load(); a != nil {
		return a
	}
	a := &attrs{}
	if get := d.store.config.GetAttrs; get != nil {
		if l, f, err := get(d.obj); err == nil {
			*a = attrs{l, f, true}
		}
	}
	d.selectable.Store(a)
	return a
}

// selection is a predicate made ready for many objects.
type selection struct {
	storage.SelectionPredicate
	everything bool // is selected
	byAttrs    bool // labels or fields
	byShard    bool
}

func newSelection(p storage.SelectionPredicate) selection {
	return selection{
		SelectionPredicate: p,
		everything:         p.Empty(),
		byAttrs:            (p.Label != nil && !p.Label.Empty()) || (p.Field != nil && !p.Field.Empty()),
		byShard:            p.ShardSelector != nil && !p.ShardSelector.Empty(),
	}
}

// selects is Matches for an object whose labels and fields are those of d; it is
// d's object or a copy. An object that cannot be asked for them is not selected.
func (s *selection) selects(obj runtime.Object, d *decoded) bool {
	if s.everything {
		return true
	}
	if s.byShard {
		if ok, err := s.MatchesSharding(obj); err != nil || !ok {
			return false
		}
	}
	if !s.byAttrs {
		return true
	}
	a := d.attrs()
	if !a.known {
		ok, err := s.Matches(obj)
		return ok && err == nil
	}
	return (s.Label == nil || s.Label.Matches(a.labels)) && (s.Field == nil || s.Field.Matches(a.fields))
}
