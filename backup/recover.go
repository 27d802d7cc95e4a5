package backup

import (
	"errors"
	"io"

	"timonel/consensus"
	"timonel/state"
)

// Recovered is what a recovered cluster starts from.
type Recovered struct {
	consensus.Recovery
	// Former is the revision that the folder had, Revision what it has now, Keys
	// how many objects.
	Former, Revision int64
	Keys             int
}

// Recover makes the controller whose Raft folder it is the whole cluster: see
// [consensus.Recover]. Every revision is raised as by Restore, for the lost
// controllers may have acknowledged writes that this one lacks, and their revisions
// must not be given out again. The state has to fit into memory.
func Recover(c consensus.RecoverConfig) (Recovered, error) {
	store := state.New(state.Options{})
	var out Recovered
	var err error
	out.Recovery, err = consensus.Recover(c, machine{store}, func(w io.Writer, index, term uint64) error {
		view := store.View()
		raise := state.Raise{By: max(leastBump, c.Now.UnixMicro()-view.Revision()), Index: index, Term: term}
		r, pipe := io.Pipe()
		written := make(chan error, 1)
		go func() {
			_, err := view.WriteTo(pipe)
			pipe.CloseWithError(err)
			written <- err
		}()
		info, err := state.RaiseSnapshot(w, r, raise)
		r.CloseWithError(err)
		out.Revision = info.Revision
		return errors.Join(err, <-written)
	})
	view := store.View()
	out.Former, out.Keys = view.Revision(), view.Len()
	return out, err
}

// machine lets a log drive the store.
type machine struct{ store *state.Store }

func (m machine) ApplyBatch(entries []consensus.Entry) []any {
	batch := make([]state.Entry, len(entries))
	for i, e := range entries {
		batch[i] = state.Entry{Index: e.Index, Term: e.Term, Command: e.Command}
	}
	m.store.ApplyBatch(batch)
	return make([]any, len(entries))
}

func (m machine) Snapshot() (consensus.SnapshotWriter, error) { return m.store.View(), nil }

func (m machine) Restore(r io.Reader) error { return m.store.Restore(r) }
