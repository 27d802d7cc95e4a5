package consensus

import (
	"io"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/raft"
)

// Raft takes no more answers from a pipeline after one that says no. Its sender, with
// messages on their way, must not wait for ever: nothing else would be sent to that
// follower.
func TestPipelineEndsWithARefusal(t *testing.T) {
	t.Parallel()
	open := func() *raft.NetworkTransport {
		n, err := raft.NewTCPTransport("127.0.0.1:0", nil, 2, 5*time.Second, io.Discard)
		must(t, err)
		return n
	}
	follower := open()
	defer follower.Close()
	go func() {
		for rpc := range follower.Consumer() {
			rpc.Respond(&raft.AppendEntriesResponse{Term: 1}, nil)
		}
	}()
	leader := newTransport(open())
	defer leader.Close()

	p, err := leader.AppendEntriesPipeline("f", follower.LocalAddr())
	must(t, err)
	defer p.Close()
	send := func() error {
		_, err := p.AppendEntries(&raft.AppendEntriesRequest{Term: 1, PrevLogEntry: 1}, new(raft.AppendEntriesResponse))
		return err
	}
	must(t, send())
	refused := <-p.Consumer()
	if refused.Error() != nil || refused.Response().Success {
		t.Fatalf("%v, %+v, want a refusal", refused.Error(), refused.Response())
	}
	ended := make(chan error, 1)
	go func() { // as Raft's pipelineSend
		for {
			if err := send(); err != nil {
				ended <- err
				return
			}
		}
	}()
	select {
	case <-ended:
	case <-time.After(10 * time.Second):
		t.Fatal("a message waits in a pipeline that has ended")
	}
}

// What was learned of commits before the entries came is said with these, of that
// leader's messages in that term alone, and of no entry behind theirs; what is
// learned of entries that are here, or on their way to Raft, goes to Raft.
func TestLearnedCommits(t *testing.T) {
	t.Parallel()
	message := func(id string, term, first, last, commit uint64) *raft.AppendEntriesRequest {
		m := &raft.AppendEntriesRequest{RPCHeader: raft.RPCHeader{ID: []byte(id)}, Term: term, PrevLogEntry: first - 1, LeaderCommitIndex: commit}
		for i := first; i <= last; i++ {
			m.Entries = append(m.Entries, &raft.Log{Index: i, Term: term})
		}
		return m
	}
	learned := func(id string, term, commit uint64) *raft.AppendEntriesRequest {
		return &raft.AppendEntriesRequest{RPCHeader: raft.RPCHeader{ID: []byte(id)}, Term: term, PrevLogEntry: commit, PrevLogTerm: term, LeaderCommitIndex: commit}
	}
	tr := newTransport(nil)
	tr.follows = func(*raft.AppendEntriesRequest) (uint64, bool) { return 5, true }
	tr.learn(learned("c1", 3, 7))
	tr.learn(learned("c1", 3, 6)) // late
	if len(tr.commits) != 0 {
		t.Error("a commit of an entry that is not here was given to Raft")
	}
	for _, x := range []struct {
		name   string
		m      *raft.AppendEntriesRequest
		commit uint64
	}{
		{"with the entry", message("c1", 3, 6, 8, 4), 7},
		{"with those before it", message("c1", 3, 6, 6, 4), 6},
		{"that says more", message("c1", 3, 6, 8, 8), 8},
		{"without entries", message("c1", 3, 9, 8, 4), 4},
		{"of another term", message("c1", 4, 6, 8, 4), 4},
		{"of another leader", message("c2", 3, 6, 8, 4), 4},
	} {
		if tr.raise(x.m); x.m.LeaderCommitIndex != x.commit {
			t.Errorf("a message %s says %d, want %d", x.name, x.m.LeaderCommitIndex, x.commit)
		}
	}
	tr.learn(learned("c1", 3, 8))
	tr.learn(learned("c2", 5, 7))
	tr.learn(learned("c1", 3, 8)) // of a former leader
	if got := <-tr.commits; got.Term != 5 || got.LeaderCommitIndex != 7 {
		t.Errorf("Raft gets term %d, %d", got.Term, got.LeaderCommitIndex)
	}
	tr.follows = func(*raft.AppendEntriesRequest) (uint64, bool) { return 9, false }
	tr.learn(learned("c1", 6, 9))
	if len(tr.commits) != 0 {
		t.Error("one that does not follow gave a commit to Raft")
	}
}

// A commit notice is for a follower that no entry comes to: while entries come faster
// than noticeDelay, each says what was committed before it.
func TestNoticesWaitForAPause(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		wire := &countingWire{}
		tr := newTransport(wire)
		// entry sends one, has it acknowledged, and applies it here.
		entry := func(index uint64) {
			m := &raft.AppendEntriesRequest{Term: 1, PrevLogEntry: index - 1, LeaderCommitIndex: index - 1, Entries: []*raft.Log{{Index: index, Term: 1}}}
			tr.sending("f", "f", m, 1)
			tr.answered("f", m, true, 1)
			tr.applied(index, 1)
		}
		for i := range uint64(20) {
			entry(i + 1)
			time.Sleep(noticeDelay * 3 / 4)
		}
		if got := wire.commits(); len(got) != 0 {
			t.Errorf("notices of the commits %v while entries came", got)
		}
		time.Sleep(2 * noticeDelay)
		if got := wire.commits(); !slices.Equal(got, []uint64{20}) {
			t.Errorf("notices of the commits %v after the last entry, want one of 20", got)
		}
		must(t, tr.Close())
	})
}

// countingWire notes the commits that messages without entries tell.
type countingWire struct {
	wire
	mu  sync.Mutex
	got []uint64
}

func (w *countingWire) AppendEntries(_ raft.ServerID, _ raft.ServerAddress, m *raft.AppendEntriesRequest, _ *raft.AppendEntriesResponse) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.got = append(w.got, m.LeaderCommitIndex)
	return nil
}

func (w *countingWire) commits() []uint64 {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.got
}

func (w *countingWire) Close() error  { return nil }
func (w *countingWire) CloseStreams() {}
