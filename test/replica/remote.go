package replica

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/rpc"
	"sync"
	"time"

	"timonel/consensus"
	"timonel/state"
)

// Serve lets processes that dial the listener use a replica through [Remote].
func Serve(listener net.Listener, l Local) error {
	server := rpc.NewServer()
	if err := server.RegisterName("Replica", &service{l}); err != nil {
		return err
	}
	server.Accept(listener)
	return nil
}

// Call is what is asked of a replica; each method reads what it needs.
type Call struct {
	Within   time.Duration // for the answer
	Txn      state.Txn
	Key      string // or prefix
	After    string
	Limit    int
	Revision int64
	To       string // the next leader
}

// Answer is what came of a call. Errors cross as what clients tell apart.
type Answer struct {
	Failed   string // no error if empty
	Unknown  bool   // the error leaves open whether the write was done
	TooOld   *TooOld
	Result   state.Result
	KVs      []state.KV
	Events   []state.Event
	Revision int64
	Hash     uint64
	Leader   string
}

func (a *Answer) fail(err error) {
	if err == nil {
		return
	}
	a.Failed = err.Error()
	a.Unknown = errors.Is(err, consensus.ErrUnknownOutcome)
	errors.As(err, &a.TooOld)
}

func (a *Answer) err() error {
	switch {
	case a.Failed == "":
		return nil
	case a.TooOld != nil:
		return a.TooOld
	case a.Unknown:
		return fmt.Errorf("%w: %s", consensus.ErrUnknownOutcome, a.Failed)
	}
	return errors.New(a.Failed)
}

// service is a replica for net/rpc, whose methods have this form.
type service struct{ l Local }

func (c *Call) context() (context.Context, context.CancelFunc) {
	return context.WithTimeout(context.Background(), c.Within)
}

func (s *service) Commit(c Call, a *Answer) error {
	ctx, cancel := c.context()
	defer cancel()
	var err error
	a.Result, err = s.l.Commit(ctx, &c.Txn)
	if a.Result.Err != nil { // no client sends what a store cannot read
		err, a.Result.Err = a.Result.Err, nil
	}
	a.fail(err)
	return nil
}

func (s *service) Get(c Call, a *Answer) error {
	ctx, cancel := c.context()
	defer cancel()
	kv, found, err := s.l.Get(ctx, c.Key)
	if found {
		a.KVs = []state.KV{kv}
	}
	a.fail(err)
	return nil
}

func (s *service) List(c Call, a *Answer) (err error) {
	ctx, cancel := c.context()
	defer cancel()
	a.KVs, a.Revision, err = s.l.List(ctx, c.Key, c.Limit)
	a.fail(err)
	return nil
}

func (s *service) Page(c Call, a *Answer) (err error) {
	ctx, cancel := c.context()
	defer cancel()
	a.KVs, err = s.l.Page(ctx, c.Key, c.After, c.Revision)
	a.fail(err)
	return nil
}

// Follow answers with what came until the time was over.
func (s *service) Follow(c Call, a *Answer) error {
	ctx, cancel := c.context()
	defer cancel()
	err := s.l.Follow(ctx, c.Key, c.Revision, func(e state.Event) { a.Events = append(a.Events, e) })
	if ctx.Err() == nil {
		a.fail(err)
	}
	return nil
}

func (s *service) Status(_ Call, a *Answer) error {
	view := s.l.Store.View()
	a.Revision, a.Hash = view.Revision(), view.Hash()
	a.Leader, _, _ = s.l.Log.Leader()
	return nil
}

func (s *service) Snapshot(_ Call, a *Answer) error {
	a.fail(s.l.Log.Snapshot())
	return nil
}

func (s *service) Transfer(c Call, a *Answer) error {
	a.fail(s.l.Log.TransferLeadership(c.To))
	return nil
}

// Remote is a replica of another process, which has called Serve.
type Remote struct {
	Address string

	mu   sync.Mutex
	conn *rpc.Client
}

// call asks the replica, and gives up the connection when it does not answer in
// time. An error of a call that was sent leaves open what came of it.
func (r *Remote) call(ctx context.Context, method string, c Call) (a Answer, err error) {
	c.Within = 3 * time.Second
	if end, ok := ctx.Deadline(); ok {
		c.Within = time.Until(end)
	}
	conn, err := r.dial(ctx)
	if err != nil {
		return a, err
	}
	patience, cancel := context.WithTimeout(context.WithoutCancel(ctx), c.Within+500*time.Millisecond)
	defer cancel()
	answer := new(Answer) // not a: it may come when nobody waits for it any more
	call := conn.Go("Replica."+method, c, answer, make(chan *rpc.Call, 1))
	select {
	case <-call.Done:
		if call.Error != nil {
			r.hangUp(conn)
			return a, fmt.Errorf("%w: %w", consensus.ErrUnknownOutcome, call.Error)
		}
		return *answer, answer.err()
	case <-patience.Done():
		r.hangUp(conn)
		return a, fmt.Errorf("%w: %w", consensus.ErrUnknownOutcome, patience.Err())
	}
}

func (r *Remote) dial(ctx context.Context) (*rpc.Client, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.conn == nil {
		dialer := net.Dialer{Timeout: 500 * time.Millisecond}
		conn, err := dialer.DialContext(ctx, "tcp", r.Address)
		if err != nil {
			return nil, err
		}
		r.conn = rpc.NewClient(conn)
	}
	return r.conn, nil
}

func (r *Remote) hangUp(conn *rpc.Client) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.conn == conn {
		r.conn = nil
	}
	conn.Close()
}

// Close ends the connection.
func (r *Remote) Close() {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.conn != nil {
		r.conn.Close()
		r.conn = nil
	}
}

// Commit implements [Replica].
func (r *Remote) Commit(ctx context.Context, txn *state.Txn) (state.Result, error) {
	a, err := r.call(ctx, "Commit", Call{Txn: *txn})
	return a.Result, err
}

// Get implements [Replica].
func (r *Remote) Get(ctx context.Context, key string) (kv state.KV, found bool, err error) {
	a, err := r.call(ctx, "Get", Call{Key: key})
	if err != nil || len(a.KVs) == 0 {
		return state.KV{}, false, err
	}
	return a.KVs[0], true, nil
}

// List implements [Replica].
func (r *Remote) List(ctx context.Context, prefix string, limit int) ([]state.KV, int64, error) {
	a, err := r.call(ctx, "List", Call{Key: prefix, Limit: limit})
	return a.KVs, a.Revision, err
}

// Page implements [Replica].
func (r *Remote) Page(ctx context.Context, prefix, after string, revision int64) ([]state.KV, error) {
	a, err := r.call(ctx, "Page", Call{Key: prefix, After: after, Revision: revision})
	return a.KVs, err
}

// Follow implements [Replica]. The changes come together, when ctx's time is over.
func (r *Remote) Follow(ctx context.Context, prefix string, after int64, saw func(state.Event)) error {
	a, err := r.call(ctx, "Follow", Call{Key: prefix, Revision: after})
	for _, e := range a.Events {
		saw(e)
	}
	return err
}

// Revision implements [Replica].
func (r *Remote) Revision(ctx context.Context) (int64, error) {
	a, err := r.call(ctx, "Status", Call{})
	return a.Revision, err
}

// Status returns the replica's newest revision, the hash of its state there, and
// whom it takes for the leader, empty for nobody.
func (r *Remote) Status(ctx context.Context) (revision int64, hash uint64, leader string, err error) {
	a, err := r.call(ctx, "Status", Call{})
	return a.Revision, a.Hash, a.Leader, err
}

// Snapshot has the replica take one.
func (r *Remote) Snapshot(ctx context.Context) error {
	_, err := r.call(ctx, "Snapshot", Call{})
	return err
}

// Transfer has the replica, if it leads, hand leadership over.
func (r *Remote) Transfer(ctx context.Context, to string) error {
	_, err := r.call(ctx, "Transfer", Call{To: to})
	return err
}
