package consensus

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	pb "timonel/proto/timonel/v1"
)

// TestRoomIsFair has large commands wait for each other in order, and small ones for none
// of them; who gives up lets those behind it pass.
func TestRoomIsFair(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := newRoom(2 << 20) // 1 MiB of each kind
		const large = 600 << 10
		first, err := r.enter(t.Context(), nil, large)
		must(t, err)
		var mu sync.Mutex
		var order []string
		enter := func(ctx context.Context, name string, size int) {
			go func() {
				s, err := r.enter(ctx, nil, size)
				mu.Lock()
				defer mu.Unlock()
				if err != nil {
					name = "not " + name
				}
				order = append(order, name)
				if err == nil {
					time.AfterFunc(time.Second, s.leave)
				}
			}()
			synctest.Wait()
		}
		impatient, cancel := context.WithCancel(t.Context())
		enter(impatient, "a", large)
		enter(t.Context(), "b", large)
		enter(t.Context(), "c", 100<<10) // would fit, and waits behind b
		enter(t.Context(), "small", 100)
		expect := func(want string) {
			t.Helper()
			synctest.Wait()
			mu.Lock()
			defer mu.Unlock()
			if got := strings.Join(order, ","); got != want {
				t.Errorf("%s came in, want %s", got, want)
			}
		}
		expect("small")
		cancel()
		expect("small,not a")
		first.keep() // as Raft does
		first.leave()
		expect("small,not a")
		first.leave()
		synctest.Wait()
		mu.Lock()
		if len(order) != 4 { // b and c fit together
			t.Errorf("%v came in, want b and c as well", order)
		}
		mu.Unlock()
		time.Sleep(2 * time.Second)
		if n := r.held(); n != 0 {
			t.Errorf("%d bytes are left", n)
		}
		done := make(chan struct{})
		close(done)
		full, err := r.enter(t.Context(), nil, 5<<20) // more than there is room: alone
		must(t, err)
		if _, err := r.enter(t.Context(), done, large); !errors.Is(err, ErrClosed) {
			t.Errorf("after the end: %v", err)
		}
		full.leave()
	})
}

// TestRoomUnderLoad lets callers of commands of all sizes come and go, some of them
// impatient: never is there more than the bound, and each gets in.
func TestRoomUnderLoad(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		const bytes = 2 << 20
		r := newRoom(bytes)
		var most, in, out atomic.Int64
		var work sync.WaitGroup
		for i := range 200 {
			random := rand.New(rand.NewPCG(3, uint64(i)))
			work.Go(func() {
				for range 50 {
					size := 1 << random.IntN(20)
					ctx, cancel := t.Context(), func() {}
					if random.IntN(4) == 0 {
						ctx, cancel = context.WithTimeout(ctx, time.Duration(random.IntN(50))*time.Millisecond)
					}
					s, err := r.enter(ctx, nil, size)
					cancel()
					if err != nil {
						out.Add(1)
						continue
					}
					in.Add(1)
					if n := r.held(); n > most.Load() {
						most.Store(n)
					}
					time.Sleep(time.Duration(random.IntN(20)) * time.Millisecond)
					s.leave()
				}
			})
		}
		work.Wait()
		if most.Load() > bytes || r.held() != 0 || in.Load()+out.Load() != 10000 || out.Load() == 0 {
			t.Errorf("at most %d bytes, %d at the end; %d came in, %d gave up", most.Load(), r.held(), in.Load(), out.Load())
		}
	})
}

// TestProposalsAreBounded has state machines that stand still while many write commands
// of all sizes on every replica: no more than the bound is on its way, small commands do
// not wait for large ones, who gives up knows that nothing was written, and in the end all
// others are.
func TestProposalsAreBounded(t *testing.T) {
	t.Parallel()
	const bound = 640 << 10
	c := newCluster(t, 3)
	c.tune = func(cfg *Config) { cfg.ProposalBytes, cfg.ProposeTimeout = bound, 2*time.Minute }
	c.startAll(3)
	all := append(c.followers(), c.leader())
	for _, n := range all {
		n.fsm.mu.Lock()
	}
	var mu sync.Mutex
	written, refused := map[string]error{}, map[string]error{}
	var work sync.WaitGroup
	write := func(ctx context.Context, n *node, key string, size int, into map[string]error) {
		work.Go(func() {
			_, err := n.Apply(ctx, []byte(key+"="+strings.Repeat("x", size)))
			mu.Lock()
			defer mu.Unlock()
			into[key] = err
		})
	}
	impatient, cancel := context.WithCancel(t.Context())
	for _, n := range all {
		for i := range 16 {
			write(t.Context(), n, fmt.Sprint(n.cfg.ID, "-", i), []int{17 << 10, 20 << 10, 33 << 10, 60 << 10}[i%4], written)
		}
		eventually(t, "no more room", func() error {
			n.room.mu.Lock()
			defer n.room.mu.Unlock()
			if n.room.large.waiting.Len() < 10 {
				return errors.New("few wait")
			}
			return nil
		})
		for i := range 5 {
			write(impatient, n, fmt.Sprint(n.cfg.ID, "-impatient-", i), 40<<10, refused)
			write(t.Context(), n, fmt.Sprint(n.cfg.ID, "-small-", i), 1<<10, written)
		}
		eventually(t, "the small ones to be on their way, the others to wait", func() error {
			n.room.mu.Lock()
			defer n.room.mu.Unlock()
			if n.room.large.waiting.Len() < 15 || n.room.small.held < 5<<10 {
				return fmt.Errorf("%d wait, %d bytes of small ones are on their way", n.room.large.waiting.Len(), n.room.small.held)
			}
			return nil
		})
	}
	leader := c.leader()
	eventually(t, "the leader to hold what all have", func() error {
		sum := int64(0)
		for _, n := range all {
			sum += n.room.held()
		}
		if held := leader.Held().Proposals; held != sum {
			return fmt.Errorf("%d of %d", held, sum)
		}
		return nil
	})
	for _, n := range all {
		most := int64(bound / sharers)
		if n == leader {
			most = bound
		}
		if held := n.Held().Proposals; held > most || held < most/5 {
			t.Errorf("%s holds %d bytes, want up to %d", n.cfg.ID, held, most)
		}
	}
	cancel()
	eventually(t, "who is impatient to be told", func() error {
		mu.Lock()
		defer mu.Unlock()
		if len(refused) < 15 {
			return fmt.Errorf("%d were", len(refused))
		}
		return nil
	})
	for key, err := range refused {
		if !errors.Is(err, ErrBusy) || !errors.Is(err, context.Canceled) || OutcomeOf(err) != WriteNotDone {
			t.Errorf("%s: %v", key, err)
		}
	}
	for _, n := range all {
		n.fsm.mu.Unlock()
	}
	work.Wait()
	for key, err := range written {
		if err != nil || leader.fsm.get(key) == "" {
			t.Errorf("%s: %v", key, err)
		}
	}
	for key := range refused {
		if leader.fsm.get(key) != "" {
			t.Errorf("%s was written", key)
		}
	}
	eventually(t, "nothing to be on its way", func() error {
		for _, n := range all {
			if held := n.Held().Proposals; held != 0 {
				return fmt.Errorf("%s holds %d bytes", n.cfg.ID, held)
			}
		}
		return nil
	})
}

// TestProposalsThroughFailover kills the leader again and again while there is more to
// write than has room: everybody gets an answer, and no room is lost.
func TestProposalsThroughFailover(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 3)
	c.tune = func(cfg *Config) { cfg.ProposalBytes = 128 << 10 }
	c.startAll(3)
	var work sync.WaitGroup
	var acknowledged sync.Map
	end := make(chan struct{})
	var count atomic.Int64
	for i := range 3 {
		for j := range 4 {
			random := rand.New(rand.NewPCG(uint64(i), uint64(j)))
			work.Go(func() {
				for n := 0; ; n++ {
					select {
					case <-end:
						return
					default:
					}
					key := fmt.Sprintf("%d-%d-%d", i, j, n)
					ctx, cancel := context.WithTimeout(t.Context(), time.Duration(50+random.IntN(3000))*time.Millisecond)
					_, err := c.node(fmt.Sprint("c", i+1)).Apply(ctx, []byte(key+"="+strings.Repeat("x", 1<<random.IntN(16))))
					cancel()
					if err == nil {
						acknowledged.Store(key, true)
						count.Add(1)
					}
				}
			})
		}
	}
	for range 2 {
		goal := count.Load() + 20
		eventually(t, "writes to go on", func() error {
			if n := count.Load(); n < goal {
				return fmt.Errorf("%d of %d", n, goal)
			}
			return nil
		})
		id := c.leader().cfg.ID
		c.kill(id)
		c.start(id)
	}
	goal := count.Load() + 20
	eventually(t, "writes to go on", func() error {
		if n := count.Load(); n < goal {
			return fmt.Errorf("%d of %d", n, goal)
		}
		return nil
	})
	close(end)
	work.Wait()
	must(t, c.leader().ReadBarrier(t.Context()))
	acknowledged.Range(func(key, _ any) bool {
		if c.leader().fsm.get(key.(string)) == "" {
			t.Errorf("%s was acknowledged and is not there", key)
		}
		return true
	})
	eventually(t, "nothing to be on its way", func() error {
		for _, id := range []string{"c1", "c2", "c3"} {
			if held := c.node(id).Held().Proposals; held != 0 {
				return fmt.Errorf("%s holds %d bytes", id, held)
			}
		}
		return nil
	})
}

// TestImpoliteFollower sends a leader whose state machine stands still far more than a
// replica may have on its way: it is not read beyond that.
func TestImpoliteFollower(t *testing.T) {
	t.Parallel()
	const bound = 640 << 10
	c := newCluster(t, 1)
	c.tune = func(cfg *Config) { cfg.ProposalBytes, cfg.ProposeTimeout = bound, time.Minute }
	leader := c.startAll(1).leader()
	conn, err := leader.cfg.PeerConn(t.Context(), "c1")
	must(t, err)
	stream, err := pb.NewConsensusClient(conn).Forward(t.Context())
	must(t, err)
	leader.fsm.mu.Lock()
	const size, total = 40 << 10, 60
	sent := make(chan error, 1)
	term := leader.leads.get().term
	go func() {
		for range total {
			p := newProposal(size)
			p.Term = term
			if err := stream.Send(&pb.ForwardRequest{Proposals: []*pb.Proposal{p}}); err != nil {
				sent <- err
				return
			}
		}
		sent <- nil
	}()
	eventually(t, "the leader to have what it takes", func() error {
		if n := leader.Held().Proposals; n <= bound/sharers {
			return fmt.Errorf("%d bytes", n)
		}
		return nil
	})
	for range 50 { // it goes no further
		if n := leader.Held().Proposals; n > bound/sharers+size+besideProposal {
			t.Fatalf("it holds %d bytes, and would have to have stopped at %d", n, bound/sharers)
		}
		time.Sleep(2 * time.Millisecond)
	}
	leader.fsm.mu.Unlock()
	must(t, <-sent)
	for answered := 0; answered < total; {
		a, err := stream.Recv()
		must(t, err)
		for _, p := range a.Proposed {
			if p.Code != 0 {
				t.Fatal(p.Message)
			}
			answered++
		}
	}
	eventually(t, "nothing to be held", func() error {
		if n := leader.Held().Proposals; n != 0 {
			return fmt.Errorf("%d bytes", n)
		}
		return nil
	})
}
