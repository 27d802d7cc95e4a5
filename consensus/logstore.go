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
	"strings"

	"github.com/hashicorp/raft"
	wal "github.com/hashicorp/raft-wal"
	"github.com/hashicorp/raft-wal/metadb"

	"timonel/internal/durable"
)

// Values of Config.LogStore. docs/log-store.md compares them.
const (
	// LogStoreBolt is raft-boltdb, with a journal before it: see journaled.
	LogStoreBolt = "boltdb"
	// LogStoreWAL is raft-wal: segments written from start to end, one sync for
	// each append.
	LogStoreWAL = "wal"
)

// walSegment is the size of one file of the write-ahead log, which has all of it
// from the beginning.
const walSegment = 32 << 20

// LogStore holds the log, the term and the vote on disk.
type LogStore interface {
	raft.LogStore
	raft.StableStore
	io.Closer
}

// logKind is one way to keep the log.
type logKind struct {
	name string
	// file is the name of its file or folder in the data folder.
	file string
	// inspect reads and verifies all of it; the path must exist when started.
	inspect func(path string, started bool) (logExtent, error)
	// open opens it for writing after inspect.
	open func(path string, x logExtent, log *slog.Logger) (LogStore, error)
}

var logKinds = []logKind{
	{LogStoreBolt, logFile, inspectLog, openBolt},
	{LogStoreWAL, walDir, inspectWAL, func(path string, _ logExtent, log *slog.Logger) (LogStore, error) { return openWAL(path, log) }},
}

func openBolt(path string, x logExtent, log *slog.Logger) (LogStore, error) {
	store, err := openLog(path, x, log)
	if err != nil {
		return nil, err
	}
	var j *journaled
	if err := guard(func() (err error) {
		j, err = openJournal(path, store)
		return err
	}); err != nil {
		return nil, errors.Join(err, store.Close())
	}
	return j, nil
}

// logKindIn returns the kind of the given name, and an error if the data folder
// holds a log of another.
func logKindIn(dir, name string) (logKind, error) {
	for _, k := range logKinds {
		if k.name == name {
			continue
		}
		if _, err := os.Stat(filepath.Join(dir, k.file)); err == nil {
			return logKind{}, fmt.Errorf("%s: the log in this folder is a %s one, and %s is configured: configure %s, or, if the other replicas are healthy, remove %s and start again, to catch up from them",
				filepath.Join(dir, k.file), k.name, name, k.name, dir)
		}
	}
	i := slices.IndexFunc(logKinds, func(k logKind) bool { return k.name == name })
	return logKinds[i], nil // Validate knows the name
}

// inspectWAL reads all of a write-ahead log and verifies what can be verified. An
// append at its end that was cut off by a crash is dropped, for nobody was told
// of it.
func inspectWAL(dir string, started bool) (x logExtent, err error) {
	entries, err := os.ReadDir(dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return x, err
	}
	if len(entries) == 0 {
		if started {
			return x, errors.New("the log is missing or empty")
		}
		return x, nil
	}
	meta := false
	for _, e := range entries {
		info, err := e.Info()
		if err != nil {
			return x, err
		}
		switch {
		case e.Name() == walMeta:
			meta = true
			if err := checkBoltFile(filepath.Join(dir, walMeta), info.Size()); err != nil {
				return x, fmt.Errorf("%s: %w", walMeta, err)
			}
		case strings.HasSuffix(e.Name(), ".wal"):
			if info.Size() < walSegment {
				return x, fmt.Errorf("%s: the file is truncated: %d bytes of at least %d", e.Name(), info.Size(), walSegment)
			}
			x.size += info.Size()
		}
	}
	if !meta {
		return x, fmt.Errorf("%s is missing", walMeta)
	}
	err = guard(func() error {
		store, err := openWAL(dir, slog.New(slog.DiscardHandler))
		if err != nil {
			return err
		}
		return errors.Join(x.read(store), store.Close())
	})
	return x, err
}

// What raft-wal puts into its folder, and the folder.
const (
	walDir  = "wal"
	walMeta = "wal-meta.db"
)

func openWAL(dir string, log *slog.Logger) (LogStore, error) {
	if err := durable.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	meta := &metadb.BoltMetaDB{}
	opened, err := wal.Open(dir, wal.WithSegmentSize(walSegment), wal.WithMetaStore(meta), wal.WithLogger(newRaftLog(log)))
	if err != nil {
		meta.Close()
		return nil, err
	}
	return &walStore{WAL: opened, meta: meta}, nil
}

// walStore closes what raft-wal leaves open, and with it locked.
type walStore struct {
	*wal.WAL
	meta *metadb.BoltMetaDB
}

func (w *walStore) Close() error { return errors.Join(w.WAL.Close(), w.meta.Close()) }
