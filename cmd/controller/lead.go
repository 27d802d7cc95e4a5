package main

import (
	"context"
	"path/filepath"

	"golang.org/x/sync/errgroup"
	"k8s.io/apiserver/pkg/authentication/user"

	"timonel/consensus"
	"timonel/dispatch"
	"timonel/gossip"
	"timonel/pki"
	"timonel/reconcile"
	"timonel/reconcile/node"
	"timonel/reconcile/standard"
	"timonel/reconcile/upstream"
	"timonel/state/storage"
)

// lead schedules and reconciles in each term that this replica is elected for,
// until ctx ends. What it commits is refused in any other term.
func (k *controller) lead(ctx context.Context) error {
	reconcilers, err := standard.Reconcilers(standard.Config{
		Scheduler:         k.placement,
		Health:            k.health(),
		Pods:              k.pods(),
		Services:          k.services(),
		RootCA:            k.bundle.CA(),
		ServiceAccountKey: k.bundle.ServiceAccountSigner(),
	})
	if err != nil {
		return err
	}
	reconciler := &user.DefaultInfo{Name: "system:timonel:reconciler", Groups: []string{user.SystemPrivilegedGroup}}
	runner, err := reconcile.NewRunner(reconcile.Config{
		Cache:         k.cache,
		Revision:      func() int64 { return k.store.View().Revision() },
		Client:        k.api.InProcess(reconciler),
		Direct:        k.api.Direct(reconciler),
		Reconcilers:   reconcilers,
		Health:        func() reconcile.Health { return health(k.tracker.Health()) },
		HealthChanged: k.tracker.Changed(),
		ResetHealth:   k.tracker.Reset,
		Host:          k.name,
		Log:           k.log,
	})
	if err != nil {
		return err
	}
	controllers, err := upstream.New(upstream.Config{
		Cache:     k.cache,
		Client:    k.apiAs,
		CAFile:    filepath.Join(k.bundleDir, pki.CAFile),
		CAKeyFile: filepath.Join(k.bundleDir, pki.CAKeyFile),
		Dir:       filepath.Join(k.dataDir, "upstream"),
		Log:       k.log,
	})
	if err != nil {
		return err
	}
	return k.replica.Lead(ctx, func(ctx context.Context, term uint64) error {
		group, ctx := errgroup.WithContext(consensus.WithTerm(ctx, term))
		group.Go(func() error { return ended(k.tracker.Run(ctx)) })
		group.Go(func() error { return ended(k.raiseVersion(ctx)) })
		group.Go(func() error { return ended(k.found(ctx)) })
		group.Go(func() error { return ended(k.rotateKeys(ctx)) })
		group.Go(func() error { return ended(storage.Expire(ctx, k.backend, k.log)) })
		group.Go(func() error { return ended(runner.Run(ctx, term)) })
		group.Go(func() error { return ended(controllers.Run(ctx)) })
		if k.scheduler != nil {
			group.Go(func() error { return ended(k.scheduler.Run(ctx)) })
		}
		return group.Wait()
	})
}

// health is how nodes are judged. A zero there is the default, and here nothing.
func (c *config) health() node.HealthConfig {
	h := c.evictions
	none := func(rate *float64) {
		if *rate == 0 {
			*rate = -1
		}
	}
	none(&h.EvictionRate)
	none(&h.SecondaryEvictionRate)
	h.LargeZone = max(1, h.LargeZone) // a zone of one node is never unhealthy
	return h
}

// health is the tracker's facts in the reconcilers' terms.
func health(h dispatch.Health) reconcile.Health {
	out := reconcile.Health{Since: h.Since, Nodes: make(map[string]reconcile.NodeHealth, len(h.Nodes))}
	for name, n := range h.Nodes {
		out.Nodes[name] = reconcile.NodeHealth{
			Stream: n.Stream, StreamSince: n.StreamSince, Goodbye: n.Goodbye,
			Gossip: gossipState(n.Gossip), GossipSince: n.GossipSince,
			ProbesFailed: n.ProbesFailed, ProbesSince: n.ProbesSince,
		}
	}
	return out
}

func gossipState(s gossip.State) reconcile.GossipState {
	switch s {
	case gossip.Alive:
		return reconcile.GossipAlive
	case gossip.Suspect:
		return reconcile.GossipSuspect
	case gossip.Dead:
		return reconcile.GossipDead
	case gossip.Left:
		return reconcile.GossipLeft
	}
	return reconcile.GossipUnknown
}
