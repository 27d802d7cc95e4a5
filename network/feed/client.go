package feed

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"timonel/network/feed/wire"
	pb "timonel/proto/timonel/v1"
)

// kinds are those that a View has.
var kinds = []pb.NetworkKind{
	pb.NetworkKind_NETWORK_KIND_NODE, pb.NetworkKind_NETWORK_KIND_SERVICE, pb.NetworkKind_NETWORK_KIND_SLICE,
	pb.NetworkKind_NETWORK_KIND_POLICY, pb.NetworkKind_NETWORK_KIND_GROUP, pb.NetworkKind_NETWORK_KIND_POD,
	pb.NetworkKind_NETWORK_KIND_ADDRESS,
}

const (
	// firstAsk and lastAsk are how long an agent waits that has not what the controller
	// says that it has, before it says so.
	firstAsk, lastAsk = 100 * time.Millisecond, 5 * time.Minute
	// firstRetry and lastRetry are how long an agent waits whose stream has ended while
	// the connection is still there.
	firstRetry, lastRetry = 200 * time.Millisecond, 10 * time.Second
)

// Config says what a Client works with.
type Config struct {
	Store *Store
	// Path is a file for what is known, in a folder that is there. Empty: it is not kept.
	Path   string
	Logger *slog.Logger
}

// Client fills a Store with what a controller says, and keeps it on disk.
type Client struct {
	cfg Config
	log *slog.Logger

	mu          sync.Mutex // one stream at a time uses the rest
	epoch       string     // of the cluster that all items are of; empty: of none, or of more than one
	items       map[wire.Key]held
	bytes       int64
	digest      wire.Digest
	unconfirmed map[wire.Key]struct{} // of the list that is being told: what is gone unless it comes
	// staged is what came of policies and is not in the View yet, without an object when
	// its key is to be removed: it holds with the batch that says a revision. It outlives
	// a stream, as what is noted of it does.
	staged map[wire.Key]wire.Object
	intern interner
}

// held is what is known of an item beside the View.
type held struct {
	sum    wire.Sum
	bucket int
	bytes  int64
}

// NewClient returns a client, and fills the store with what is on the disk. What
// cannot be read is as nothing: it comes anew.
func NewClient(cfg Config) *Client {
	c := &Client{cfg: cfg, log: cfg.Logger.With("component", "network feed"), items: make(map[wire.Key]held), staged: make(map[wire.Key]wire.Object)}
	if cfg.Path != "" {
		c.load()
	}
	return c
}

// Follow takes what the controller says over one connection, until ctx ends or the
// controller turns out to be older and to know no such call.
func (c *Client) Follow(ctx context.Context, agents pb.AgentsClient) {
	wait := firstRetry
	for {
		began := time.Now()
		err := c.serve(ctx, agents)
		if ctx.Err() != nil {
			return
		}
		if status.Code(err) == codes.Unimplemented {
			c.log.Warn("this controller is older and does not tell of Services; what is known stays")
			return
		}
		if time.Since(began) > lastRetry {
			wait = firstRetry
		}
		c.log.Warn("the network feed broke; asking again", "error", err, "after", wait)
		timer := time.NewTimer(wait + rand.N(wait))
		select {
		case <-ctx.Done():
			timer.Stop()
			return
		case <-timer.C:
		}
		wait = min(2*wait, lastRetry)
	}
}

// serve is one stream.
func (c *Client) serve(ctx context.Context, agents pb.AgentsClient) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := agents.Network(ctx)
	if err != nil {
		return err
	}
	if err := c.sendHave(stream); err != nil && !errors.Is(err, io.EOF) { // EOF: Recv says why
		return err
	}
	batches, ended := make(chan *pb.NetworkBatch), make(chan error, 1)
	go func() { // ends with the stream, which cancel ends
		for {
			b, err := stream.Recv()
			if err != nil {
				ended <- err
				return
			}
			select {
			case batches <- b:
			case <-ctx.Done():
				ended <- ctx.Err()
				return
			}
		}
	}()
	s := &following{c: c, stream: stream, wait: firstAsk}
	defer s.stop()
	for {
		select {
		case b := <-batches:
			err = s.take(b)
		case <-s.due():
			err = s.ask()
		case err := <-ended:
			return err
		}
		if err != nil && !errors.Is(err, io.EOF) {
			cancel()
			<-ended
			return err
		}
	}
}

type networkStream = grpc.BidiStreamingClient[pb.NetworkRequest, pb.NetworkBatch]

func (c *Client) sendHave(stream networkStream) error {
	have := &pb.NetworkHave{Epoch: c.epoch, Kinds: kinds}
	if len(c.items) > 0 {
		have.Buckets = c.digest.Marshal()
	}
	return stream.Send(&pb.NetworkRequest{Message: &pb.NetworkRequest_Have{Have: have}})
}

// following is one stream's state.
type following struct {
	c      *Client
	stream networkStream
	epoch  string // of the controller's cluster

	timer *time.Timer // when to ask; nil: there is nothing to ask
	wait  time.Duration
}

func (s *following) due() <-chan time.Time {
	if s.timer == nil {
		return nil
	}
	return s.timer.C
}

func (s *following) stop() {
	if s.timer != nil {
		s.timer.Stop()
	}
}

func (s *following) ask() error {
	s.stop()
	s.timer = nil
	return s.c.sendHave(s.stream)
}

// take applies a batch and answers it.
func (s *following) take(b *pb.NetworkBatch) error {
	if b.GetEpoch() != "" {
		s.epoch = b.GetEpoch()
		if len(s.c.items) == 0 {
			s.c.epoch = s.epoch
		}
	}
	if err := s.c.apply(b, s.epoch); err != nil {
		return err
	}
	if b.GetAck() {
		if err := s.stream.Send(&pb.NetworkRequest{Message: &pb.NetworkRequest_Taken{Taken: &pb.NetworkTaken{Sequence: b.GetSequence()}}}); err != nil {
			return err
		}
	}
	switch {
	case b.GetAsk():
		return s.ask()
	case len(b.GetDigest()) == 0:
	case wire.Sum(pad(b.GetDigest())) == s.c.digest.Whole():
		s.stop()
		s.timer, s.wait = nil, firstAsk
	case s.timer == nil:
		s.c.log.Warn("this node has not what the controller says that it has; asking for what differs", "after", s.wait)
		s.timer = time.NewTimer(s.wait)
		s.wait = min(4*s.wait, lastAsk)
	}
	return nil
}

// pad makes a digest of whatever was sent.
func pad(raw []byte) (out [16]byte) {
	copy(out[:], raw)
	return out
}

// apply makes one View of a batch.
func (c *Client) apply(b *pb.NetworkBatch, epoch string) error {
	if len(b.GetList()) > 0 {
		set, err := wire.SetOf(b.GetList())
		if err != nil {
			return fmt.Errorf("batch %d: %w", b.GetSequence(), err)
		}
		c.unconfirmed = make(map[wire.Key]struct{})
		for k, h := range c.items {
			if set.Has(h.bucket) {
				c.unconfirmed[k] = struct{}{}
			}
		}
	}
	objects := make([]wire.Object, 0, len(b.GetSet()))
	for _, item := range b.GetSet() {
		o, err := wire.Decode(item)
		if err != nil {
			c.log.Error("an item of the network feed is left out", "error", err)
			continue
		}
		if c.note(o.Key, item.GetObject()) {
			c.intern.object(&o)
			objects = append(objects, o)
		}
	}
	c.cfg.Store.Update(func(t *Txn) {
		for _, o := range objects {
			c.put(t, o)
		}
		for _, k := range b.GetRemove() {
			if key := wire.KeyOf(k); c.forget(key) {
				c.remove(t, key)
			}
		}
		if b.GetSynced() {
			for key := range c.unconfirmed {
				if c.forget(key) {
					c.remove(t, key)
				}
			}
			c.unconfirmed, c.epoch = nil, epoch
			t.setSynced(epoch)
		}
		if b.GetRevision() != 0 || b.GetSynced() {
			c.settle(t)
		}
		if b.GetRevision() != 0 {
			t.SetTold(b.GetRevision())
		}
	})
	return nil
}

// put puts an item, at once or with all that belongs to it.
func (c *Client) put(t *Txn, o wire.Object) {
	if wire.OfPolicies(o.Key.Kind) {
		c.staged[o.Key] = o
		return
	}
	t.set(o)
}

func (c *Client) remove(t *Txn, key wire.Key) {
	if wire.OfPolicies(key.Kind) {
		c.staged[key] = wire.Object{Key: key}
		return
	}
	t.remove(key)
}

// settle puts what was staged: it is whole.
func (c *Client) settle(t *Txn) {
	for key, o := range c.staged {
		if o.Policy == nil && o.Group == nil && o.Pod == nil {
			t.remove(key)
		} else {
			t.set(o)
		}
	}
	clear(c.staged)
}

// note counts an item that is to be put, and says whether it is not there as it is.
func (c *Client) note(key wire.Key, object []byte) bool {
	bucket, sum := wire.SumOf(key, object)
	delete(c.unconfirmed, key)
	old, had := c.items[key]
	if had && old.sum == sum {
		return false
	}
	next := held{sum: sum, bucket: bucket, bytes: int64(len(object) + key.Size() + wire.ItemBytes)}
	if c.bytes-old.bytes+next.bytes > 2*wire.MaxBytes {
		c.log.Error("an item of the network feed is left out: there is too much", "item", key.String(), "bytes", c.bytes)
		return false
	}
	if had {
		c.digest.Toggle(old.bucket, old.sum)
	}
	c.items[key] = next
	c.bytes += next.bytes - old.bytes
	c.digest.Toggle(bucket, sum)
	return true
}

// forget counts an item no more, and says whether it was there.
func (c *Client) forget(key wire.Key) bool {
	old, had := c.items[key]
	if !had {
		return false
	}
	delete(c.items, key)
	c.bytes -= old.bytes
	c.digest.Toggle(old.bucket, old.sum)
	return true
}
