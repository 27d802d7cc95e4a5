package consensus

import (
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/raft"
)

// settled is a proposal that Raft has answered.
func settled(index uint64, err error) func() *proposal {
	return func() *proposal {
		p := &proposal{failed: make(chan struct{}), index: index, err: err}
		p.settle()
		return p
	}
}

func never() *proposal { panic("it was proposed twice") }

func TestDeduperRecognises(t *testing.T) {
	t.Parallel()
	d := deduper{keep: time.Hour, most: 10}
	a, b, c := newRequestID(), newRequestID(), newRequestID()
	open := &proposal{failed: make(chan struct{})}
	p, err := d.do(a, 5, false, func() *proposal { return open })
	must(t, err)
	again, err := d.do(a, 5, true, never)
	if must(t, err); p != open || again != open {
		t.Error("a request under way is not recognised")
	}
	open.index = 7
	open.settle()
	if again, err = d.do(a, 5, true, never); err != nil || again.index != 7 || again.err != nil {
		t.Errorf("of one that was appended: %+v, %v", again, err)
	}
	_, err = d.do(b, 5, false, settled(0, raft.ErrLeadershipLost))
	must(t, err)
	if again, err = d.do(b, 5, true, never); err != nil || again.err == nil || certainlyNotAppended(again.err) {
		t.Errorf("of one whose outcome is unknown: %+v, %v", again, err)
	}
	_, err = d.do(c, 5, false, settled(0, raft.ErrEnqueueTimeout))
	must(t, err)
	if again, err = d.do(c, 5, true, settled(9, nil)); err != nil || again.index != 9 {
		t.Errorf("one that was not appended is not proposed again: %+v, %v", again, err)
	}
	if _, err = d.do(newRequestID(), 4, false, never); !errors.Is(err, ErrNotLeader) {
		t.Errorf("of an earlier term: %v", err)
	}
	if again, err = d.do(a, 6, false, settled(11, nil)); err != nil || again.index != 11 {
		t.Errorf("in another term, where the entry was nothing: %+v, %v", again, err)
	}
}

// TestDeduperForgets has it forget by number and by time: what is repeated then is not
// proposed a second time, and who is new is proposed all the same.
func TestDeduperForgets(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		d := deduper{keep: 20 * time.Second, most: 100}
		var ids []requestID
		for range 1000 {
			id := newRequestID()
			ids = append(ids, id)
			_, err := d.do(id, 1, false, settled(3, nil))
			must(t, err)
			if d.held() > 2*100*40 {
				t.Fatalf("it holds %d bytes", d.held())
			}
		}
		if p, err := d.do(ids[999], 1, true, never); err != nil || p.index != 3 {
			t.Errorf("the newest is not known: %v", err)
		}
		if _, err := d.do(ids[0], 1, true, never); !errors.Is(err, errForgotten) {
			t.Errorf("one that was forgotten: %v", err)
		}
		for range 2 {
			time.Sleep(21 * time.Second)
			d.tidy()
		}
		if d.held() != 0 || len(d.open) != 0 {
			t.Errorf("at rest it holds %d bytes", d.held())
		}
		if _, err := d.do(ids[999], 1, true, never); !errors.Is(err, errForgotten) {
			t.Errorf("one that was forgotten: %v", err)
		}
		// In a term of which nothing was forgotten, a repeated one is the first that came.
		if p, err := d.do(newRequestID(), 2, true, settled(4, nil)); err != nil || p.index != 4 {
			t.Errorf("%+v, %v", p, err)
		}
	})
}
