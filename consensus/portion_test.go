package consensus

import (
	"bytes"
	"log/slog"
	"testing"

	"github.com/hashicorp/raft"
)

// What Raft would send in one message goes out in parts that follow one another, none of
// them much larger than it may be, whether Raft has the entries or stand-ins of them; and
// Raft finds in its own what it gave.
func TestPortions(t *testing.T) {
	t.Parallel()
	const portion, size, n = 10_000, 3000, 20
	for name, late := range map[string]bool{"in memory": false, "read later": true} {
		t.Run(name, func(t *testing.T) {
			d := newDisk(memoryStore{raft.NewInmemStore()}, raft.NewInmemSnapshotStore(), slog.New(slog.DiscardHandler), make(chan struct{}))
			d.portion, d.message = portion, 512
			var logs []*raft.Log
			for i := range uint64(n) {
				logs = append(logs, &raft.Log{Index: 5 + i, Term: 1 + i/7, Data: bytes.Repeat([]byte{byte(i)}, size)})
			}
			must(t, d.store.StoreLogs(logs))
			args := &raft.AppendEntriesRequest{Term: 4, PrevLogEntry: 4, PrevLogTerm: 1, LeaderCommitIndex: 17}
			for _, l := range logs {
				if late {
					l = &raft.Log{Index: l.Index, Type: laterType}
				}
				args.Entries = append(args.Entries, l)
			}
			prev, term, parts := args.PrevLogEntry, args.PrevLogTerm, 0
			must(t, d.portions(args, func(part *raft.AppendEntriesRequest) error {
				if part.PrevLogEntry != prev || part.PrevLogTerm != term || part.Term != 4 {
					t.Errorf("part %d follows %d of term %d, must %d of %d", parts, part.PrevLogEntry, part.PrevLogTerm, prev, term)
				}
				sum := 0
				for _, l := range part.Entries {
					if want := logs[l.Index-5]; l.Index != prev+1 || l.Term != want.Term || l.Type != want.Type || !bytes.Equal(l.Data, want.Data) {
						t.Fatalf("entry %d of term %d, type %v, %d bytes after %d", l.Index, l.Term, l.Type, len(l.Data), prev)
					}
					prev, term = l.Index, l.Term
					sum += len(l.Data)
				}
				if parts++; sum > portion+size {
					t.Errorf("part %d has %d bytes", parts, sum)
				}
				if want := min(17, prev); part.LeaderCommitIndex != want {
					t.Errorf("part %d up to %d tells of commits up to %d, want %d", parts, prev, part.LeaderCommitIndex, want)
				}
				return nil
			}))
			if prev != 5+n-1 || parts < n*size/(portion+size) || len(args.Entries) != n {
				t.Errorf("%d parts up to entry %d; Raft finds %d entries", parts, prev, len(args.Entries))
			}

			must(t, d.fill(args)) // as a message of its own, it is cut off
			if n := len(args.Entries); n == 0 || n*size > portion+size || args.LeaderCommitIndex != args.Entries[n-1].Index {
				t.Errorf("%d entries, commits up to %d", n, args.LeaderCommitIndex)
			}
			args.Term = 0 // the log has another leader's by now
			if err := d.fill(args); err == nil {
				t.Error("entries of a later term are sent")
			}
			args.Entries = []*raft.Log{{Index: 100, Type: laterType}}
			if err := d.fill(args); err == nil {
				t.Error("an entry that is gone is sent")
			}
		})
	}
}
