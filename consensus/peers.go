package consensus

import (
	"fmt"
	"sync"
	"time"

	"github.com/hashicorp/raft"
)

// ServerAddr implements raft.ServerAddressProvider: gossip knows a replica's
// new address before the configuration does, or when it cannot be changed for
// lack of a quorum.
func (r *Replica) ServerAddr(id raft.ServerID) (raft.ServerAddress, error) {
	if string(id) == r.cfg.ID {
		return encodeAddr(id, raft.ServerAddress(r.advertise)), nil
	}
	if addr := r.peers.get(r.cfg.Peers)[string(id)]; addr != "" {
		return encodeAddr(id, raft.ServerAddress(addr)), nil
	}
	for _, s := range r.configuration() {
		if s.ID == id {
			return encodeAddr(id, s.Address), nil
		}
	}
	return "", fmt.Errorf("no address of replica %q is known", id)
}

// peerCache keeps what Config.Peers said for a moment, as Raft asks with every
// message.
type peerCache struct {
	mu   sync.Mutex
	at   time.Time
	addr map[string]string
}

func (p *peerCache) get(peers func() []Server) map[string]string {
	p.mu.Lock()
	defer p.mu.Unlock()
	if time.Since(p.at) < 100*time.Millisecond {
		return p.addr
	}
	m := map[string]string{}
	for _, s := range peers() {
		m[s.ID] = s.Addr
	}
	p.addr, p.at = m, time.Now()
	return m
}
