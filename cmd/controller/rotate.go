package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"timonel/gossip"
	"timonel/pki"
	pb "timonel/proto/timonel/v1"
	"timonel/trust"
)

// gossipKeysPath shows the keys of gossip, and begins to rotate them, for
// system:masters and whoever RBAC lets at this nonResourceURL.
const gossipKeysPath = "/timonel/v1/gossip/keys"

const (
	// rotateEvery is how often the members are asked during a rotation, and only then.
	rotateEvery = 500 * time.Millisecond
	// rotateTimeout bounds what one waits for another controller's answer.
	rotateTimeout = 2 * time.Second
	// maxNamed bounds the members that are named of all that are waited for.
	maxNamed = 20
)

var gossipResource = metav1.SchemeGroupVersion.WithResource("gossipkeys").GroupResource()

// member is one of a pool that has not the keys of its ring.
type member struct {
	Name string `json:"name"`
	Why  string `json:"why"`
}

// poolKeys is a pool's ring, without the keys, and who has it.
type poolKeys struct {
	Pool       string            `json:"pool"`
	Generation int64             `json:"generation"`
	Step       trust.GossipStep  `json:"step"` // empty: no rotation is on
	Since      time.Time         `json:"since,omitzero"`
	Wait       int64             `json:"waitSeconds,omitempty"`
	By         string            `json:"by,omitempty"`
	Keys       []trust.GossipKey `json:"keys"` // the first seals
	Have       int               `json:"have"` // members
	// Waiting are the members that live and have them not: a rotation waits for them.
	// Away are those that do not live: they learn the keys when they come back.
	Waiting      []member `json:"waiting"`
	WaitingCount int      `json:"waitingCount"`
	Away         []member `json:"away"`
	AwayCount    int      `json:"awayCount"`
}

// followers asks all controllers who has the keys of a ring.
func (k *controller) followers(ctx context.Context, ring trust.GossipRing) poolKeys {
	ctx, cancel := context.WithTimeout(ctx, rotateTimeout)
	defer cancel()
	have, lives, why := map[string]bool{}, map[string]bool{}, map[string]string{}
	var mu sync.Mutex
	heard := func(name string, a *pb.GossipKeptResponse) {
		mu.Lock()
		defer mu.Unlock()
		lives[name], have[name], why[name] = true, a.GetKept(), "has not taken them yet"
		for _, agent := range a.GetAgents() {
			lives[agent], have[agent] = true, true
		}
		for _, agent := range a.GetLacking() {
			lives[agent], why[agent] = true, "has not kept them yet, or its agent is of an earlier version"
		}
	}
	controllers := map[string]bool{}
	for _, m := range k.replica.Members() {
		controllers[m.ID] = true
	}
	for _, c := range k.directory.list() {
		controllers[c.Name], lives[c.Name] = true, true
	}
	for name := range controllers {
		why[name] = "does not answer"
	}
	heard(k.name, k.agents.Kept(ring.Pool, ring.IDs()))
	var asked sync.WaitGroup
	for name := range controllers {
		if name == k.name {
			continue
		}
		asked.Go(func() {
			conn, err := k.peers.conn(ctx, name)
			if err != nil {
				return
			}
			if a, err := pb.NewPeersClient(conn).GossipKept(ctx, &pb.GossipKeptRequest{Pool: ring.Pool, Ids: ring.IDs()}); err == nil {
				heard(name, a)
			}
		})
	}
	asked.Wait()
	names := controllers
	if ring.Pool == pki.PoolNodes {
		k.addNodes(names, lives, have, why)
	}
	return tally(ring, names, lives, have, why)
}

// addNodes adds the Nodes, and which of them answer by gossip, but for those that were
// revoked: they are told no keys.
func (k *controller) addNodes(names, lives, have map[string]bool, why map[string]string) {
	for node := range k.cache.Snapshot().Nodes().All() {
		names[node.Name] = true
	}
	for _, n := range k.trust.Nodes() {
		if !n.Revoked.IsZero() {
			delete(names, n.Name)
		}
	}
	for _, m := range k.directory.nodes.Members() {
		if m.Role == gossip.RoleAgent && (m.State == gossip.Alive || m.State == gossip.Suspect) && names[m.Name] && !lives[m.Name] {
			lives[m.Name], why[m.Name] = true, "is connected to no controller"
		}
	}
	for name := range names {
		if !lives[name] && !have[name] && why[name] == "" {
			why[name] = "is down"
		}
	}
}

// tally counts who of the names has the keys of a ring.
func tally(ring trust.GossipRing, names, lives, have map[string]bool, why map[string]string) poolKeys {
	out := poolKeys{
		Pool: ring.Pool, Generation: ring.Generation, Step: ring.Step, Since: ring.Since, Wait: ring.Wait, By: ring.By, Keys: ring.Keys,
		Waiting: []member{}, Away: []member{},
	}
	for name := range names {
		switch {
		case have[name]:
			out.Have++
		case lives[name]:
			out.Waiting = append(out.Waiting, member{name, why[name]})
		default:
			out.Away = append(out.Away, member{name, why[name]})
		}
	}
	for _, list := range []struct {
		members *[]member
		count   *int
	}{{&out.Waiting, &out.WaitingCount}, {&out.Away, &out.AwayCount}} {
		slices.SortFunc(*list.members, func(a, b member) int { return cmp.Compare(a.Name, b.Name) })
		*list.count = len(*list.members)
		*list.members = (*list.members)[:min(len(*list.members), maxNamed)]
	}
	return out
}

// rotateKeys takes rotations of keys from step to step while this replica leads, until
// ctx ends. While none is on it only waits.
func (k *controller) rotateKeys(ctx context.Context) error {
	return whileFollowing(ctx, k.trust, func(ctx context.Context, changed <-chan struct{}) error {
		for {
			var again <-chan time.Time
			if k.rotateOnce(ctx) {
				again = time.After(rotateEvery)
			}
			select {
			case <-ctx.Done():
				return ctx.Err()
			case <-changed:
			case <-again:
			}
		}
	})
}

// rotateOnce reports whether a rotation is on.
func (k *controller) rotateOnce(ctx context.Context) (on bool) {
	for _, pool := range trust.GossipPools {
		ring, err := k.trust.GossipRing(pool)
		if err != nil {
			k.log.Error("the keys of gossip cannot be read: they are not rotated", "err", err)
			continue
		}
		if ring.Step == trust.GossipRest {
			continue
		}
		on = true
		who := k.followers(ctx, ring)
		if !ring.Ready(time.Now(), who.WaitingCount) {
			continue
		}
		if err := k.trust.AdvanceGossip(ctx, pool, ring.Generation); err != nil {
			if ctx.Err() == nil {
				k.log.Warn("the rotation of a gossip key does not go on, trying again", "pool", pool, "step", ring.Step, "err", err)
			}
			continue
		}
		k.log.Info("a step of the rotation of a gossip key is done", "pool", pool, "step", ring.Step, "have", who.Have, "without", who.WaitingCount, "away", who.AwayCount)
	}
	return on
}

// rotateRequest is the body of a POST.
type rotateRequest struct {
	Pools       []string `json:"pools"`
	WaitSeconds int64    `json:"waitSeconds"`
}

// serveGossipKeys shows the rings of both pools, without the keys, and begins to rotate
// them.
func (k *controller) serveGossipKeys(w http.ResponseWriter, r *http.Request) {
	ctx, cancel := context.WithTimeout(r.Context(), trustTimeout)
	defer cancel()
	var pools []string
	switch r.Method {
	case http.MethodGet:
		pools = trust.GossipPools
		if err := k.replica.ReadBarrier(ctx); err != nil {
			answerTrust(w, gossipResource, "", nil, err)
			return
		}
	case http.MethodPost:
		var body rotateRequest
		if !readBody(w, r, &body) {
			return
		}
		pools = body.Pools
		wait := time.Duration(min(max(body.WaitSeconds, 0), int64(trust.MaxGossipWait/time.Second)+1)) * time.Second
		if err := k.trust.RotateGossip(ctx, pools, wait, userOf(r)); err != nil {
			k.refuseRotation(ctx, w, pools, err)
			return
		}
		k.log.Warn("gossip keys are rotated", "pools", pools, "by", userOf(r))
	default:
		writeStatus(w, apierrors.NewMethodNotSupported(gossipResource, r.Method))
		return
	}
	out := []poolKeys{}
	for _, pool := range pools {
		ring, err := k.trust.GossipRing(pool)
		if err != nil {
			answerTrust(w, gossipResource, "", nil, err)
			return
		}
		out = append(out, k.followers(ctx, ring))
	}
	answerTrust(w, gossipResource, "", out, nil)
}

// refuseRotation answers why none begins; of one that is on already, how far it is.
func (k *controller) refuseRotation(ctx context.Context, w http.ResponseWriter, pools []string, err error) {
	var refused *trust.RefusedError
	if !errors.As(err, &refused) {
		answerTrust(w, gossipResource, "", nil, err)
		return
	}
	var on []string
	for _, pool := range pools {
		if ring, err := k.trust.GossipRing(pool); err == nil && ring.Step != trust.GossipRest {
			on = append(on, k.followers(ctx, ring).describe())
		}
	}
	if len(on) == 0 {
		answerTrust(w, gossipResource, "", nil, err)
		return
	}
	conflict := apierrors.NewConflict(gossipResource, "", err)
	conflict.ErrStatus.Message = refused.Reason + ": " + strings.Join(on, "; ")
	writeStatus(w, conflict)
}

// describe says how far a rotation is.
func (p poolKeys) describe() string {
	text := fmt.Sprintf("pool %s, step %s: %d members have done it", p.Pool, p.Step, p.Have)
	if p.WaitingCount > 0 {
		var names []string
		for _, m := range p.Waiting {
			names = append(names, m.Name)
		}
		text += fmt.Sprintf(", %d not (%s)", p.WaitingCount, strings.Join(names, ", "))
	}
	return text
}
