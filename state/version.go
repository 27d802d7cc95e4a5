package state

import (
	"errors"
	"fmt"
	"strconv"
)

// VersionKey holds the cluster version, a decimal number: the least that the
// programs of all members can run under. It says which formats may be written, so
// that no replica meets one that it cannot read: in the store and to whoever asks
// [View.ClusterVersion]. It only grows. Without the key it is 1.
const VersionKey = "/timonel/cluster-version"

// NewestVersion is the newest cluster version that this package knows. What each
// brought:
//
//	1  commands and snapshots as of the first release
//	2  log entries carry the cluster version; programs that do not know of it stand still;
//	   snapshots may tell of a history with gaps
//	3  the keys of gossip are in the state, and may be rotated
const NewestVersion = 3

// ErrNewerVersion is wrapped when a command, or a snapshot, is of a cluster version
// or in a format that this program does not know. Nothing of it was applied; a
// replica must then stand still until a newer program runs.
var ErrNewerVersion = errors.New("a newer program wrote it: run that one")

// ClusterVersion is the cluster version as of the view, 1 or more. See [VersionKey].
func (v View) ClusterVersion() int { return v.v.clusterVersion }

// versionAfter is the cluster version after txn's changes. What is no number, or less
// than it was, changes nothing.
func (s *Store) versionAfter(txn *Txn) (int, error) {
	version := s.head.clusterVersion
	for i := range txn.Changes {
		if c := &txn.Changes[i]; c.Key == VersionKey && !c.Delete {
			if to, err := s.options.knownVersion(c.Value, version); err != nil {
				return 0, err
			} else if to > version {
				version = to
			}
		}
	}
	return version, nil
}

// knownVersion reads what VersionKey holds; unreadable is otherwise.
func (o *Options) knownVersion(value []byte, otherwise int) (int, error) {
	version, err := strconv.Atoi(string(value))
	if err != nil {
		return otherwise, nil
	}
	if version > o.NewestVersion {
		return 0, fmt.Errorf("%w (cluster version %d, this program knows up to %d)", ErrNewerVersion, version, o.NewestVersion)
	}
	return version, nil
}

// versionOf is the cluster version of a restored state.
func (o *Options) versionOf(root *tree) (int, error) {
	kv, ok := root.Get(VersionKey)
	if !ok {
		return 1, nil
	}
	version, err := o.knownVersion(kv.Value, 1)
	return max(version, 1), err
}
