// Package feed gives upstream's controllers their informers, indexers and listers
// over objects.Cache, so that they keep no copy of the state and watch nothing.
//
// A [Feed] follows the cache for one term. Each controller gets a [Factory] of its
// own, which is an informers.SharedInformerFactory: what client-go's generated
// code asks it for is an informer of this package, whatever the kind. Its store is
// the cache's newest snapshot, its handlers are told by a goroutine each.
//
//	state ──▶ objects.Cache ──▶ Feed: which kinds changed? ──wakes──▶ listener ──▶ OnAdd, OnUpdate, OnDelete
//	               ▲                                                     │
//	               └────────── what changed since my snapshot? ──────────┘
//
// Nothing is queued for a handler. It has a snapshot that it was told of, which is
// its position in the cache's changes; when the cache does not know them any more it
// is told the difference of the two snapshots, by uid and revision. So a handler
// that is slow costs two snapshots, and one that has nothing to do costs none: the
// Feed moves its snapshot on.
//
// It differs from client-go's informers in this:
//
//   - There is no resync. What changed is told once.
//   - An object that is deleted is told as it last was, with the resourceVersion of
//     its last change, not of its deletion.
//   - One that was replaced by another of the same name while the changes were not
//     known is told as deleted and added, not as updated.
//   - Objects carry their apiVersion and kind, and no managedFields.
//   - A store is never behind what a handler was told, and may be ahead of it.
//
// The objects are the cache's and must not be changed, as with every informer.
package feed
