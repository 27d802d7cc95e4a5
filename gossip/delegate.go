package gossip

import (
	"errors"
	"fmt"
	"net/netip"
	"time"

	"github.com/hashicorp/memberlist"
)

// delegate is what memberlist calls, mostly with its own lock held: it must not
// call memberlist.
type delegate struct{ p *Pool }

// NodeMeta implements [memberlist.Delegate].
func (d delegate) NodeMeta(int) []byte {
	d.p.mu.Lock()
	m := d.p.meta
	d.p.mu.Unlock()
	data, err := m.encode()
	if err != nil {
		panic(err) // checked in Validate and SetTags
	}
	return data
}

// The pool sends nothing of its own yet.

// NotifyMsg implements [memberlist.Delegate].
func (d delegate) NotifyMsg([]byte) {}

// GetBroadcasts implements [memberlist.Delegate].
func (d delegate) GetBroadcasts(int, int) [][]byte { return nil }

// LocalState implements [memberlist.Delegate].
func (d delegate) LocalState(bool) []byte { return nil }

// MergeRemoteState implements [memberlist.Delegate].
func (d delegate) MergeRemoteState([]byte, bool) {}

// NotifyJoin implements [memberlist.EventDelegate].
func (d delegate) NotifyJoin(n *memberlist.Node) { d.p.put(n, Alive) }

// NotifyUpdate implements [memberlist.EventDelegate].
func (d delegate) NotifyUpdate(n *memberlist.Node) { d.p.put(n, Alive) }

// NotifyLeave implements [memberlist.EventDelegate].
func (d delegate) NotifyLeave(n *memberlist.Node) { d.p.put(n, Dead) }

// NotifyAlive implements [memberlist.AliveDelegate]: it refuses one by one who is not
// to be in the pool. memberlist remembers nothing of them.
func (d delegate) NotifyAlive(n *memberlist.Node) error { return d.p.check(n) }

// NotifyMerge implements [memberlist.MergeDelegate]: it refuses to join with a
// pool of another cluster. Single strangers are refused in NotifyAlive; they must not
// keep the pool apart.
func (d delegate) NotifyMerge(nodes []*memberlist.Node) error {
	var err error
	for _, n := range nodes {
		m, wrong := decodeMeta(n.Meta)
		if wrong == nil && m.Cluster == d.p.config.ClusterID {
			return nil
		}
		if err == nil {
			err = d.p.check(n)
		}
	}
	return err
}

// errRefused is all that memberlist is told, and logs, of who is refused: it is told
// often.
var errRefused = errors.New("refused")

// Reasons for which something is refused, as metrics tell.
const (
	refusedCluster    = "another-cluster"
	refusedName       = "not-a-member"
	refusedFull       = "pool-is-full"
	refusedKey        = "wrong-key"
	refusedMessage    = "malformed"
	refusedConnection = "too-many-connections"
)

func (p *Pool) check(n *memberlist.Node) error {
	m, err := decodeMeta(n.Meta)
	if err == nil && m.Cluster != p.config.ClusterID {
		err = fmt.Errorf("it belongs to cluster %q, this is cluster %q", m.Cluster, p.config.ClusterID)
	}
	if err != nil {
		p.count(refusedCluster)
		err = fmt.Errorf("refused %s at %s: %w", n.Name, address(n), err)
		p.report(refusedCluster, "a member of another cluster is not let into the gossip pool: remove its address from --join", err)
		return errRefused
	}
	if n.Name == p.config.Name {
		return nil
	}
	if err := p.admit(n.Name, m.Role, address(n)); err != nil {
		p.refuse(refusedName, n.Name, err)
		return errRefused
	}
	p.mu.Lock()
	full := p.members[n.Name] == nil && len(p.members) >= p.config.MaxMembers
	p.mu.Unlock()
	if full {
		p.refuse(refusedFull, n.Name, fmt.Errorf("the pool has %d members, which is the most", p.config.MaxMembers))
		return errRefused
	}
	return nil
}

// admit asks Config.Admit.
func (p *Pool) admit(name, role, addr string) error {
	if name == p.config.Name || p.config.Admit == nil {
		return nil
	}
	at, err := netip.ParseAddrPort(addr)
	if err != nil {
		return fmt.Errorf("its address %q is none", addr)
	}
	return p.config.Admit(name, role, netip.AddrPortFrom(at.Addr().Unmap(), at.Port()))
}

// NotifyConflict implements [memberlist.ConflictDelegate].
func (d delegate) NotifyConflict(existing, other *memberlist.Node) {
	if d.p.config.Admit != nil { // it decided between the two, or does
		d.p.count(refusedName)
		return
	}
	what := fmt.Sprintf("two members call themselves %s, at %s and at %s: give one of them another name", existing.Name, address(existing), address(other))
	d.p.report("conflict "+existing.Name, what, nil)
}

// AckPayload implements [memberlist.PingDelegate].
func (d delegate) AckPayload() []byte { return nil }

// NotifyPingComplete implements [memberlist.PingDelegate]: an answered probe ends
// suspicion.
func (d delegate) NotifyPingComplete(n *memberlist.Node, _ time.Duration, _ []byte) {
	d.p.setSuspect(n.Name, false)
}
