package consensus

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"io"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/raft"
)

func TestValidateNamesTheField(t *testing.T) {
	t.Parallel()
	good := Config{ID: "c1", ClusterID: "x", DataDir: "d", TLS: &tls.Config{RootCAs: x509.NewCertPool(), Certificates: make([]tls.Certificate, 1)}}
	must(t, good.Validate())
	tests := []struct {
		field string
		spoil func(*Config)
	}{
		{"ID", func(c *Config) { c.ID = "" }},
		{"ID", func(c *Config) { c.ID = "c 1" }},
		{"ClusterID", func(c *Config) { c.ClusterID = "" }},
		{"DataDir", func(c *Config) { c.DataDir = "" }},
		{"TLS", func(c *Config) { c.TLS = nil }},
		{"TLS", func(c *Config) { c.TLS = &tls.Config{} }},
		{"TLS", func(c *Config) { c.TLS = &tls.Config{RootCAs: x509.NewCertPool()} }},
		{"BindAddress", func(c *Config) { c.BindAddress = "7444" }},
		{"AdvertiseAddress", func(c *Config) { c.AdvertiseAddress = "0.0.0.0:7444" }},
		{"AdvertiseAddress", func(c *Config) { c.AdvertiseAddress = "10.0.0.1:0" }},
		{"BootstrapExpect", func(c *Config) { c.BootstrapExpect = 2 }},
		{"HeartbeatTimeout", func(c *Config) { c.HeartbeatTimeout = time.Millisecond }},
		{"ElectionTimeout", func(c *Config) { c.ElectionTimeout = 100 * time.Millisecond }},
		{"LeaderLeaseTimeout", func(c *Config) { c.LeaderLeaseTimeout = time.Hour }},
		{"CommitTimeout", func(c *Config) { c.CommitTimeout = time.Microsecond }},
		{"MaxAppendEntries", func(c *Config) { c.MaxAppendEntries = 5000 }},
		{"MaxCommandBytes", func(c *Config) { c.MaxCommandBytes = -1 }},
		{"SnapshotInterval", func(c *Config) { c.SnapshotInterval = 1 }},
		{"SnapshotRetain", func(c *Config) { c.SnapshotRetain = -1 }},
		{"ProposeTimeout", func(c *Config) { c.ProposeTimeout = -1 }},
		{"DiskStallTimeout", func(c *Config) { c.DiskStallTimeout = -1 }},
	}
	for _, tt := range tests {
		c := good
		tt.spoil(&c)
		if err := c.Validate(); err == nil || !strings.HasPrefix(err.Error(), "consensus config: "+tt.field+": ") {
			t.Errorf("%s: got %v", tt.field, err)
		}
	}
}

func TestEntryEncoding(t *testing.T) {
	t.Parallel()
	e := entry{kind: kindCommand, id: newRequestID(), term: 1<<40 + 7, command: []byte("a=b")}
	b := e.encode()
	got, err := decodeEntry(b)
	must(t, err)
	if got.kind != e.kind || got.id != e.id || got.term != e.term || !bytes.Equal(got.command, e.command) {
		t.Errorf("got %+v, want %+v", got, e)
	}
	for i := range b {
		for bit := range 8 {
			spoiled := bytes.Clone(b)
			spoiled[i] ^= 1 << bit
			if _, err := decodeEntry(spoiled); err == nil {
				t.Fatalf("bit %d of byte %d flipped went unnoticed", bit, i)
			}
		}
	}
	for n := range len(b) {
		if _, err := decodeEntry(b[:n]); err == nil {
			t.Errorf("%d of %d bytes went unnoticed", n, len(b))
		}
	}
}

func logEntry(index, term uint64, e entry) *raft.Log {
	return &raft.Log{Index: index, Term: term, Type: raft.LogCommand, Data: e.encode()}
}

func command(id requestID, fence uint64, cmd string) entry {
	return entry{kind: kindCommand, id: id, term: fence, command: []byte(cmd)}
}

// result returns a waiter's outcome, or nil if it has none yet.
func result(w *waiter) *outcome {
	select {
	case o := <-w.done:
		return &o
	default:
		return nil
	}
}

func TestWhatBecameOfAnEntry(t *testing.T) {
	t.Parallel()
	a, b := newRequestID(), newRequestID()
	marker := func(term uint64) entry { return entry{kind: kindMarker, id: newRequestID(), term: term} }
	snapshot := func(t *testing.T, index, term uint64) io.ReadCloser {
		m := newMachine(newMapFSM(), nil)
		m.ApplyBatch([]*raft.Log{logEntry(index, term, marker(term))})
		s, err := m.Snapshot()
		must(t, err)
		var sink memorySink
		must(t, s.Persist(&sink))
		return io.NopCloser(&sink)
	}
	tests := []struct {
		name string
		do   func(t *testing.T, m *machine)
		a, b *outcome // of entries a and b, both fenced to term 5
	}{
		{"applied", func(_ *testing.T, m *machine) {
			m.ApplyBatch([]*raft.Log{logEntry(7, 5, command(a, 5, "k=v")), logEntry(8, 5, command(b, 5, "k=w"))})
		}, &outcome{kind: outcomeApplied, result: uint64(7)}, &outcome{kind: outcomeApplied, result: uint64(8)}},
		{"appended in another term", func(_ *testing.T, m *machine) {
			m.ApplyBatch([]*raft.Log{logEntry(7, 4, command(a, 5, "k=v"))})
		}, &outcome{kind: outcomeDropped}, nil},
		{"a later term began", func(_ *testing.T, m *machine) {
			m.ApplyBatch([]*raft.Log{logEntry(7, 5, command(a, 5, "k=v")), logEntry(8, 6, marker(6))})
		}, &outcome{kind: outcomeApplied, result: uint64(7)}, &outcome{kind: outcomeDropped}},
		{"a later term began with a change of members", func(_ *testing.T, m *machine) {
			m.ApplyBatch([]*raft.Log{{Index: 8, Term: 6, Type: raft.LogConfiguration}})
		}, &outcome{kind: outcomeDropped}, &outcome{kind: outcomeDropped}},
		{"a snapshot of a later term was installed", func(t *testing.T, m *machine) {
			must(t, m.Restore(snapshot(t, 20, 6)))
		}, &outcome{kind: outcomeUnknown}, &outcome{kind: outcomeUnknown}},
		{"a snapshot of the same term was installed", func(t *testing.T, m *machine) {
			m.placed(a, 9)
			must(t, m.Restore(snapshot(t, 20, 5)))
		}, &outcome{kind: outcomeUnknown}, nil},
		{"a snapshot of the same term, then the entry", func(t *testing.T, m *machine) {
			m.placed(b, 21)
			must(t, m.Restore(snapshot(t, 20, 5)))
			m.ApplyBatch([]*raft.Log{logEntry(21, 5, command(b, 5, "k=v"))})
			m.placed(a, 19)
		}, &outcome{kind: outcomeUnknown}, &outcome{kind: outcomeApplied, result: uint64(21)}},
		{"a snapshot of the same term, then a later term", func(t *testing.T, m *machine) {
			must(t, m.Restore(snapshot(t, 20, 5)))
			m.ApplyBatch([]*raft.Log{logEntry(21, 6, marker(6))})
		}, &outcome{kind: outcomeUnknown}, &outcome{kind: outcomeUnknown}},
		{"a snapshot from before is refused", func(t *testing.T, m *machine) {
			m.ApplyBatch([]*raft.Log{logEntry(7, 5, command(a, 5, "k=v"))})
			if err := m.Restore(snapshot(t, 3, 2)); err == nil {
				t.Error("it was installed")
			}
		}, &outcome{kind: outcomeApplied, result: uint64(7)}, nil},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			m := newMachine(newMapFSM(), nil)
			wa, wb := m.expect(a, 5), m.expect(b, 5)
			tt.do(t, m)
			for _, x := range []struct {
				name string
				got  *outcome
				want *outcome
			}{{"a", result(wa), tt.a}, {"b", result(wb), tt.b}} {
				switch {
				case (x.got == nil) != (x.want == nil):
					t.Errorf("%s: got %+v, want %+v", x.name, x.got, x.want)
				case x.got != nil && (x.got.kind != x.want.kind || x.got.result != x.want.result):
					t.Errorf("%s: got %+v, want %+v", x.name, *x.got, *x.want)
				}
			}
		})
	}
	t.Run("asked too late", func(t *testing.T) {
		m := newMachine(newMapFSM(), nil)
		m.ApplyBatch([]*raft.Log{logEntry(8, 6, marker(6))})
		if o := result(m.expect(a, 5)); o == nil || o.kind != outcomeDropped {
			t.Errorf("got %+v, want dropped", o)
		}
	})
}

// memorySink is a raft.SnapshotSink in memory.
type memorySink struct{ bytes.Buffer }

func (*memorySink) Close() error  { return nil }
func (*memorySink) Cancel() error { return nil }
func (*memorySink) ID() string    { return "memory" }

func TestCorruptEntryStopsTheReplica(t *testing.T) {
	t.Parallel()
	stop, told := make(chan struct{}), make(chan error, 1)
	fsm := newMapFSM()
	m := newMachine(fsm, stop)
	m.onCorrupt = func(err error) { told <- err }
	bad := logEntry(2, 1, command(newRequestID(), 1, "a=1"))
	bad.Data[len(bad.Data)-1] ^= 1
	returned := make(chan struct{})
	go func() {
		defer close(returned)
		m.ApplyBatch([]*raft.Log{logEntry(1, 1, command(newRequestID(), 1, "a=0")), bad})
	}()
	if err := <-told; !strings.Contains(err.Error(), "entry 2") {
		t.Errorf("told %v", err)
	}
	if _, err := m.Snapshot(); err == nil {
		t.Error("a snapshot was taken after it")
	}
	close(stop)
	<-returned
	if i, _ := m.position(); i != 0 || fsm.get("a") != "" {
		t.Errorf("applied up to %d, a=%q", i, fsm.get("a"))
	}
}

func TestReadRoundsAreShared(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var rounds uint64
		finish := make(chan struct{})
		b := &batcher{round: func() (uint64, error) {
			rounds++
			n := rounds
			<-finish
			return n, nil
		}}
		got := make(chan uint64, 100)
		join := func() {
			i, err := b.join(context.Background())
			if err != nil {
				t.Error(err)
			}
			got <- i
		}
		go join()
		synctest.Wait() // the first round is under way: who comes now must not share it
		for range 50 {
			go join()
		}
		synctest.Wait()
		finish <- struct{}{}
		finish <- struct{}{}
		synctest.Wait()
		counts := map[uint64]int{}
		for range 51 {
			counts[<-got]++
		}
		if counts[1] != 1 || counts[2] != 50 {
			t.Errorf("reads per round: %v, want 1 in the first and 50 in the second", counts)
		}
	})
}
