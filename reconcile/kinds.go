package reconcile

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"time"

	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/discovery"
	"k8s.io/client-go/rest"

	"timonel/state/objects"
)

// Kind is a resource that the API serves.
type Kind struct {
	Resource   schema.GroupVersionResource
	Namespaced bool
}

// Kinds are the resources that the API serves, by group and kind, in the
// version that the API prefers.
type Kinds map[schema.GroupKind]Kind

// Lookup returns the resource of a group and kind, or false when the API serves none.
func (k Kinds) Lookup(gk schema.GroupKind) (Kind, bool) {
	kind, ok := k[gk]
	return kind, ok
}

// discoverer returns a function that asks the API for its kinds.
func discoverer(config *rest.Config) (func(context.Context) (Kinds, error), error) {
	c := rest.CopyConfig(config)
	c.QPS = -1
	client, err := discovery.NewDiscoveryClientForConfig(c)
	if err != nil {
		return nil, fmt.Errorf("make the reconcilers' discovery client: %w", err)
	}
	return func(context.Context) (Kinds, error) {
		lists, err := client.ServerPreferredResources()
		if err != nil && !discovery.IsGroupDiscoveryFailedError(err) {
			return nil, fmt.Errorf("ask the API for its resources: %w", err)
		}
		kinds := Kinds{}
		for _, list := range lists {
			gv, err := schema.ParseGroupVersion(list.GroupVersion)
			if err != nil {
				continue // a group that an aggregated API misnames has nothing for us
			}
			for _, r := range list.APIResources {
				if !slices.Contains(r.Verbs, "delete") {
					continue
				}
				version, group := gv.Version, gv.Group
				if r.Version != "" {
					version = r.Version
				}
				if r.Group != "" {
					group = r.Group
				}
				kinds[schema.GroupKind{Group: group, Kind: r.Kind}] = Kind{
					Resource:   schema.GroupVersionResource{Group: group, Version: version, Resource: r.Name},
					Namespaced: r.Namespaced,
				}
			}
		}
		return kinds, err
	}, nil
}

// servesKinds says whether a change may change what the API serves.
func servesKinds(c objects.Changed) bool {
	switch c.Meta().GVK.GroupKind() {
	case schema.GroupKind{Group: "apiextensions.k8s.io", Kind: "CustomResourceDefinition"},
		schema.GroupKind{Group: "apiregistration.k8s.io", Kind: "APIService"}:
		return true
	}
	return false
}

// settleKinds are the times after a change at which to ask for the kinds: the
// API serves a new resource a moment after its definition is there.
var settleKinds = []time.Duration{0, time.Second, 5 * time.Second}

// followKinds asks for the API's kinds each time there is a reason to, and
// passes them on when they are others than before. A failure is tried again.
func (t *term) followKinds(ctx context.Context, ask <-chan struct{}, out chan<- Kinds) {
	var known Kinds
	var timer <-chan time.Time
	round := len(settleKinds)
	for {
		select {
		case <-ctx.Done():
			return
		case <-ask:
			round = 0
		case <-timer:
		}
		kinds, err := t.cfg.Kinds(ctx)
		if err != nil && ctx.Err() == nil {
			t.cfg.Log.Warn("what the API serves is not fully known", "err", err)
		}
		if err != nil && known != nil {
			// Groups that do not answer keep what they had.
			merged := maps.Clone(known)
			maps.Copy(merged, kinds)
			kinds = merged
		}
		if len(kinds) > 0 && !maps.Equal(kinds, known) {
			known = kinds
			select {
			case out <- kinds:
			case <-ctx.Done():
				return
			}
		}
		timer = nil
		switch round++; {
		case round < len(settleKinds):
			timer = t.cfg.Clock.After(settleKinds[round] - settleKinds[round-1])
		case err != nil:
			timer = t.cfg.Clock.After(settleKinds[len(settleKinds)-1])
		}
	}
}
