package consensus

import (
	"context"
	"errors"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/raft"
)

// asked is a question to a voter that waits for its answer.
type asked struct {
	to     raft.ServerID
	answer chan error // nil: it follows; errRefuses: it follows another term
}

var errRefuses = errors.New("it follows another term")

// pollBooth runs rounds among voters whose answers the test gives.
type pollBooth struct {
	v         *voterRounds
	mu        sync.Mutex
	questions []*asked
	ended     chan struct{}
}

func newPollBooth(ctx context.Context, servers ...raft.Server) *pollBooth {
	b := &pollBooth{ended: make(chan struct{})}
	b.v = &voterRounds{
		ctx: ctx, self: "a", patience: time.Second, voters: map[raft.ServerID]*voter{}, answered: make(chan struct{}, 1),
		configuration: func() []raft.Server { return servers },
		ask: func(s raft.Server) (bool, error) {
			q := &asked{to: s.ID, answer: make(chan error)}
			b.mu.Lock()
			b.questions = append(b.questions, q)
			b.mu.Unlock()
			select {
			case err := <-q.answer:
				if err == nil || err == errRefuses {
					return err == nil, nil
				}
				return false, err
			case <-b.ended:
				return false, errors.New("the test is over")
			}
		},
	}
	return b
}

// take returns the questions to a voter that came since, in their order.
func (b *pollBooth) take(to raft.ServerID) (out []*asked) {
	synctest.Wait()
	b.mu.Lock()
	defer b.mu.Unlock()
	var others []*asked
	for _, q := range b.questions {
		if q.to == to {
			out = append(out, q)
		} else {
			others = append(others, q)
		}
	}
	b.questions = others
	return out
}

// round starts a round; result is nil until it is over.
func (b *pollBooth) round() (over func() (error, bool)) {
	done := make(chan error, 1)
	go func() { done <- b.v.confirm() }()
	synctest.Wait()
	return func() (error, bool) {
		synctest.Wait()
		select {
		case err := <-done:
			return err, true
		default:
			return nil, false
		}
	}
}

func votersOf(names ...string) (out []raft.Server) {
	for _, n := range names {
		out = append(out, raft.Server{ID: raft.ServerID(n)})
	}
	return out
}

// release ends all questions, so that the bubble can end.
func (b *pollBooth) release() { close(b.ended) }

func TestOnlyAnswersToQuestionsOfTheRoundCount(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		b := newPollBooth(t.Context(), votersOf("a", "b", "c")...)
		defer b.release()
		first := b.round()
		toB, toC := b.take("b"), b.take("c")
		if len(toB) != 1 || len(toC) != 1 {
			t.Fatalf("%d questions to b and %d to c in the first round, want one each", len(toB), len(toC))
		}
		toB[0].answer <- nil
		if err, over := first(); !over || err != nil {
			t.Fatalf("with the answer of b, of three: over %v, %v", over, err)
		}
		// c is late: another leads by now, say, and c has voted for it since.
		second := b.round()
		toC[0].answer <- nil
		if err, over := second(); over {
			t.Fatalf("an answer to a question that was sent before the round has ended it: %v", err)
		}
		again := b.take("c")
		if len(again) != 1 {
			t.Fatalf("%d questions to c after its late answer, want one", len(again))
		}
		again[0].answer <- nil
		if err, over := second(); !over || err != nil {
			t.Fatalf("with an answer of the round: over %v, %v", over, err)
		}
	})
}

func TestRoundFailsWhenNoMajorityIsLeft(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		b := newPollBooth(t.Context(), votersOf("a", "b", "c", "d", "e")...)
		defer b.release()
		round := b.round()
		b.take("b")[0].answer <- nil
		b.take("c")[0].answer <- errRefuses
		b.take("d")[0].answer <- errRefuses
		if err, over := round(); over {
			t.Fatalf("it is over with one voter to come: %v", err)
		}
		b.take("e")[0].answer <- errRefuses
		if err, over := round(); !over || err == nil {
			t.Fatalf("three of five refuse: over %v, %v", over, err)
		}
		// Those who refused in one round are asked again in the next.
		round = b.round()
		for _, id := range []raft.ServerID{"c", "d"} {
			b.take(id)[0].answer <- nil
		}
		if err, over := round(); !over || err != nil {
			t.Fatalf("two others of five confirm: over %v, %v", over, err)
		}
	})
}

func TestNonVotersAndStrangersDoNotCount(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		// a itself has been removed and leads until that is committed.
		servers := append(votersOf("b", "c", "d"), raft.Server{ID: "e", Suffrage: raft.Nonvoter})
		b := newPollBooth(t.Context(), servers...)
		defer b.release()
		round := b.round()
		if n := len(b.take("e")); n != 0 {
			t.Errorf("a non-voter is asked %d times", n)
		}
		b.take("b")[0].answer <- nil
		if err, over := round(); over {
			t.Fatalf("one of three voters has ended it: %v", err)
		}
		b.take("d")[0].answer <- nil
		if err, over := round(); !over || err != nil {
			t.Fatalf("two of three voters: over %v, %v", over, err)
		}
	})
}

// A voter that is gone costs two questions at a time however many reads there are, and
// one whose connections broke is asked again at once.
func TestQuestionsAreBounded(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		b := newPollBooth(t.Context(), votersOf("a", "b", "c")...)
		defer b.release()
		var toC []*asked
		for range 1000 {
			round := b.round()
			b.take("b")[0].answer <- nil
			if err, over := round(); !over || err != nil {
				t.Fatalf("over %v, %v", over, err)
			}
			toC = append(toC, b.take("c")...)
			time.Sleep(time.Millisecond)
		}
		if len(toC) != maxQuestions {
			t.Fatalf("%d questions to a voter that never answers, want %d", len(toC), maxQuestions)
		}
		round := b.round()
		for _, q := range toC {
			q.answer <- errors.New("connection reset")
		}
		for range 2 {
			next := b.take("c")
			if len(next) == 0 {
				t.Fatal("it is not asked again after a failure")
			}
			next[0].answer <- errors.New("connection reset")
			if len(next) > 1 {
				next[1].answer <- errors.New("connection reset")
			}
		}
		time.Sleep(2 * askAgain)
		b.take("c")[0].answer <- nil
		if err, over := round(); !over || err != nil {
			t.Fatalf("over %v, %v", over, err)
		}
	})
}

func TestRoundEndsWithTheLeadershipOrItsPatience(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancelCause(t.Context())
		b := newPollBooth(ctx, votersOf("a", "b", "c")...)
		defer b.release()
		round := b.round()
		time.Sleep(b.v.patience)
		if err, over := round(); !over || err == nil {
			t.Fatalf("nobody answers: over %v, %v", over, err)
		}
		round = b.round()
		cancel(errDeposed)
		if err, over := round(); !over || !errors.Is(err, errDeposed) {
			t.Fatalf("the leadership has ended: over %v, %v", over, err)
		}
	})
}
