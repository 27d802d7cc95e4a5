package consensus

import (
	"bytes"
	"errors"
	"strings"
	"sync/atomic"
	"testing"
)

// TestAdmit has a leader that lets some commands pass: on whichever replica they are
// given, the others fail at once, with its words, and nothing of them is in the log.
func TestAdmit(t *testing.T) {
	t.Parallel()
	var underWay, asked atomic.Int64
	c := newCluster(t, 3)
	c.tune = func(cfg *Config) {
		cfg.Admit = func(command []byte) (func(), error) {
			asked.Add(1)
			if bytes.Contains(command, []byte("no")) {
				return nil, errors.New("it is full")
			}
			underWay.Add(1)
			return func() { underWay.Add(-1) }, nil
		}
	}
	c.startAll(3)
	for _, n := range append(c.followers(), c.leader()) {
		n.put(t, n.cfg.ID, "yes")
		before, _ := c.leader().machine.position()
		asked.Store(0)
		_, err := n.Apply(t.Context(), []byte(n.cfg.ID+"=no"))
		if !errors.Is(err, ErrRefused) || errors.Is(err, ErrUnknownOutcome) || !strings.Contains(err.Error(), "it is full") {
			t.Errorf("%s says %v", n.cfg.ID, err)
		}
		if after, _ := c.leader().machine.position(); after != before || asked.Load() != 1 {
			t.Errorf("%s: applied up to %d, was %d; asked %d times", n.cfg.ID, after, before, asked.Load())
		}
	}
	eventually(t, "nothing to be under way", func() error {
		if n := underWay.Load(); n != 0 {
			return errors.New("something is")
		}
		return nil
	})
}
