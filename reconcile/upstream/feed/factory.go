package feed

import (
	"context"
	"fmt"
	"reflect"
	"slices"
	"strings"
	"sync"
	"time"

	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/util/wait"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/kubernetes/scheme"
	"k8s.io/client-go/tools/cache"

	"timonel/state/objects"
)

// Factory is the informers of one controller. It is an
// informers.SharedInformerFactory for the kinds that the cache decodes whole, and an
// informerfactory.InformerFactory for all: of others it gives the metadata.
type Factory struct {
	// client-go's own, which never starts an informer: it knows by type the informers
	// that it was given, and so all of its groups lead to these.
	informers.SharedInformerFactory

	feed *Feed
	ctx  context.Context
	wg   sync.WaitGroup // the handlers' goroutines

	mu       sync.Mutex
	typed    map[string]*informer // by directory
	metadata map[schema.GroupVersionResource]*informer
}

// NewFactory returns the informers of a controller that runs until ctx ends.
func (f *Feed) NewFactory(ctx context.Context) *Factory {
	factory := &Factory{
		SharedInformerFactory: informers.NewSharedInformerFactory(nil, 0),
		feed:                  f, ctx: ctx, typed: map[string]*informer{}, metadata: map[schema.GroupVersionResource]*informer{},
	}
	for kind := range objects.TypedKinds() {
		i := factory.newInformer(kind.Directory, typedObject(reflect.TypeOf(kind.New())))
		i.gvk = kind.GVK
		factory.typed[kind.Directory] = i
		factory.SharedInformerFactory.InformerFor(kind.New(), func(kubernetes.Interface, time.Duration) cache.SharedIndexInformer { return i })
	}
	return factory
}

// typedObject returns a function that gives the object of a Meta when it is of that type.
func typedObject(want reflect.Type) func(*objects.Meta) any {
	return func(m *objects.Meta) any {
		if m.Object == nil || reflect.TypeOf(m.Object) != want {
			return nil
		}
		return m.Object
	}
}

// ForResource implements informers.SharedInformerFactory, and never fails: of a
// resource that is not decoded whole in that version the informer has the metadata.
func (f *Factory) ForResource(resource schema.GroupVersionResource) (informers.GenericInformer, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	directory := directoryFor(resource.GroupResource())
	if i, ok := f.typed[directory]; ok && i.gvk.GroupVersion() == resource.GroupVersion() {
		return generic{i, resource.GroupResource()}, nil
	}
	i, ok := f.metadata[resource]
	if !ok {
		i = f.newInformer(directory, metadataOf(resource.GroupVersion()))
		f.metadata[resource] = i
	}
	return generic{i, resource.GroupResource()}, nil
}

// Hide makes the controller not see the objects of a resource that hidden is true for.
// It is called before anybody asks for that resource's informer, which must be of a
// kind that the cache decodes whole.
func (f *Factory) Hide(resource schema.GroupVersionResource, hidden func(object any) bool) {
	i := f.typed[directoryFor(resource.GroupResource())]
	all := i.object
	i.object = func(m *objects.Meta) any {
		if o := all(m); o != nil && !hidden(o) {
			return o
		}
		return nil
	}
}

// odd are the resources that the API server does not keep under their own names.
var odd = map[schema.GroupResource]string{
	{Resource: "replicationcontrollers"}:                "controllers/",
	{Resource: "endpoints"}:                             "services/endpoints/",
	{Resource: "nodes"}:                                 "minions/",
	{Resource: "services"}:                              "services/specs/",
	{Group: "networking.k8s.io", Resource: "ingresses"}: "ingress/",
	{Group: "events.k8s.io", Resource: "events"}:        "events/",
}

// directoryFor is where the API server keeps a resource.
func directoryFor(resource schema.GroupResource) string {
	if directory, ok := odd[resource]; ok {
		return directory
	}
	if scheme.Scheme.IsGroupRegistered(resource.Group) {
		return strings.ToLower(resource.Resource) + "/"
	}
	return resource.Group + "/" + resource.Resource + "/"
}

// Start implements informers.SharedInformerFactory: the informers that somebody asked
// for tell their handlers from now on. They end with the factory's context.
func (f *Factory) Start(<-chan struct{}) {
	for _, i := range f.all() {
		i.start()
	}
}

// StartWithContext implements informers.SharedInformerFactory, as Start does.
func (f *Factory) StartWithContext(context.Context) { f.Start(nil) }

// Shutdown implements informers.SharedInformerFactory. It waits for the handlers,
// which return when the factory's context has ended.
func (f *Factory) Shutdown() {
	f.wg.Wait()
	for _, i := range f.all() {
		f.feed.stop(i)
	}
}

// WaitForCacheSync implements informers.SharedInformerFactory.
func (f *Factory) WaitForCacheSync(stop <-chan struct{}) map[reflect.Type]bool {
	return f.WaitForCacheSyncWithContext(wait.ContextForChannel(stop)).Synced
}

// WaitForCacheSyncWithContext implements informers.SharedInformerFactory. All
// informers have the same cache, which has a snapshot or not.
func (f *Factory) WaitForCacheSyncWithContext(ctx context.Context) cache.SyncResult {
	err := f.feed.cache.WaitRevision(ctx, 1)
	out := cache.SyncResult{Err: err, Synced: map[reflect.Type]bool{}}
	f.mu.Lock()
	defer f.mu.Unlock()
	for kind := range objects.TypedKinds() {
		if f.typed[kind.Directory].isStarted() {
			out.Synced[reflect.TypeOf(kind.New())] = err == nil
		}
	}
	return out
}

func (f *Factory) all() []*informer {
	f.mu.Lock()
	defer f.mu.Unlock()
	out := make([]*informer, 0, len(f.typed)+len(f.metadata))
	for _, i := range f.typed {
		out = append(out, i)
	}
	for _, i := range f.metadata {
		out = append(out, i)
	}
	return out
}

// Foreign returns the types of the informers that were asked for and are not fed from
// the cache, because it does not decode these kinds whole: they never have anything.
func (f *Factory) Foreign() []string {
	ended, end := context.WithCancel(context.Background())
	end()
	f.SharedInformerFactory.StartWithContext(ended)
	ours := map[reflect.Type]bool{}
	for kind := range objects.TypedKinds() {
		ours[reflect.TypeOf(kind.New())] = true
	}
	var out []string
	for t := range f.SharedInformerFactory.WaitForCacheSyncWithContext(ended).Synced {
		if !ours[t] {
			out = append(out, fmt.Sprint(t))
		}
	}
	slices.Sort(out)
	return out
}

// generic implements informers.GenericInformer.
type generic struct {
	informer *informer
	resource schema.GroupResource
}

// Informer implements informers.GenericInformer.
func (g generic) Informer() cache.SharedIndexInformer { return g.informer }

// Lister implements informers.GenericInformer.
func (g generic) Lister() cache.GenericLister {
	return cache.NewGenericLister(g.informer.GetIndexer(), g.resource)
}
