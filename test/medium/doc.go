// Package medium simulates a disk under the files of a log: the journal, and bbolt's data
// file as bbolt itself writes it.
//
// A file is sectors. What a process writes is in its page cache; a sync puts it on the
// disk. A power cut leaves of each sector that was written since the last sync the old or
// the new content, by lottery. A sync that fails leaves the same, and is not made good by
// one that succeeds: a sector that it has lost is as new to the process, old on the disk,
// until it is written again, as on Linux. A write that fails has written a part. The
// process goes on after a failure, or is killed, after which another one sees what it saw,
// and the power is cut later, at any write or sync. A full disk takes what needs no more
// room.
package medium
