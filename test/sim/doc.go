// Package sim runs whole clusters in one process, on a simulated network, disk
// and clock, and breaks them: thousands of short runs, each from one seed.
//
// What runs is the real thing (consensus, hashicorp/raft, state) on
// [consensus.Parts]: a wire that loses, delays and reorders messages and is cut,
// one way too, or hears late; a disk (test/medium) under the journal, its direct writes and
// bbolt that is slow, is full for a while, whose writes and syncs fail, now and then or
// once, while the replica goes on or is killed, and that forgets at a power cut some of what
// was not synced; and the clock of testing/synctest, so that a second of waiting costs
// nothing. What a log has said is on the disk, entries, term and vote, has to be there
// whenever it is opened (promises.go). Clients on each replica read, write, list and watch, their
// operations are recorded, and test/history checks the record. One client comes back to
// revisions of the age that the history promises, one watcher leaves a replica only when
// its stream ends, and streams of a replica that is out of touch have to.
//
//	go test ./test/sim -runs 3000          // seeds 1 to 3000
//	go test ./test/sim -seed 42 -v         // one of them, with its faults
//
// A seed decides which faults strike and when. It does not decide how the Go
// scheduler interleaves goroutines, so a rare failure may take some tries to come
// back; the history of the run that failed is kept.
package sim
