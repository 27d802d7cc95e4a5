package gossip

import (
	"fmt"
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

// NotifyAlive implements [memberlist.AliveDelegate]: it refuses members of other
// clusters one by one.
func (d delegate) NotifyAlive(n *memberlist.Node) error { return d.p.check(n) }

// NotifyMerge implements [memberlist.MergeDelegate]: it refuses to join with a
// pool of another cluster.
func (d delegate) NotifyMerge(nodes []*memberlist.Node) error {
	for _, n := range nodes {
		if err := d.p.check(n); err != nil {
			return err
		}
	}
	return nil
}

func (p *Pool) check(n *memberlist.Node) error {
	m, err := decodeMeta(n.Meta)
	if err == nil && m.Cluster != p.config.ClusterID {
		err = fmt.Errorf("it belongs to cluster %q, this is cluster %q", m.Cluster, p.config.ClusterID)
	}
	if err != nil {
		err = fmt.Errorf("refused %s at %s: %w", n.Name, address(n), err)
		p.report("refused "+n.Name, "a member of another cluster is not let into the gossip pool: remove its address from --join", err)
	}
	return err
}

// NotifyConflict implements [memberlist.ConflictDelegate].
func (d delegate) NotifyConflict(existing, other *memberlist.Node) {
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
