// Package backup is the file that a cluster's whole state is saved to, the
// schedule by which such files are made and kept in a folder or an S3-compatible
// store, and the restore of one into the data folder of a new cluster.
//
//	n, err := backup.Save(w, store.View(), backup.Header{ClusterID: …, Version: …, Time: …})
//
//	f, err := backup.Open("timonel.snapshot")       // reads and checks the header
//	info, err := backup.Inspect(f)                  // reads and verifies all of it
//	result, err := backup.Restore(f, backup.Target{…}) // makes a data folder from it
//
// # The file
//
//	magic      8 bytes, "TMNLSNAP"
//	header     length (4 bytes, big endian), JSON, CRC-32C of the JSON (4 bytes)
//	chunks     each a length (4 bytes, 1 to 1 MiB) and that many bytes
//	end        a length of 0
//	checksum   SHA-256 of all before it
//
// The chunks together are a snapshot as package state writes it, which has
// revisions, history and a checksum of its own. The length is not known before:
// the file is streamed from a view of the state while the cluster goes on. A
// file that was cut short or altered anywhere is refused with an error that
// wraps [ErrCorrupt]; nothing follows the checksum.
//
// # Restoring raises revisions
//
// After a restore clients hold revisions that the cluster gave after the
// snapshot and has lost. If new changes took the same numbers again, a client
// would see two states under one resourceVersion, miss changes in a watch, and
// its conditional writes would hit what it never read. So [Restore] adds one
// number to every revision: the store's own and each key's (etcd's restore with
// --bump-revision and --mark-compacted raises the store's alone). The history is
// dropped, so that every watch, list page and read at an old revision answers 410
// Gone and the client lists again, and every object it then finds has a
// resourceVersion that is new and greater than any it held. The number is chosen
// so that the new revision is the clock's microseconds since 1970, and at least
// a billion above the snapshot's: a later restore, even of the same file, starts
// above all that the cluster wrote since the last one. Raft's index and term are
// raised likewise, so that a controller of the former cluster that still runs is
// not listened to.
package backup
