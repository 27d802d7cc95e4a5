package backup

import (
	"errors"
	"io"

	"timonel/consensus"
	"timonel/internal/replicated"
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
	out.Recovery, err = consensus.Recover(c, replicated.Machine{Store: store}, func(w io.Writer, index, term uint64) error {
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
