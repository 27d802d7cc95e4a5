// Package objects is the decoded, immutable view of the state that the scheduler
// and the reconcilers decide on.
//
// A [Cache] follows a [state.Store] and decodes each stored object once. Its
// [Snapshot] costs nothing to take and never changes: typed tables of the kinds
// that deciding needs, and the metadata ([Meta]) of every object of every kind,
// custom resources included (these with their JSON as well), found by key, UID,
// owner or namespace.
//
//	cache := objects.NewCache(store)
//	go cache.Run(ctx)
//	s := cache.Snapshot()
//	for pod := range s.PodsOnNode("a1") { … }
//	rs, ok := s.ReplicaSets().Get("default", "web-5d4f")
//
// Beside the tables there are indexes, which are folds over the changes, each equal to
// building it anew: pods by node, without a controller and ended, what an owner owns,
// Nodes that are not ready.
//
// [Cache.Changes] tells the runner which objects changed since a snapshot.
//
// Objects are k8s.io/api's external versions as they are stored. They are shared
// and must not be changed: DeepCopy first. They carry their resourceVersion,
// apiVersion and kind, but not their managedFields, which nothing that decides
// reads and which are a large part of the memory; an update that leaves
// managedFields empty keeps them in the store.
package objects
