package state

import (
	"bytes"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
)

// beingDeleted is Deleting for values of tests.
func beingDeleted(value []byte) bool { return bytes.HasPrefix(value, []byte("deleted")) }

func TestQuota(t *testing.T) {
	t.Parallel()
	const limit = 1 << 20
	big := strings.Repeat("x", 64<<10)
	fill := func(t *testing.T, s *Store, to int64) {
		for i := 0; s.View().Bytes() < to; i++ {
			key := fmt.Sprint("/r/cms/fill", i)
			apply(t, s, changes(put(key, strings.Repeat("x", int(min(64<<10, max(0, to-s.View().Bytes()-int64(len(key)))))))))
		}
	}
	for _, tt := range []struct {
		name   string
		filled int64
		txn    Txn
		passes bool
	}{
		{"a create within it", limit - 70<<10, changes(put("/r/cms/new", big)), true},
		{"a create beyond it", limit - 60<<10, changes(put("/r/cms/new", big)), false},
		{"a small create beyond it", limit, changes(put("/r/cms/new", "1")), false},
		{"a delete", limit, changes(del("/r/cms/x")), true},
		{"a delete far beyond it", 2 * limit, changes(del("/r/cms/x")), true},
		{"a smaller update", 2 * limit, changes(put("/r/cms/big", "1")), true},
		{"an update that is no larger", 2 * limit, changes(put("/r/cms/x", "2")), true},
		{"a small update", limit, changes(put("/r/cms/x", strings.Repeat("x", 1000))), true},
		{"a small update beyond half of the reserve", limit + limit/32, changes(put("/r/cms/x", strings.Repeat("x", 1000))), false},
		{"a large update", limit, changes(put("/r/cms/x", big)), false},
		{"an update of what is being deleted", limit + limit/32, changes(put("/r/cms/going", "deleted"+strings.Repeat("x", 1000))), true},
		{"a large one", limit, changes(put("/r/cms/going", "deleted"+big)), false},
		{"one beyond the reserve", limit + limit/16, changes(put("/r/cms/going", "deleted, too")), false},
		{"the mark of deletion beyond the reserve", limit + limit/16, changes(put("/r/cms/x", "deleted")), true},
		{"more taken away than put", limit, changes(del("/r/cms/big"), put("/r/cms/new", "1")), true},
		{"a revocation", limit, changes(put("/timonel/revoked/a", "1")), true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			s := New(Options{})
			apply(t, s, changes(put("/r/cms/x", "1"), put("/r/cms/big", big), put("/r/cms/going", "deleted")))
			fill(t, s, tt.filled)
			q := NewQuota(s, limit, beingDeleted)
			settled, err := q.Admit(tt.txn.Marshal())
			if tt.passes != (err == nil) || (err != nil && !errors.Is(err, ErrNoSpace)) {
				t.Fatalf("at %d of %d: %v", s.View().Bytes(), limit, err)
			}
			if err == nil {
				settled()
				settled()
			}
			if got := q.Status(); got.InFlight != 0 {
				t.Errorf("%d in flight", got.InFlight)
			}
		})
	}
}

// TestQuotaCountsWhatIsProposed has more writers at once than there is room for.
func TestQuotaCountsWhatIsProposed(t *testing.T) {
	t.Parallel()
	const limit = 4 << 20
	s := New(Options{})
	q := NewQuota(s, limit, beingDeleted)
	value := strings.Repeat("x", 100<<10)
	var group sync.WaitGroup
	var mu sync.Mutex
	index := uint64(0)
	refused := 0
	for w := range 8 {
		group.Go(func() {
			for i := range 20 {
				txn := changes(put(fmt.Sprintf("/r/cms/%d/%d", w, i), value))
				settled, err := q.Admit(txn.Marshal())
				mu.Lock()
				if err != nil {
					refused++
				} else {
					index++
					s.ApplyBatch([]Entry{{Index: index, Term: 1, Command: txn.Marshal()}})
				}
				mu.Unlock()
				if err == nil {
					settled()
				}
			}
		})
	}
	group.Wait()
	status := q.Status()
	if used := s.View().Bytes(); used > limit || used < limit*3/4 || refused == 0 || status.InFlight != 0 {
		t.Errorf("%d of %d used, %d refused, %+v", used, limit, refused, status)
	}
	// It heals, a little below where it began.
	for i := range 20 {
		for w := range 7 { // whose writes passed is the scheduler's choice
			apply(t, s, changes(del(fmt.Sprintf("/r/cms/%d/%d", w, i))))
		}
	}
	if status := q.Status(); status.Full || status.Near || status.Problem() != "" {
		t.Errorf("%+v: %s", status, status.Problem())
	}
	if _, err := q.Admit((&Txn{Changes: []Change{put("/r/cms/again", value)}}).Marshal()); err != nil {
		t.Error(err)
	}
}
