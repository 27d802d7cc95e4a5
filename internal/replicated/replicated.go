// Package replicated joins the two halves of a replica: it lets the log of
// [timonel/consensus] drive the store of [timonel/state], which know nothing of
// one another.
package replicated

import (
	"context"
	"errors"
	"fmt"
	"io"

	"timonel/consensus"
	"timonel/state"
)

// Machine is a store as the log drives it. The result of a command is a
// [state.Result].
type Machine struct{ Store *state.Store }

var (
	_ consensus.FSM           = Machine{}
	_ consensus.Fingerprinter = Machine{}
)

// ApplyBatch implements [consensus.FSM].
func (m Machine) ApplyBatch(entries []consensus.Entry) ([]any, error) {
	batch := make([]state.Entry, len(entries))
	for i, e := range entries {
		batch[i] = state.Entry{Index: e.Index, Term: e.Term, Command: e.Command}
	}
	results := m.Store.ApplyBatch(batch)
	out := make([]any, len(results))
	for i, r := range results {
		if errors.Is(r.Err, state.ErrNewerVersion) {
			return nil, fmt.Errorf("log entry %d: %w", entries[i].Index, r.Err)
		}
		out[i] = r
	}
	return out, nil
}

// Snapshot implements [consensus.FSM].
func (m Machine) Snapshot() (consensus.SnapshotWriter, error) { return m.Store.View(), nil }

// Restore implements [consensus.FSM].
func (m Machine) Restore(r io.Reader) error { return m.Store.Restore(r) }

// Fingerprint implements [consensus.Fingerprinter].
func (m Machine) Fingerprint() (revision int64, hash uint64) {
	v := m.Store.View()
	return v.Revision(), v.Hash()
}

// FingerprintAt implements [consensus.Fingerprinter].
func (m Machine) FingerprintAt(revision int64) (hash uint64, ok bool) {
	return m.Store.HashAt(revision)
}

// AwaitFingerprint implements [consensus.Fingerprinter].
func (m Machine) AwaitFingerprint(ctx context.Context, revision int64) error {
	return m.Store.WaitRevision(ctx, revision)
}
