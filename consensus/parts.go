package consensus

import (
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/raft"
	raftboltdb "github.com/hashicorp/raft-boltdb/v2"
)

// Parts are the world that a replica stands on, for a simulation. All fields are
// required; the replica closes Wire and Log.
type Parts struct {
	// Wire carries Raft's messages. Peers are known by their name alone; a peer's
	// death is not told, so that elections begin by timeouts.
	Wire Wire
	// Log holds the log, the term and the vote. A write that returned is on disk.
	Log LogStore
	// Snapshots holds snapshots. One whose sink was closed is on disk.
	Snapshots raft.SnapshotStore
	// Identity is what Keep was last given; nil for an empty disk.
	Identity []byte
	// Keep writes the replica's identity to the disk.
	Keep func([]byte) error
}

// Wire is what a replica needs of Raft's transport; *raft.NetworkTransport has
// it.
type Wire interface {
	raft.Transport
	raft.WithPreVote
	raft.WithClose
	// CloseStreams closes connections that are kept for later.
	CloseStreams()
}

type wire = Wire

// LogFiles are the files of a log of LogStoreBolt, for a simulation.
type LogFiles struct {
	// Bolt is the path of raft-boltdb's file. Attach is given the store once it is open;
	// settle writes the file's meta pages again (see boltLog).
	Bolt   string
	Attach func(*raftboltdb.BoltStore) (settle func() error)
	// Stall comes before each commit of raft-boltdb. It may take its time.
	Stall func()
	// Journal is a file of twice Half bytes. Direct, if not nil, writes to it past the page
	// cache.
	Journal interface {
		io.ReaderAt
		io.WriterAt
		Sync() error
		Close() error
	}
	Direct interface {
		io.WriterAt
		io.Closer
	}
	Half int64
}

// OpenLog opens a log on simulated files, as Open does on real ones, and verifies it.
func OpenLog(f LogFiles) (LogStore, error) {
	store, err := openLog(f.Bolt, logExtent{}, slog.New(slog.DiscardHandler))
	if err != nil {
		return nil, err
	}
	store.settle, store.stall = f.Attach(store.BoltStore), f.Stall
	var j *journaled
	err = guard(func() error {
		least, err := journalGeneration(store)
		if err != nil {
			return err
		}
		if j, err = newJournaled(store, store, store.Close, &dataFile{journalFile: f.Journal, direct: f.Direct}, f.Half, least); err != nil {
			return err
		}
		return new(logExtent).read(j)
	})
	if err == nil {
		return j, nil
	}
	if j != nil {
		return nil, errors.Join(err, j.Close())
	}
	return nil, errors.Join(err, store.Close())
}

// useParts opens a simulated network and disk.
func (r *Replica) useParts(p *Parts) (started bool, err error) {
	r.folder = &dataFolder{path: r.cfg.DataDir, keep: p.Keep}
	if p.Identity == nil {
		r.folder.identity = newIdentity(r.cfg.ClusterID, r.cfg.ID)
		err = r.folder.save()
	} else {
		err = json.Unmarshal(p.Identity, &r.folder.identity)
	}
	if err != nil {
		return false, fmt.Errorf("identity: %w", err)
	}
	r.advertise = string(p.Wire.LocalAddr())
	r.store = p.Log
	r.snapshots = &snapshotStore{SnapshotStore: p.Snapshots}
	r.generation.Store(r.folder.Generation)
	r.removed.Store(r.folder.Removed)
	r.life, _ = hex.DecodeString(r.folder.Incarnation)
	r.useDisk()
	last, err := r.disk.LastIndex()
	if err != nil {
		return false, err
	}
	list, err := p.Snapshots.List()
	if err != nil {
		return false, err
	}
	return r.hasData(last == 0 && len(list) == 0)
}

// newWire returns what carries Raft's messages.
func (r *Replica) newWire(logger hclog.Logger) Wire {
	if r.cfg.Parts != nil {
		return r.cfg.Parts.Wire
	}
	return raft.NewNetworkTransportWithConfig(&raft.NetworkTransportConfig{
		ServerAddressProvider: r, Logger: logger, Stream: r.stream,
		MaxPool: 4, Timeout: r.cfg.TransportTimeout, MsgpackUseNewTimeFormat: true,
	})
}

// hangUp closes all connections.
func (r *Replica) hangUp() {
	if r.stream != nil {
		r.stream.Close()
	} else {
		r.cfg.Parts.Wire.Close()
	}
}

// mute makes this replica silent towards the others, or ends that.
func (r *Replica) mute(on bool) {
	if r.stream != nil {
		r.stream.mute(on)
	}
}
