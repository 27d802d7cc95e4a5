package consensus

import (
	"io"
	"testing"
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
