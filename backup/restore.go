package backup

import (
	"errors"
	"fmt"
	"io"
	"time"

	"timonel/consensus"
	"timonel/state"
)

// Target is the data folder that Restore makes.
type Target struct {
	// DataDir is consensus's folder, which must not exist or be empty.
	DataDir string
	// ClusterID is of the bundle that the new cluster uses, Name the controller's
	// that starts from the folder.
	ClusterID, Name string
	// Address is where others reach that controller's Raft; it corrects it when it
	// starts.
	Address string
	// LogStore is the controller's --log-store; empty for the default.
	LogStore string
	// Now decides what the revisions are raised to; see the package's comment.
	Now time.Time
	// Bump, if not 0, is what every revision is raised by instead.
	Bump int64
}

// Restored is what a restored cluster starts from.
type Restored struct {
	Header   // of the file
	Revision int64
	Index    uint64
	Term     uint64
}

// Raised by at least this much, whatever the clock says.
const (
	leastBump     = 1_000_000_000
	leastTermBump = 1000
)

// Restore makes a data folder of a new cluster with one controller out of the
// file. It streams: memory does not grow with the state. On an error there is no
// folder.
func Restore(r *Reader, t Target) (Restored, error) {
	h := r.header
	if t.Bump < 0 {
		return Restored{}, errors.New("revisions can only be raised")
	}
	raise := state.Raise{
		By:    t.Bump,
		Index: max(h.Index+leastBump, uint64(t.Now.UnixMicro())),
		Term:  max(h.Term+leastTermBump, uint64(t.Now.Unix())),
	}
	if raise.By == 0 {
		raise.By = max(leastBump, t.Now.UnixMicro()-h.Revision)
	}
	var info state.SnapshotInfo
	err := consensus.Seed(consensus.SeedConfig{
		DataDir: t.DataDir, ClusterID: t.ClusterID, ID: t.Name, Address: t.Address, LogStore: t.LogStore, Index: raise.Index, Term: raise.Term,
	}, func(w io.Writer) (err error) {
		if info, err = state.RaiseSnapshot(w, r, raise); err != nil {
			return r.stateError(err)
		}
		raw := info
		raw.Revision, raw.Index, raw.Term = raw.Revision-raise.By, h.Index, h.Term
		return r.check(raw)
	})
	if err != nil {
		return Restored{}, fmt.Errorf("restore: %w", err)
	}
	return Restored{Header: h, Revision: info.Revision, Index: info.Index, Term: info.Term}, nil
}
