package consensus

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"time"

	"github.com/hashicorp/raft"

	"timonel/internal/durable"
)

// SeedConfig says what data folder Seed makes.
type SeedConfig struct {
	// DataDir, ClusterID and ID are those of the Config that the replica is to be
	// opened with.
	DataDir, ClusterID, ID string
	// Address is recorded as this replica's; it corrects it when it leads.
	Address string
	// Index and Term are the place of the state in the new log, both positive.
	// Those of a cluster that this one replaces should be less, so that a member
	// of it that is still about is not listened to.
	Index, Term uint64
	// Generation makes members of a cluster that this one replaces stop when they
	// meet it. Default: the clock, in microseconds since 1970.
	Generation uint64
	// LogStore is as in Config.
	LogStore string
	// Logger gets Raft's messages. Default: none.
	Logger *slog.Logger
}

// Seed makes the data folder of the first replica of a new cluster, which it
// alone is a voter of, with a state that write writes in the format that
// FSM.Restore reads. Others join that replica with empty folders. It refuses a
// folder that is there and not empty. The folder appears whole or not at all: it
// is made under the name DataDir.partial, and an error leaves nothing.
func Seed(c SeedConfig, write func(io.Writer) error) (err error) {
	check := Config{ID: c.ID, ClusterID: c.ClusterID, DataDir: c.DataDir}
	switch {
	case check.ID == "" || check.ClusterID == "" || check.DataDir == "" || c.Index == 0 || c.Term == 0:
		return errors.New("seed: ID, ClusterID, DataDir, Index and Term are required")
	case checkHostPort(c.Address, false) != nil:
		return fmt.Errorf("seed: Address: %w", checkHostPort(c.Address, false))
	}
	entries, err := os.ReadDir(c.DataDir)
	switch {
	case err == nil && len(entries) > 0:
		return fmt.Errorf("%s holds data already: it is left as it is; give an empty folder, or remove it if its data is not needed", c.DataDir)
	case err != nil && !errors.Is(err, fs.ErrNotExist):
		return fmt.Errorf("data folder: %w", err)
	}
	if c.LogStore == "" {
		c.LogStore = LogStoreBolt
	}
	if c.LogStore != LogStoreBolt && c.LogStore != LogStoreWAL {
		return fmt.Errorf("seed: LogStore: %q: must be %s or %s", c.LogStore, LogStoreBolt, LogStoreWAL)
	}
	if c.Generation == 0 {
		c.Generation = uint64(time.Now().UnixMicro())
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	parent, partial := filepath.Dir(c.DataDir), c.DataDir+".partial"
	if err := durable.MkdirAll(parent, 0o700); err != nil {
		return fmt.Errorf("data folder: %w", err)
	}
	if err := os.RemoveAll(partial); err != nil {
		return fmt.Errorf("data folder: %w", err)
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, os.RemoveAll(partial))
		}
	}()
	folder, err := openDataFolder(partial, c.ClusterID, c.ID)
	if err != nil {
		return err
	}
	defer folder.close()
	if err := seedSnapshot(partial, c, write); err != nil {
		return err
	}
	if err := seedLog(partial, c); err != nil {
		return fmt.Errorf("data folder: %w", err)
	}
	folder.Started, folder.Generation = true, c.Generation
	if err := folder.save(); err != nil {
		return err
	}
	if err := os.Remove(c.DataDir); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("data folder: %w", err)
	}
	if err := durable.Rename(partial, c.DataDir); err != nil {
		return fmt.Errorf("data folder: %w", err)
	}
	return nil
}

func seedSnapshot(dir string, c SeedConfig, write func(io.Writer) error) error {
	files, err := raft.NewFileSnapshotStoreWithLogger(dir, 1, newRaftLog(c.Logger))
	if err != nil {
		return fmt.Errorf("data folder: %w", err)
	}
	store := &snapshotStore{SnapshotStore: files, dir: filepath.Join(dir, snapshotDir)}
	servers := raft.Configuration{Servers: []raft.Server{{
		Suffrage: raft.Voter, ID: raft.ServerID(c.ID), Address: raft.ServerAddress(c.Address),
	}}}
	_, transport := raft.NewInmemTransport(raft.ServerAddress(c.Address)) // encodes an address, no more
	defer transport.Close()
	sink, err := store.Create(raft.SnapshotVersionMax, c.Index, c.Term, servers, c.Index, transport)
	if err != nil {
		return fmt.Errorf("data folder: %w", err)
	}
	var h [snapshotHeaderSize]byte
	copy(h[:], snapshotMagic)
	binary.LittleEndian.PutUint64(h[8:], c.Index)
	binary.LittleEndian.PutUint64(h[16:], c.Term)
	binary.LittleEndian.PutUint32(h[24:], crc32.Checksum(h[:24], castagnoli))
	if _, err = sink.Write(h[:]); err == nil {
		err = write(sink)
	}
	if err != nil {
		return errors.Join(err, sink.Cancel())
	}
	if err := sink.Close(); err != nil {
		return fmt.Errorf("data folder: %w", err)
	}
	return nil
}

// seedLog makes an empty log whose next term is after the snapshot's.
func seedLog(dir string, c SeedConfig) error {
	kind, err := logKindIn(dir, c.LogStore)
	if err != nil {
		return err
	}
	store, err := kind.open(filepath.Join(dir, kind.file), logExtent{}, c.Logger)
	if err != nil {
		return err
	}
	return errors.Join(store.SetUint64([]byte("CurrentTerm"), c.Term), store.Close())
}
