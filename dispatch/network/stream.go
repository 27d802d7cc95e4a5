package network

import (
	"context"
	"errors"
	"fmt"
	"time"

	"golang.org/x/time/rate"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"timonel/dispatch/network/policy"
	"timonel/network/feed/wire"
	pb "timonel/proto/timonel/v1"
)

// What a node may have of whole lists: one after another node's death, and after each
// of its own starts; not one after another for ever. A list that it does not need
// costs nothing, as nothing differs.
const (
	listEvery = 5 * time.Second
	listBurst = 8
)

const (
	// maxUntaken is how many batches that are to be acknowledged may be on their way.
	maxUntaken = 4
	// ackEvery is how often an agent is asked at most whether it has a small change.
	ackEvery = time.Second
)

// stream is one agent's.
type stream struct {
	f      *Feed
	node   string
	grpc   grpc.BidiStreamingServer[pb.NetworkRequest, pb.NetworkBatch]
	cancel context.CancelCauseFunc
	kinds  kindSet
	lists  *rate.Limiter // of its node
	// policies is what concerns the node alone; nil when the agent does not ask for it. Its
	// digest, and that of what all are told, are as of what was sent last.
	policies   *policy.Follower
	ofPolicies wire.Sum
	ofAll      wire.Sum

	have  chan *pb.NetworkHave
	taken chan uint64
	// untaken are the batches that are not acknowledged, and when what is in them was
	// there to be sent.
	untaken map[uint64]time.Time
	number  uint64    // of the last batch
	asked   time.Time // for the last acknowledgement
}

var errNewer = errors.New("the agent opened a newer stream")

// Serve serves an agent's stream until ctx or the stream ends. Goroutines that may
// outlast it by a moment are started by spawn.
func (f *Feed) Serve(ctx context.Context, node string, g grpc.BidiStreamingServer[pb.NetworkRequest, pb.NetworkBatch], spawn func(func())) error {
	first, err := g.Recv()
	if err != nil {
		return err
	}
	if first.GetHave() == nil {
		return status.Errorf(codes.InvalidArgument, "the stream began with %T instead of what the agent has", first.GetMessage())
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	s := &stream{
		f: f, node: node, grpc: g, cancel: cancel, have: make(chan *pb.NetworkHave, 1), taken: make(chan uint64, 16), untaken: make(map[uint64]time.Time),
	}
	s.have <- first.GetHave()
	f.add(s)
	defer f.drop(s)
	spawn(func() { cancel(s.receive(ctx)) })
	spawn(func() { cancel(s.send(ctx)) })
	<-ctx.Done()
	err = context.Cause(ctx)
	if errors.Is(err, errNewer) {
		return status.Error(codes.Unavailable, err.Error())
	}
	return err
}

// add makes s its node's stream; an older one ends.
func (f *Feed) add(s *stream) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if old := f.streams[s.node]; old != nil {
		old.cancel(errNewer)
	}
	f.streams[s.node] = s
	if s.lists = f.lists[s.node]; s.lists == nil {
		s.lists = rate.NewLimiter(rate.Every(f.listEvery), listBurst)
		f.lists[s.node] = s.lists
	}
}

func (f *Feed) drop(s *stream) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.streams[s.node] == s {
		delete(f.streams, s.node)
	}
	if len(f.lists) < 2*len(f.streams)+64 {
		return
	}
	// What other nodes left long ago is as if they had never been here.
	for node, l := range f.lists {
		if f.streams[node] == nil && l.Tokens() >= listBurst {
			delete(f.lists, node)
		}
	}
}

// receive takes what the agent says until the stream ends.
func (s *stream) receive(ctx context.Context) error {
	for {
		m, err := s.grpc.Recv()
		if err != nil {
			return err
		}
		switch m := m.GetMessage().(type) {
		case *pb.NetworkRequest_Have:
			select {
			case <-s.have: // one that was not looked at yet
			default:
			}
			select {
			case s.have <- m.Have:
			case <-ctx.Done():
				return context.Cause(ctx)
			}
		case *pb.NetworkRequest_Taken:
			select {
			case s.taken <- m.Taken.GetSequence():
			case <-ctx.Done():
				return context.Cause(ctx)
			}
		}
	}
}

// send keeps the agent up to date. It is the only one that sends.
func (s *stream) send(ctx context.Context) error {
	var at uint64
	asked := false // the agent is to say what it has
	defer func() {
		if s.policies != nil {
			s.policies.Close()
		}
	}()
	for {
		v := s.f.log.view()
		switch {
		case asked || at >= v.sequence:
			select {
			case <-ctx.Done():
				return context.Cause(ctx)
			case sequence := <-s.taken:
				s.take(sequence)
			case have := <-s.have:
				var err error
				if at, err = s.list(ctx, have); err != nil {
					return err
				}
				asked = false
			case <-unless(asked, v.moved):
			case <-unless(asked, s.moved()):
				if err := s.tellPolicies(ctx, at >= v.sequence); err != nil {
					return err
				}
			}
		case at < v.floor:
			if err := s.tell(ctx, &pb.NetworkBatch{Ask: true}, v.at); err != nil {
				return err
			}
			asked = true
		default:
			select {
			case have := <-s.have: // what differs is to be listed, whatever else changed
				var err error
				if at, err = s.list(ctx, have); err != nil {
					return err
				}
				continue
			case <-s.moved(): // a long list of all delays no pod
				if err := s.tellPolicies(ctx, false); err != nil {
					return err
				}
			default:
			}
			p := v.next(span{after: at, kinds: s.kinds})
			at = p.last
			if len(p.items)+len(p.gone) == 0 {
				continue
			}
			b := &pb.NetworkBatch{Set: p.items, Remove: p.gone, Ack: p.size >= wire.MaxBatch/4 || time.Since(s.asked) > ackEvery}
			if p.end {
				s.ofAll = v.whole(s.kinds)
				b.Digest = s.digest()
			}
			if err := s.tell(ctx, b, v.at); err != nil {
				return err
			}
		}
	}
}

// unless is a channel that is never ready when not is set.
func unless(not bool, c <-chan struct{}) <-chan struct{} {
	if not {
		return nil
	}
	return c
}

// list compares what the agent has with what there is, sends what differs, and returns
// the position up to which it then knows all.
func (s *stream) list(ctx context.Context, have *pb.NetworkHave) (uint64, error) {
	if len(have.GetKinds()) > wire.MaxKinds {
		return 0, status.Errorf(codes.InvalidArgument, "node %s wants %d kinds of network items, at most %d", s.node, len(have.GetKinds()), wire.MaxKinds)
	}
	s.kinds = kindsOf(have.GetKinds())
	digest, err := wire.Unmarshal(have.GetBuckets())
	if err != nil {
		return 0, status.Errorf(codes.InvalidArgument, "what node %s has of the network: %v", s.node, err)
	}
	if err := s.follow(); err != nil {
		return 0, err
	}
	var v *view
	var set wire.Set
	var differs bool
	compare := func(also *wire.Digest) wire.Set {
		if v, set, differs = s.f.log.compare(digest, s.kinds, also); have.GetEpoch() != s.f.cfg.ClusterID {
			set, differs = wire.All(), true
		}
		return set
	}
	var told policy.Told
	if s.policies != nil {
		told = s.policies.List(compare)
	} else {
		compare(nil)
	}
	s.ofAll, s.ofPolicies = v.whole(s.kinds), told.Whole
	if !differs {
		return v.sequence, s.tell(ctx, &pb.NetworkBatch{Synced: true, Digest: s.digest(), List: set[:], Revision: told.Revision}, v.at)
	}
	if err := s.lists.Wait(ctx); err != nil {
		return 0, fmt.Errorf("list for node %s: %w", s.node, err)
	}
	s.f.figures.lists.Add(1)
	list := set[:]
	tell := func(b *pb.NetworkBatch) error {
		b.List, b.Ack = list, true
		list = nil
		return s.tell(ctx, b, time.Now())
	}
	tellAll := func(kinds kindSet) error {
		for after, end := uint64(0), false; !end; {
			p := v.next(span{after: after, kinds: kinds, list: true, set: set})
			after, end = p.last, p.end
			b := &pb.NetworkBatch{Set: p.items}
			if end && kinds&(1<<nodeKind) == 0 {
				b.Synced, b.Digest = true, s.digest()
			}
			if err := tell(b); err != nil {
				return err
			}
		}
		return nil
	}
	// Nodes first: without its own pod range a new node runs nothing. Then policies, for
	// which pods wait.
	if err := tellAll(s.kinds & (1 << nodeKind)); err != nil {
		return 0, err
	}
	if s.policies != nil {
		for _, b := range batches(told) {
			if err := tell(b); err != nil {
				return 0, err
			}
		}
	}
	if err := tellAll(s.kinds &^ (1 << nodeKind)); err != nil {
		return 0, err
	}
	return v.sequence, nil
}

// tellPolicies sends what changed of policies. whole says that the agent has all else
// that there is.
func (s *stream) tellPolicies(ctx context.Context, whole bool) error {
	told, ok := s.policies.Take()
	if !ok {
		return nil
	}
	s.ofPolicies = told.Whole
	all := batches(told)
	for i, b := range all {
		b.Ack = len(all) > 1 || time.Since(s.asked) > ackEvery
		if i == len(all)-1 && whole {
			b.Digest = s.digest()
		}
		if err := s.tell(ctx, b, told.Since); err != nil {
			return err
		}
	}
	return nil
}

// digest is of all that was sent.
func (s *stream) digest() []byte {
	sum := s.ofAll.AddWhole(s.ofPolicies)
	return sum[:]
}

// tell sends a batch, of what was there to be sent since some time, when the agent
// has taken those before.
func (s *stream) tell(ctx context.Context, b *pb.NetworkBatch, since time.Time) error {
	for {
		select {
		case sequence := <-s.taken:
			s.take(sequence)
			continue
		default:
		}
		if len(s.untaken) < maxUntaken {
			break
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case sequence := <-s.taken:
			s.take(sequence)
		}
	}
	s.number++
	if s.number == 1 {
		b.Epoch = s.f.cfg.ClusterID
	}
	b.Sequence = s.number
	if b.Ack {
		s.untaken[b.Sequence], s.asked = since, time.Now()
	}
	s.f.figures.batches.Add(1)
	s.f.figures.items.Add(uint64(len(b.Set) + len(b.Remove)))
	return s.grpc.Send(b)
}

// take notes that the agent has what it was sent up to a batch.
func (s *stream) take(sequence uint64) {
	sent, ok := s.untaken[sequence]
	if !ok {
		return
	}
	delete(s.untaken, sequence)
	now := time.Now()
	s.f.figures.lag.observe(now.Sub(sent), now)
}
