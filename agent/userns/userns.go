// Package userns gives pods that are in a user namespace of their own (hostUsers: false) the
// ranges of the machine's user and group ids that theirs are mapped to. No two pods have ids
// in common, whatever restarts: a range is on the disk, by the pod's uid, before it is given,
// and until nothing of its pod is left.
//
//	users, err := userns.Open(dir)
//	r, err := users.Range(pod.UID)  // the same again for the same pod
//	err = users.Release(pod.UID)
//
// A range has 65,536 ids, as with the kubelet. Which one is drawn at random, so that what an
// earlier pod left behind somewhere is hardly ever a later one's, nor that of the pods of
// another agent on this machine.
package userns

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"path/filepath"
	"strconv"
	"sync"

	"k8s.io/apimachinery/pkg/types"

	"timonel/agent/hostile"
	"timonel/internal/durable"
)

const (
	// Length is how many ids a pod has.
	Length = 65536
	// The ranges are within those that systemd keeps for containers
	// (systemd.io/UIDS-GIDS), above what /etc/subuid gives to people.
	first, ranges = 8192, 20480
)

// Range is a pod's ids: Length of them, from the machine's id First.
type Range struct{ First uint32 }

// Users is safe for concurrent use.
type Users struct {
	dir string

	mu    sync.Mutex
	slots map[types.UID]int
	taken map[int]types.UID
}

// Open reads who has which range from a folder, which is made when missing.
func Open(dir string) (*Users, error) {
	if err := durable.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("make the folder of pods' user ids: %w", err)
	}
	root, err := hostile.OpenRoot(dir)
	if err != nil {
		return nil, err
	}
	defer root.Close()
	u := &Users{dir: dir, slots: map[types.UID]int{}, taken: map[int]types.UID{}}
	var bad error
	err = root.Names(func(name string) bool {
		slot, err := strconv.Atoi(name)
		if err != nil || slot < first || slot >= first+ranges || strconv.Itoa(slot) != name {
			return true // what a write left that was cut short: nobody was given it
		}
		raw, err := root.ReadFile(name, hostile.MaxOwn)
		uid := types.UID(raw)
		switch _, twice := u.slots[uid]; {
		case err != nil:
			bad = fmt.Errorf("read whose user ids are of range %d: %w", slot, err)
		case uid == "" || twice:
			bad = fmt.Errorf("%s is damaged: it says %q; remove it when no pod runs with the ids from %d", filepath.Join(dir, name), uid, slot*Length)
		}
		u.slots[uid], u.taken[slot] = slot, uid
		return bad == nil
	})
	return u, errors.Join(err, bad)
}

// Range is a pod's: what it has, or one that nobody has.
func (u *Users) Range(uid types.UID) (Range, error) {
	u.mu.Lock()
	defer u.mu.Unlock()
	slot, ok := u.slots[uid]
	if !ok {
		if len(u.taken) >= ranges {
			return Range{}, fmt.Errorf("all %d ranges of user ids are taken", ranges)
		}
		slot = first + rand.IntN(ranges)
		for u.taken[slot] != "" {
			slot = first + (slot-first+1)%ranges
		}
		if uid == "" {
			return Range{}, errors.New("user ids: the pod has no uid")
		}
		if err := durable.WriteFile(u.path(slot), []byte(uid), 0o600); err != nil {
			return Range{}, fmt.Errorf("keep the pod's range of user ids: %w", err)
		}
		u.slots[uid], u.taken[slot] = slot, uid
	}
	return Range{First: uint32(slot) * Length}, nil
}

// Release takes a pod's range back: nothing of it is left. A pod that has none is no error.
func (u *Users) Release(uid types.UID) error {
	u.mu.Lock()
	defer u.mu.Unlock()
	slot, ok := u.slots[uid]
	if !ok {
		return nil
	}
	if err := hostile.RemoveAll(context.Background(), u.path(slot)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("take back the pod's range of user ids: %w", err)
	}
	delete(u.slots, uid)
	delete(u.taken, slot)
	return nil
}

// Pods are those that have a range.
func (u *Users) Pods() []types.UID {
	u.mu.Lock()
	defer u.mu.Unlock()
	out := make([]types.UID, 0, len(u.slots))
	for uid := range u.slots {
		out = append(out, uid)
	}
	return out
}

func (u *Users) path(slot int) string { return filepath.Join(u.dir, strconv.Itoa(slot)) }
