package consensus

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/hashicorp/raft"
	"golang.org/x/sys/unix"

	"timonel/internal/durable"
)

// RecoverConfig says what Recover does.
type RecoverConfig struct {
	// DataDir is the folder of a replica that does not run.
	DataDir string
	// DryRun makes nothing: the folder stays in place, as after a start and a stop.
	DryRun bool
	// Force takes the folder of a replica that is not a voter, too.
	Force bool
	// Now decides the generation, and what indexes and terms are raised to.
	Now time.Time
	// Logger gets Raft's messages. Default: none.
	Logger *slog.Logger
}

// Recovery is what Recover found and made.
type Recovery struct {
	ID, ClusterID string
	LogStore      string
	// Index and Term are those of the last entry in the folder. Of several
	// replicas the one with the greatest term, then index, has every committed
	// entry that any of them has.
	Index, Term uint64
	// Written is when the log was last written to.
	Written time.Time
	// Members are those of the lost cluster, as far as this folder knows.
	Members []Member
	// Kept is where the folder as it was is now.
	Kept string
	// Finished: an earlier call had been cut off after its work; Kept is set only.
	Finished bool
}

// Recover makes the one replica whose folder it is the whole cluster, when the
// majority is lost: it is the only voter, others join it with empty folders. All
// entries in its log count, whether they were known to be committed or not: fsm
// gets them, and write writes what fsm holds then, as of the index and term given,
// which are greater than any that the lost cluster can have given out.
//
// The new folder is made beside the old one and takes its place at once, by an
// exchange of the two names; up to then the old one is as after a start and a stop.
// Folders of the other members are of an earlier generation: should one run again, it stops as
// soon as it meets this replica. Folders that are in use, damaged, empty or not
// of a voter are refused.
func Recover(c RecoverConfig, fsm FSM, write func(w io.Writer, index, term uint64) error) (Recovery, error) {
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	c.DataDir = filepath.Clean(c.DataDir)
	folder, err := lockFolder(c.DataDir)
	if err != nil {
		return Recovery{}, err
	}
	defer folder.close()
	next := c.DataDir + ".recovered"
	if kept, err := finishRecovery(folder, next, c); err != nil || kept != "" {
		return Recovery{ID: folder.ReplicaID, ClusterID: folder.ClusterID, Kept: kept, Finished: true}, err
	}
	out, self, term, err := replay(folder, c, fsm)
	if err != nil || c.DryRun {
		return out, err
	}
	seed := SeedConfig{
		DataDir: next, ClusterID: out.ClusterID, ID: out.ID, Address: string(self.Address), LogStore: out.LogStore,
		Index:      max(out.Index+1_000_000_000, uint64(c.Now.UnixMicro())),
		Term:       max(term+1000, uint64(c.Now.Unix())),
		Generation: max(folder.Generation+1, uint64(c.Now.UnixMicro())),
		Logger:     c.Logger,
	}
	if err := Seed(seed, func(w io.Writer) error { return write(w, seed.Index, seed.Term) }); err != nil {
		return out, fmt.Errorf("recover: %w", err)
	}
	if err := unix.Renameat2(unix.AT_FDCWD, next, unix.AT_FDCWD, c.DataDir, unix.RENAME_EXCHANGE); err != nil {
		return out, errors.Join(fmt.Errorf("exchange %s and %s: %w: copy the data folder to a file system that can (ext4, xfs, btrfs) and recover it there", next, c.DataDir, err), os.RemoveAll(next))
	}
	out.Kept, err = keep(next, c)
	return out, err
}

// keep gives the folder as it was its last name.
func keep(next string, c RecoverConfig) (kept string, err error) {
	kept = c.DataDir + ".before-recovery-" + c.Now.UTC().Format("20060102T150405Z")
	// The exchange first: until it lasts, next may be the new one again.
	if err := durable.SyncParents(next); err != nil {
		return "", fmt.Errorf("the recovered folder is in place, the one before is %s: %w", next, err)
	}
	if err := durable.Rename(next, kept); err != nil {
		return "", fmt.Errorf("the recovered folder is in place, the one before is %s: %w", next, err)
	}
	return kept, nil
}

// lockFolder opens a replica's folder without changing it.
func lockFolder(dir string) (*dataFolder, error) {
	d := &dataFolder{path: dir}
	known, err := d.readIdentity()
	switch {
	case err != nil:
		return nil, err
	case !known:
		return nil, fmt.Errorf("%s is not the data folder of a replica: it has no %s", dir, identityFile)
	case d.Format != dataFormat:
		return nil, fmt.Errorf("%s: data format %d, this program knows %d: run a matching version", d.file(identityFile), d.Format, dataFormat)
	case d.Superseded != 0:
		return nil, errSuperseded(dir, "another replica", d.Superseded)
	case !d.Started:
		return nil, fmt.Errorf("%s has no data: replica %s never was a member", dir, d.ReplicaID)
	}
	return d, d.acquire()
}

// finishRecovery looks at what an earlier Recover left that was cut off: a folder
// that is not in place is removed; if it was, the name of the former one is
// returned.
func finishRecovery(folder *dataFolder, next string, c RecoverConfig) (kept string, err error) {
	if _, err := os.Lstat(next); errors.Is(err, fs.ErrNotExist) {
		return "", nil
	}
	left := &dataFolder{path: next}
	if known, err := left.readIdentity(); err != nil || !known {
		return "", fmt.Errorf("%s is in the way and no replica's: look at it, and remove it", next)
	}
	switch {
	case c.DryRun:
		return "", nil
	case left.Generation < folder.Generation:
		return keep(next, c)
	}
	return "", os.RemoveAll(next)
}

// replay gives fsm all that the folder holds. It returns this replica's entry in
// the configuration and its term.
func replay(folder *dataFolder, c RecoverConfig, fsm FSM) (out Recovery, self raft.Server, term uint64, err error) {
	stop := make(chan struct{})
	close(stop) // a machine that meets a corrupt entry must not wait
	r := &Replica{cfg: Config{DataDir: c.DataDir, SnapshotRetain: 2}, log: c.Logger, folder: folder, machine: newMachine(fsm, stop), stop: stop}
	for _, k := range logKinds {
		if _, err := os.Stat(folder.file(k.file)); err == nil {
			r.cfg.LogStore = k.name
			for _, file := range []string{k.file, k.file + journalSuffix} {
				if at, err := newestFile(folder.file(file)); err == nil && at.After(out.Written) {
					out.Written = at
				}
			}
		}
	}
	if r.cfg.LogStore == "" {
		return out, self, 0, fmt.Errorf("%s is damaged: it has no log", c.DataDir)
	}
	if _, err := r.openData(); err != nil {
		return out, self, 0, err
	}
	defer r.store.Close()
	out.ID, out.ClusterID, out.LogStore = folder.ReplicaID, folder.ClusterID, r.cfg.LogStore
	servers, err := r.feed()
	if err != nil {
		return out, self, 0, fmt.Errorf("%s is damaged: %w", c.DataDir, err)
	}
	out.Index, out.Term = r.machine.position()
	if term, err = r.disk.GetUint64([]byte("CurrentTerm")); err != nil || out.Index == 0 {
		return out, self, 0, fmt.Errorf("%s has no data: replica %s never caught up", c.DataDir, out.ID)
	}
	for _, s := range servers {
		out.Members = append(out.Members, Member{Server: Server{ID: string(s.ID), Addr: string(s.Address)}, Voter: s.Suffrage == raft.Voter})
	}
	i := slices.IndexFunc(servers, func(s raft.Server) bool { return string(s.ID) == out.ID })
	switch {
	case (i < 0 || folder.Removed) && !c.Force:
		return out, self, 0, fmt.Errorf("%s: replica %s was removed from the cluster, so others have later data: recover one of them, or give --force", c.DataDir, out.ID)
	case i < 0:
		self = raft.Server{ID: raft.ServerID(out.ID), Address: "127.0.0.1:7444"}
	case servers[i].Suffrage != raft.Voter && !c.Force:
		return out, self, 0, fmt.Errorf("%s: replica %s was not a voter, so it may lack much: recover a voter, or give --force", c.DataDir, out.ID)
	default:
		self = servers[i]
	}
	return out, self, max(term, out.Term), nil
}

// feed gives the state machine the newest snapshot and the entries after it, and
// returns the configuration that they end with.
func (r *Replica) feed() ([]raft.Server, error) {
	var config raft.Configuration
	list, err := r.snapshots.List()
	if err != nil {
		return nil, err
	}
	if len(list) > 0 {
		meta, rc, err := r.snapshots.Open(list[0].ID)
		if err != nil {
			return nil, err
		}
		err = r.machine.Restore(rc)
		rc.Close()
		if err != nil {
			return nil, fmt.Errorf("snapshot %s: %w", meta.ID, err)
		}
		config = meta.Configuration
	}
	applied, _ := r.machine.position()
	last, err := r.disk.LastIndex()
	if err != nil {
		return nil, err
	}
	var batch []*raft.Log
	for i := applied + 1; i <= last; i++ {
		l := new(raft.Log)
		if err := r.disk.GetLog(i, l); err != nil {
			return nil, fmt.Errorf("log entry %d: %w", i, err)
		}
		if l.Type == raft.LogConfiguration {
			config = raft.DecodeConfiguration(l.Data)
		}
		if batch = append(batch, l); len(batch) < 512 && i < last {
			continue
		}
		r.machine.ApplyBatch(batch)
		if r.machine.corrupt != nil {
			return nil, r.machine.corrupt
		}
		batch = nil
	}
	return config.Servers, nil
}

// newestFile returns when the file, or the newest in the folder, was written.
func newestFile(path string) (at time.Time, err error) {
	err = filepath.WalkDir(path, func(_ string, e fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := e.Info()
		if err == nil && info.ModTime().After(at) {
			at = info.ModTime()
		}
		return err
	})
	return at, err
}
