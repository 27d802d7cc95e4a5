package dispatch

import (
	"context"
	"errors"
	"io"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	pb "timonel/proto/timonel/v1"
)

const (
	// defaultUsage is the default of Config.UsageBytes: some thousand nodes full of pods.
	defaultUsage = 64 << 20
	// usageStale is when what a node took is not told any more: agents say it anew every
	// 15 s.
	usageStale = time.Minute
)

// said is the newest usage of a node.
type said struct {
	raw  []byte // pb.Usage
	when time.Time
}

// usage is the newest that a session's agent said.
type usage struct {
	mu     sync.Mutex
	newest *said
	ended  bool
	full   bool // there was no room for it
}

// set replaces what was said, counted in bytes of all sessions, of which there may be limit;
// nil ends it. It says false when there is no room, once until there is.
func (u *usage) set(next *said, bytes *atomic.Int64, limit int64) bool {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.newest != nil {
		bytes.Add(-int64(len(u.newest.raw)))
		u.newest = nil
	}
	if next == nil || u.ended {
		u.ended = true
		return true
	}
	if bytes.Add(int64(len(next.raw))) > limit {
		bytes.Add(-int64(len(next.raw)))
		told := u.full
		u.full = true
		return told
	}
	u.newest, u.full = next, false
	return true
}

// get is the newest that is not too old.
func (u *usage) get(now time.Time) *said {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.newest == nil || now.Sub(u.newest.when) > usageStale {
		return nil
	}
	return u.newest
}

// NodeUsage is what a node took, and when it said so.
type NodeUsage struct {
	*pb.Usage
	When time.Time
}

// reportUsage keeps what an agent says of its node, in place of what it said before.
func (s *session) reportUsage(r *pb.UsageReport) {
	raw := r.GetUsage()
	if len(raw) > pb.MaxUsage {
		return // not an agent of ours
	}
	if !s.usage.set(&said{raw, time.Now()}, &s.d.usageBytes, s.d.config.UsageBytes) {
		s.log.Warn("no room for what nodes take: this node has no metrics")
	}
}

// usageHere is the newest usage of a node that is connected here.
func (d *Dispatcher) usageHere(node string) *said {
	s := d.hub.session(node)
	if s == nil {
		return nil
	}
	return s.usage.get(time.Now())
}

// NodesUsage tells what nodes take, those of them that say so, whichever controller they
// are connected to. A controller that does not answer has none.
func (d *Dispatcher) NodesUsage(ctx context.Context, nodes []string) map[string]NodeUsage {
	out := make(map[string]NodeUsage, len(nodes))
	var mu sync.Mutex
	add := func(node string, raw []byte, when time.Time) {
		u := &pb.Usage{}
		if proto.Unmarshal(raw, u) != nil {
			return // an agent says what it likes
		}
		mu.Lock()
		defer mu.Unlock()
		if had, ok := out[node]; !ok || had.When.Before(when) {
			out[node] = NodeUsage{u, when}
		}
	}
	var elsewhere []string
	for _, node := range nodes {
		if u := d.usageHere(node); u != nil {
			add(node, u.raw, u.when)
		} else {
			elsewhere = append(elsewhere, node)
		}
	}
	if len(elsewhere) == 0 {
		return out
	}
	ctx, cancel := context.WithTimeout(ctx, peerTimeout)
	defer cancel()
	var wait sync.WaitGroup
	for _, peer := range d.peers() {
		wait.Go(func() {
			if err := d.peerUsage(ctx, peer, elsewhere, add); err != nil && status.Code(err) != codes.Unimplemented {
				d.log.Debug("ask another controller what its nodes take", "controller", peer, "error", err)
			}
		})
	}
	wait.Wait()
	return out
}

func (d *Dispatcher) peerUsage(ctx context.Context, peer string, nodes []string, add func(node string, raw []byte, when time.Time)) error {
	cc, err := d.config.PeerConn(ctx, peer)
	if err != nil {
		return err
	}
	stream, err := pb.NewPeersClient(cc).Usage(ctx, &pb.UsageRequest{Nodes: nodes})
	if err != nil {
		return err
	}
	for {
		r, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		add(r.GetNode(), r.GetUsage(), time.Now().Add(-time.Duration(r.GetAge())))
	}
}

// Usage tells another controller what nodes take that are connected here.
func (d *Dispatcher) Usage(r *pb.UsageRequest, stream grpc.ServerStreamingServer[pb.UsageResponse]) error {
	_, _, done, err := d.serve(stream.Context())
	if err != nil {
		return status.Error(codes.Unavailable, err.Error())
	}
	defer done()
	for _, node := range r.GetNodes() {
		u := d.usageHere(node)
		if u == nil {
			continue
		}
		if err := stream.Send(&pb.UsageResponse{Node: node, Usage: u.raw, Age: int64(time.Since(u.when))}); err != nil {
			return err
		}
	}
	return nil
}
