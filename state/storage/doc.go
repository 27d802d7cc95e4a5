// Package storage adapts the replicated state to k8s.io/apiserver's
// storage.Interface, so that the Kubernetes API keeps its objects in it.
//
// [Decorator] makes a storage for each resource of the API server over one
// [Backend], which is a replica: its state, a way to commit a transaction and a
// read barrier. [New] makes one by hand.
//
//	options.StorageConfig = …
//	restOptions.Decorator = storage.Decorator(backend, storage.NewCaches(64<<20))
//
// # Consistency
//
// A get or list without a resourceVersion passes the read barrier and then reads
// local memory: it is linearizable on every replica. With resourceVersion "0" it
// reads local memory; with another it waits, for a while, until this replica has
// reached it. Lists in pages read the state at the revision of the first page,
// on any replica. Writes are conditional on the revision that they are based on:
// they begin with what this replica has and start again with what the log
// answered if that was not the newest, so that a write costs one commit and no
// read. An error that rests on local data alone (not found, a failed
// precondition) is given only after a barrier has confirmed the data.
//
// A commit whose outcome is unknown answers a retriable error.
//
// # Decoding once
//
// Each stored version of an object is decoded once and shared: a bounded cache,
// common to all storages of a backend, is keyed by storage, key and revision.
// Gets copy from it; lists share nested data with it as upstream's watch cache
// does. The object of a watch event, its labels and fields for selectors, and
// each of its encodings are made once for all its watchers.
package storage
