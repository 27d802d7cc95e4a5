package consensus

import (
	"fmt"

	"github.com/hashicorp/raft"
)

// Raft makes a message to a follower that lags of up to MaxAppendEntries entries, whatever
// their size: hundreds of MiB, which it reads at once, for each such follower, and which
// do not come through within TransportTimeout. So a message has
// Config.MaxAppendBytes of entries, or one:
//
//   - GetLog leaves for later what Raft reads for a message from a part of the log with
//     large entries that is not in memory (disk.later): Raft gets a stand-in;
//   - fill reads these entries when the message is about to be sent, and cuts it off where
//     it is full. Raft goes on after the last entry that it finds in the message;
//   - a pipeline sends the rest at once, as messages of its own (pipeline.AppendEntries),
//     for Raft would come back to it with the next write only.

// laterType is the type of an entry that stands in for one that is read later. It is in no
// log and on no wire.
const laterType raft.LogType = 0xff

// Raft also reads all that is committed for a state machine that is behind, and keeps up to
// 128 batches of MaxAppendEntries entries for it, at a start as well as when it is slow:
// beyond Config.ApplyBytes it gets entries without their data, which the state machine reads
// when it comes to them (machine.portion).

// notYet reports that Raft has enough for the state machine, up to an entry that it reads.
func (d *disk) notYet(index uint64) bool {
	applied := d.applied.Load()
	if d.ahead == 0 || index <= applied+1 {
		return false
	}
	var bytes int64
	d.weigh(func(w *weights) { bytes = w.after(applied) - w.after(index) })
	return bytes > d.ahead && calledBy("raft.(*Raft).processLogs")
}

// applyPortion is how many bytes the state machine reads before it applies them.
const applyPortion = 4 << 20

// portion is the first of the entries, those without data read, and how many of these
// there are: their data is let go of when they are applied.
func (m *machine) portion(logs []*raft.Log) (portion, read []*raft.Log, err error) {
	bytes := int64(0)
	for i, l := range logs {
		if l.Type != raft.LogCommand || l.Data != nil { // a command has a header at least
			continue
		}
		if bytes >= applyPortion {
			return logs[:i], read, nil
		}
		var full raft.Log
		if err := m.read(l.Index, &full); err != nil {
			return logs[:i], read, fmt.Errorf("read log entry %d to apply it: %w", l.Index, err)
		}
		if full.Term != l.Term || full.Type != l.Type {
			return logs[:i], read, fmt.Errorf("log entry %d was of term %d when it was committed, and is of term %d", l.Index, l.Term, full.Term)
		}
		l.Data = full.Data
		read = append(read, l)
		bytes += inMemory(l)
	}
	return logs, read, nil
}

// later reports that the entry is one of those that are read when a message is sent. It is
// asked when the entry is not in memory.
func (d *disk) later(index uint64) bool {
	if d.portion == 0 {
		return false
	}
	heavy := false
	d.weigh(func(w *weights) {
		heavy = w.after(index-1)-w.after(index+d.message-1) > d.portion
	})
	if !heavy || !calledBy("raft.(*Raft).setNewLogs") {
		return false
	}
	first, err := d.logs.FirstIndex()
	if err != nil || first == 0 || index < first {
		return false // a snapshot is sent then
	}
	last, err := d.logs.LastIndex()
	return err == nil && index <= last
}

// fill reads the entries of a message that were left for later, and cuts it off where it is
// full: at least one entry stays. What it says of commits does not go beyond it, for the
// follower's log may have other entries there.
func (d *disk) fill(req *raft.AppendEntriesRequest) error {
	bytes := int64(0)
	for i, l := range req.Entries {
		if i > 0 && d.portion > 0 && bytes >= d.portion {
			clear(req.Entries[i:])
			req.Entries = req.Entries[:i:i]
			break
		}
		if l.Type == laterType {
			index := l.Index
			if err := d.read(index, l); err != nil {
				return fmt.Errorf("read entry %d for a follower: %w", index, err)
			}
		}
		if l.Term > req.Term {
			return fmt.Errorf("entry %d is of term %d by now, and the message of %d", l.Index, l.Term, req.Term)
		}
		bytes += inMemory(l)
	}
	if n := len(req.Entries); n > 0 {
		req.LeaderCommitIndex = min(req.LeaderCommitIndex, req.Entries[n-1].Index)
	}
	return nil
}

// whole reports that a message is sent as it is.
func (d *disk) whole(logs []*raft.Log) bool {
	bytes := int64(0)
	for _, l := range logs {
		if bytes += inMemory(l); l.Type == laterType {
			return false
		}
	}
	return bytes <= d.portion || d.portion == 0
}

// portions sends a message of a pipeline in as many parts as it takes. Raft finds the
// entries in args as it gave them.
func (d *disk) portions(args *raft.AppendEntriesRequest, send func(*raft.AppendEntriesRequest) error) error {
	if d.whole(args.Entries) {
		if err := d.fill(args); err != nil {
			return err
		}
		return send(args)
	}
	rest := args.Entries
	for prev, term := args.PrevLogEntry, args.PrevLogTerm; ; {
		part := *args
		part.PrevLogEntry, part.PrevLogTerm = prev, term
		part.Entries = make([]*raft.Log, len(rest))
		for i, l := range rest {
			entry := *l // what is read is not kept when it is sent
			part.Entries[i] = &entry
		}
		if err := d.fill(&part); err != nil {
			return err
		}
		n := len(part.Entries)
		if err := send(&part); err != nil {
			return err
		}
		if rest = rest[n:]; len(rest) == 0 {
			return nil
		}
		prev, term = part.Entries[n-1].Index, part.Entries[n-1].Term
	}
}
