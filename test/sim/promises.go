package sim

import (
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/hashicorp/raft"
	raftboltdb "github.com/hashicorp/raft-boltdb/v2"

	"timonel/consensus"
)

// promises are what a log has told its replica is on the disk, in any of its lives:
// whatever became of the power or of a process, it is what the next one finds.
type promises struct {
	terms map[uint64]uint64   // of entries that are there, by index
	keys  map[string][]string // what a value of the stable store may be; of others nothing is known
}

// kept compares what a log that was opened holds with what was promised.
func (d *disk) kept(log consensus.LogStore) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, index := range slices.Sorted(maps.Keys(d.told.terms)) {
		var l raft.Log
		if err := log.GetLog(index, &l); err != nil || l.Term != d.told.terms[index] {
			return fmt.Errorf("entry %d of term %d was said to be on the disk, and there is one of term %d (%v)", index, d.told.terms[index], l.Term, err)
		}
	}
	for key, may := range d.told.keys {
		is, err := log.Get([]byte(key))
		if err != nil && !errors.Is(err, raftboltdb.ErrKeyNotFound) {
			return fmt.Errorf("%s: %w", key, err)
		}
		if !slices.Contains(may, string(is)) {
			return fmt.Errorf("%s is %x, and was said to be one of %x", key, is, may)
		}
	}
	return nil
}

// tell notes what is promised, unless the process is over already: then it hears of
// what never happened.
func (h *handle) tell(what func(*promises)) {
	h.disk.mu.Lock()
	defer h.disk.mu.Unlock()
	if h.disk.medium.Life() != h.life {
		return
	}
	if h.disk.told.terms == nil {
		h.disk.told = promises{terms: map[uint64]uint64{}, keys: map[string][]string{}}
	}
	what(&h.disk.told)
}

// StoreLogs implements raft.LogStore.
func (h *handle) StoreLogs(logs []*raft.Log) error {
	h.disk.pause(50 * time.Microsecond)
	err := h.LogStore.StoreLogs(logs)
	if err == nil {
		h.tell(func(p *promises) {
			for _, l := range logs {
				p.terms[l.Index] = l.Term
			}
		})
	}
	return err
}

// StoreLog implements raft.LogStore.
func (h *handle) StoreLog(l *raft.Log) error { return h.StoreLogs([]*raft.Log{l}) }

// DeleteRange implements raft.LogStore.
func (h *handle) DeleteRange(first, last uint64) error {
	h.tell(func(p *promises) {
		maps.DeleteFunc(p.terms, func(index, _ uint64) bool { return first <= index && index <= last })
	})
	return h.LogStore.DeleteRange(first, last)
}

// Set implements raft.StableStore.
func (h *handle) Set(key, value []byte) error {
	return h.set(key, value, func() error { return h.LogStore.Set(key, value) })
}

// SetUint64 implements raft.StableStore.
func (h *handle) SetUint64(key []byte, value uint64) error {
	return h.set(key, binary.BigEndian.AppendUint64(nil, value), func() error { return h.LogStore.SetUint64(key, value) })
}

// set writes a value: until that succeeds, it may be the one before as well.
func (h *handle) set(key, value []byte, write func() error) error {
	k, v := string(key), string(value)
	before, err := h.LogStore.Get(key)
	if err != nil && !errors.Is(err, raftboltdb.ErrKeyNotFound) {
		return err
	}
	h.tell(func(p *promises) {
		if p.keys[k] == nil {
			p.keys[k] = []string{string(before)}
		}
		p.keys[k] = append(p.keys[k], v)
	})
	if err := write(); err != nil {
		return err
	}
	h.tell(func(p *promises) { p.keys[k] = []string{v} })
	return nil
}
