// Package state is the replicated state machine: an ordered multi-version map
// from keys to values that every controller keeps in memory and changes only by
// applying committed log entries.
//
// A log entry holds one [Txn]: conditions on keys' revisions, and the puts and
// deletes to do when all of them hold. Each change takes the next revision, so a
// watch can resume between any two changes; a Kubernetes resourceVersion is such
// a revision and is equal on every replica. The package reads no clock, draws no
// random number and, but for the history, depends on nothing but the entries, so replicas that applied
// the same entries are the same to the byte (see [View.Hash]) but for their history.
//
//	store := state.New(state.Options{})
//	txn := state.Txn{
//		Conditions: []state.Condition{{Key: "/registry/pods/a/b"}}, // must not exist
//		Changes:    []state.Change{{Key: "/registry/pods/a/b", Value: pod}},
//	}
//	results := store.ApplyBatch([]state.Entry{{Index: 7, Term: 1, Command: txn.Marshal()}})
//
//	view := store.View() // O(1), never changes
//	for kv := range view.Range("/registry/pods/", "") { … }
//
//	w, err := store.Watch("/registry/pods/", view.Revision())
//	events, err := w.Next(ctx)
//
// # Structure
//
// The map is a copy-on-write B-tree (tidwall/btree), so that a view, a snapshot
// and a checkpoint cost one pointer. A bounded window of recent changes (the
// history) serves watches that resume and [Store.At], which undoes changes on a copy
// of the nearest later tree. Revisions before the window answer [ErrCompacted].
//
// The history is not part of the replicated state: each replica keeps its own, by its
// own clock ([Store.Tick]) and within its own memory. What it promises is said at
// [Options]. It holds only what the state does not, which is what each change
// replaced. What is too much is taken from who holds most: the history is accounted
// for by directory (the keys up to the last slash: one resource in one namespace) in
// families (that resource in all namespaces), and where some of a directory's events
// were cut, only watches and reads of its keys are refused.
//
// At rest ([Store.Spill]) the history is in memory only as far as watches mostly resume.
// The chunks before that are in files that have no names: the record of each event whole,
// some 128 KiB of them compressed together, under a checksum that is kept in memory. Of
// each event there it is known in memory to which directory it belongs, what it weighs and
// when it came, some 20 bytes: so what the history drops, and why, does not depend on where
// it is, and what has no event of the keys asked for is not read. What is read is
// checked; when that fails, or a file cannot be written, or the files are larger than
// they may be, the floor of all keys rises to there. A file's room is the disk's again
// when all its events are gone and nobody reads it. Nothing is written while the store is
// busy, and no writer waits for a read.
//
// Watchers of one prefix share one list of its events: an event is linked into
// the list of each prefix that it matches, once, whatever the number of watchers,
// and each watcher walks the list at its own pace. A writer never waits for a
// watcher; one that falls behind the history window gets ErrCompacted.
//
// # Formats
//
// Whoever changes what a command or a snapshot looks like, or what applying one does,
// counts [NewestVersion] up and does the new thing only when [View.ClusterVersion]
// says so (in apply: s.head.clusterVersion): it is part of the state, so all replicas
// change over at the same entry, and only when all their programs can. What a program
// does not know it must not skip: see [ErrNewerVersion].
package state
