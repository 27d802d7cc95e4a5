package dispatch

import (
	"context"
	"slices"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"timonel/pki"
	pb "timonel/proto/timonel/v1"
)

// The keys of the nodes' gossip pool are told to agents over their streams: when one
// connects that has others, and when they change. An agent answers when it has them on
// its disk. Who has not answered is known here alone, for as long as its stream is.

// Keys is what a controller knows of its own keys of gossip.
type Keys interface {
	// Newest are the records of the rings, as [trust.OpenGossipRing] reads them, and
	// whether they are what the cluster has now.
	Newest(ctx context.Context) (records [][]byte, newest bool)
	// Uses says whether this controller's pool uses the keys of these names.
	Uses(pool string, ids []string) bool
}

// nodesKeys is what agents are told; it is not changed once made.
type nodesKeys struct {
	ids     []string
	message *pb.ControllerMessage
}

// updateKeys takes the keys from the state, and has each session told that does not
// know them.
func (h *hub) updateKeys() {
	ring, err := h.d.config.Trust.GossipRing(pki.PoolNodes)
	if err != nil {
		h.d.log.Error("agents are not told the keys of gossip", "err", err)
		return
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.keys != nil && slices.Equal(h.keys.ids, ring.IDs()) {
		return
	}
	h.keys = &nodesKeys{ids: ring.IDs(), message: &pb.ControllerMessage{
		Message: &pb.ControllerMessage_GossipKeys{GossipKeys: &pb.GossipKeys{Keys: ring.Secrets}},
	}}
	for _, s := range h.sessions {
		notify(s.wake)
	}
}

func (h *hub) currentKeys() *nodesKeys {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.keys
}

// sendKeys tells the agent the keys, if it has others and knows that there may be
// others.
func (s *session) sendKeys() error {
	keys := s.d.hub.currentKeys()
	kept := s.kept.Load()
	if keys == nil || keys == s.keys || kept == nil {
		return nil
	}
	s.keys = keys
	if slices.Equal(*kept, keys.ids) {
		return nil
	}
	return s.stream.Send(keys.message)
}

// setKept records which keys the agent says that it has.
func (s *session) setKept(ids []string) error {
	if len(ids) == 0 {
		return nil
	}
	if len(ids) > pki.MaxGossipKeys {
		return status.Errorf(codes.InvalidArgument, "node %s says that it has %d keys of gossip", s.node, len(ids))
	}
	s.kept.Store(&ids)
	return nil
}

// kept says which agents that are connected here have kept keys, and which have not.
func (h *hub) kept(ids []string) (with, lacking []string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for node, s := range h.sessions {
		if kept := s.kept.Load(); kept != nil && slices.Equal(*kept, ids) {
			with = append(with, node)
		} else {
			lacking = append(lacking, node)
		}
	}
	return with, lacking
}

// Kept says who of this controller and its agents has the keys of these names.
func (d *Dispatcher) Kept(pool string, ids []string) *pb.GossipKeptResponse {
	out := &pb.GossipKeptResponse{Kept: d.config.Keys != nil && d.config.Keys.Uses(pool, ids)}
	if pool == pki.PoolNodes {
		out.Agents, out.Lacking = d.hub.kept(ids)
	}
	return out
}

// GossipKept answers another controller with [Dispatcher.Kept].
func (d *Dispatcher) GossipKept(_ context.Context, r *pb.GossipKeptRequest) (*pb.GossipKeptResponse, error) {
	return d.Kept(r.GetPool(), r.GetIds()), nil
}

// GossipKeys tells another controller the keys of gossip.
func (d *Dispatcher) GossipKeys(ctx context.Context, _ *pb.GossipKeysRequest) (*pb.GossipKeysResponse, error) {
	if d.config.Keys == nil {
		return nil, status.Error(codes.Unavailable, "this controller has no keys of gossip")
	}
	ctx, cancel := context.WithTimeout(ctx, barrierTimeout)
	defer cancel()
	records, newest := d.config.Keys.Newest(ctx)
	return &pb.GossipKeysResponse{Records: records, Newest: newest}, nil
}
