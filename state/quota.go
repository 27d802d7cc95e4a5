package state

import (
	"errors"
	"fmt"
	"strings"
	"sync"
)

// ErrNoSpace is wrapped by the error for a write that would make the state larger than
// it may be. Nothing was written.
var ErrNoSpace = errors.New("the state is full")

const (
	// quotaReserve is the part of the limit that is kept beyond it for what lets the
	// state shrink again.
	quotaReserve = 16
	// A small update may grow an object by so many bytes into half of the reserve, one
	// of an object that is being deleted, or of the cluster's own keys, by so many into
	// all of it.
	smallUpdate, deletingUpdate = 4 << 10, 16 << 10
	// ownKeys are Timonel's, such as revocations.
	ownKeys = "/timonel/"
)

// Quota says which commands a leader may propose so that the state, which is memory on
// every replica, does not outgrow it. It counts what is in the state and what was
// admitted and is not applied yet.
//
// At the limit, writes that make the state no larger pass, so objects can be deleted.
// So that deleting never wants for space, the mark that an object is to be deleted
// always passes, once for each object, and a reserve beyond the limit takes what comes
// of it: small updates.
type Quota struct {
	store    *Store
	limit    int64
	deleting func(value []byte) bool

	mu       sync.Mutex
	inFlight int64
	refused  uint64
	full     bool // something was refused and there is hardly more room since
	near     bool
}

// NewQuota returns the quota of a store: at most limit bytes of keys and values.
// deleting says whether a value is an object that is being deleted.
func NewQuota(store *Store, limit int64, deleting func(value []byte) bool) *Quota {
	return &Quota{store: store, limit: limit, deleting: deleting}
}

// Admit is asked before a command is proposed. It returns what to call when it is known
// what became of it, or an error that wraps [ErrNoSpace]. What is not a command passes:
// it changes nothing.
func (q *Quota) Admit(command []byte) (settled func(), err error) {
	q.mu.Lock()
	defer q.mu.Unlock()
	view := q.store.View()
	charge := int64(len(command)) // more than it grows the state by
	if used := view.Bytes() + q.inFlight; used+charge > q.limit {
		var txn Txn
		if txn.Unmarshal(command) != nil {
			return func() {}, nil
		}
		var most int64
		charge, most = q.need(view, &txn)
		if charge > 0 && used+charge > most {
			q.refused++
			q.full = true
			return nil, fmt.Errorf("%w: it holds %d bytes, with what is being written, and may hold %d (--state-limit), and this write adds %d: delete objects that are not needed, which is always possible, or raise the limit on all controllers", ErrNoSpace, used, q.limit, charge)
		}
	}
	charge = max(charge, 0)
	q.inFlight += charge
	var once sync.Once
	return func() {
		once.Do(func() {
			q.mu.Lock()
			q.inFlight -= charge
			q.mu.Unlock()
		})
	}, nil
}

// need returns by how much a transaction makes the state larger, and how large it may
// become by it.
func (q *Quota) need(view View, txn *Txn) (growth, most int64) {
	reserve := q.limit / quotaReserve
	most = q.limit + 2*reserve
	for i := range txn.Changes {
		c := &txn.Changes[i]
		old, exists := view.Get(c.Key)
		size := int64(0)
		if exists {
			size = int64(len(old.Key) + len(old.Value))
		}
		if c.Delete {
			growth -= size
			continue
		}
		grown := int64(len(c.Key)+len(c.Value)) - size
		growth += grown
		if grown <= 0 {
			continue
		}
		limit := q.limit
		switch {
		case strings.HasPrefix(c.Key, ownKeys) && grown <= deletingUpdate:
			limit += reserve
		case !exists || grown > deletingUpdate: // as it is
		case q.deleting(c.Value) && !q.deleting(old.Value):
			limit += 2 * reserve
		case q.deleting(c.Value):
			limit += reserve
		case grown <= smallUpdate:
			limit += reserve / 2
		}
		most = min(most, limit)
	}
	return growth, most
}

// QuotaStatus is how full the state is.
type QuotaStatus struct {
	// Used is the size of the state, InFlight of what was admitted and is not applied.
	Used, InFlight, Limit int64
	// Near says that four fifths are used, Full that writes are refused, as far as this
	// replica knows. Both go when there is a little more room than is needed for that.
	Near, Full bool
	// Refused counts the writes that this replica refused.
	Refused uint64
}

// Status says how full the state is.
func (q *Quota) Status() QuotaStatus {
	q.mu.Lock()
	defer q.mu.Unlock()
	used := q.store.View().Bytes()
	rises := func(was bool, at, gone int64) bool { return used >= at || was && used > gone }
	q.near = rises(q.near, q.limit/100*80, q.limit/100*75)
	q.full = q.full && used+q.inFlight > q.limit/100*97 || used >= q.limit/100*99
	return QuotaStatus{Used: used, InFlight: q.inFlight, Limit: q.limit, Near: q.near, Full: q.full, Refused: q.refused}
}

// Problem says for who reads it what to do, "" if nothing is.
func (s QuotaStatus) Problem() string {
	switch percent := s.Used * 100 / max(s.Limit, 1); {
	case s.Full:
		return fmt.Sprintf("the state is full (%d%% of --state-limit, %d MiB): writes that make it larger are refused with 507; delete objects that are not needed, or raise --state-limit on all controllers", percent, s.Limit>>20)
	case s.Near:
		return fmt.Sprintf("the state is nearly full (%d%% of --state-limit, %d MiB): soon writes that make it larger will be refused", percent, s.Limit>>20)
	}
	return ""
}
