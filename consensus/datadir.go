package consensus

import (
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	"timonel/internal/durable"
)

// What a data folder holds.
const (
	identityFile = "replica.json"
	lockFile     = "lock"
	logFile      = "raft.db"
	snapshotDir  = "snapshots"

	dataFormat = 1
)

// identity says whose a data folder is. It is the first file written and the
// first one read.
type identity struct {
	// Format is the version of the folder's layout.
	Format    int    `json:"format"`
	ClusterID string `json:"clusterID"`
	ReplicaID string `json:"replicaID"`
	// Incarnation is drawn when the folder is made: a wiped replica has another.
	Incarnation string `json:"incarnation"`
	// Started: the log and the votes exist. A started folder without them is
	// damaged, and must not pass for an empty one: it has voted.
	Started bool `json:"started"`
	// Generation is when the data was last recovered or restored without the
	// others, in microseconds since 1970; 0: never. Replicas of different
	// generations do not talk Raft to each other.
	Generation uint64 `json:"generation,omitempty"`
	// Superseded is the later generation that the cluster is known to have: this
	// data is of no use any more.
	Superseded uint64 `json:"superseded,omitempty"`
	// Removed: a leader says that this replica is not a member any more. Its own log
	// need not.
	Removed bool `json:"removed,omitempty"`
	// Promise is the set this replica agreed to found the cluster with, and
	// Promised the replica that asked.
	Promise    []Server `json:"promise,omitempty"`
	PromisedTo string   `json:"promisedTo,omitempty"`
	// Asked: the cluster was met before the word to start came, and a leader was
	// asked to let this replica in. The promise founds nothing any more.
	Asked bool `json:"asked,omitempty"`
}

func newIdentity(clusterID, replicaID string) identity {
	var incarnation [16]byte
	rand.Read(incarnation[:])
	return identity{Format: dataFormat, ClusterID: clusterID, ReplicaID: replicaID, Incarnation: hex.EncodeToString(incarnation[:])}
}

// dataFolder is a locked data folder of this replica.
type dataFolder struct {
	path string
	lock *os.File
	// keep, if not nil, keeps the identity instead of a file.
	keep func([]byte) error
	identity
}

// openDataFolder checks that the folder is this replica's, or makes it, and
// locks it. On an error nothing was changed.
func openDataFolder(path, clusterID, replicaID string) (*dataFolder, error) {
	d := &dataFolder{path: path}
	known, err := d.readIdentity()
	if err != nil {
		return nil, err
	}
	file := filepath.Join(path, identityFile)
	if known {
		switch {
		case d.Format != dataFormat:
			return nil, fmt.Errorf("%s: data format %d, this program knows %d: run a matching version", file, d.Format, dataFormat)
		case d.ClusterID != clusterID:
			return nil, fmt.Errorf("%s: the data is of cluster %q, this is cluster %q: point the replica at its own folder, or remove %s if that data is not needed", file, d.ClusterID, clusterID, path)
		case d.Superseded != 0:
			return nil, errSuperseded(path, "another replica", d.Superseded)
		case d.ReplicaID != replicaID:
			return nil, fmt.Errorf("%s: the data is of replica %q, this is replica %q: each replica needs its own folder", file, d.ReplicaID, replicaID)
		}
	} else {
		for _, name := range []string{logFile, walDir, snapshotDir} {
			if _, err := os.Stat(filepath.Join(path, name)); err == nil {
				return nil, fmt.Errorf("%s is missing beside %s: restore it, or remove %s to rejoin from the other replicas", file, name, path)
			}
		}
	}
	if err := durable.MkdirAll(path, 0o700); err != nil {
		return nil, fmt.Errorf("data folder: %w", err)
	}
	if err := d.acquire(); err != nil {
		return nil, err
	}
	if known {
		return d, nil
	}
	d.identity = newIdentity(clusterID, replicaID)
	if err := d.save(); err != nil {
		d.close()
		return nil, err
	}
	return d, nil
}

func (d *dataFolder) readIdentity() (known bool, err error) {
	file := filepath.Join(d.path, identityFile)
	b, err := os.ReadFile(file)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return false, nil
	case err != nil:
		return false, fmt.Errorf("data folder: %w", err)
	}
	if err := json.Unmarshal(b, &d.identity); err != nil {
		return false, fmt.Errorf("%s cannot be read (%v): restore it, or remove %s to rejoin from the other replicas", file, err, d.path)
	}
	return true, nil
}

// acquire takes the folder's lock, which the kernel drops with the process.
func (d *dataFolder) acquire() error {
	file := filepath.Join(d.path, lockFile)
	f, err := os.OpenFile(file, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return fmt.Errorf("data folder: %w", err)
	}
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		by := ""
		if b, err := os.ReadFile(file); err == nil && len(b) > 0 {
			by = " with pid " + strings.TrimSpace(string(b))
		}
		f.Close()
		return fmt.Errorf("data folder %s is in use by another process%s: stop it, or use another folder", d.path, by)
	}
	f.Truncate(0)
	f.WriteAt([]byte(strconv.Itoa(os.Getpid())+"\n"), 0)
	d.lock = f
	return nil
}

// change changes the identity on disk and then in memory, or neither.
func (d *dataFolder) change(f func(*identity)) error {
	before := d.identity
	f(&d.identity)
	err := d.save()
	if err != nil {
		d.identity = before
	}
	return err
}

// save writes the identity so that it is there whole or not at all.
func (d *dataFolder) save() error {
	b, err := json.MarshalIndent(d.identity, "", "  ")
	if err != nil {
		return err
	}
	if d.keep != nil {
		return d.keep(b)
	}
	file := filepath.Join(d.path, identityFile)
	if err := durable.WriteFile(file, append(b, '\n'), 0o600); err != nil {
		return fmt.Errorf("data folder: %w", err)
	}
	return nil
}

func (d *dataFolder) close() error {
	if d.lock == nil {
		return nil
	}
	return d.lock.Close()
}

func (d *dataFolder) file(name string) string { return filepath.Join(d.path, name) }
