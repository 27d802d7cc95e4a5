package main

import (
	"cmp"
	"context"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"time"

	"timonel/pki"
	pb "timonel/proto/timonel/v1"
	"timonel/trust"
)

const (
	// certificateCheck is how often it is looked whether certificates are to be
	// renewed: by the machine's clock, which may be set.
	certificateCheck = time.Hour
	// authorityWarning is how long before an authority's end the log says so, once a
	// day.
	authorityWarning = 60 * 24 * time.Hour
	// soonest is how many nodes and tokens the status tells of by name.
	soonest = 5
)

// certificates are a controller's own, issued at its start from the bundle and again
// while it runs, when two thirds of their life are over. They are for this process
// alone: nothing of them is kept for the next.
type certificates struct {
	identity *pki.Controller
	bundle   *pki.Bundle
	dir      string // of the files that the API server reads, and again when they change
	log      *slog.Logger

	mu      sync.Mutex
	written time.Time // until when those in the files are valid
}

func newCertificates(identity *pki.Controller, bundle *pki.Bundle, dir string, log *slog.Logger) *certificates {
	return &certificates{identity: identity, bundle: bundle, dir: dir, log: log}
}

// write replaces the files.
func (c *certificates) write() (pki.Files, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	files, err := c.identity.WriteFiles(c.dir)
	if err == nil {
		c.written = c.identity.Expires()
	}
	return files, err
}

// run renews the certificates until ctx ends, whose error it returns.
func (c *certificates) run(ctx context.Context) error {
	var told time.Time
	for {
		if now := time.Now(); now.Sub(told) >= 24*time.Hour {
			told = now
			for _, w := range c.bundle.Warnings(authorityWarning) {
				c.log.Warn(w)
			}
		}
		c.renew()
		if !pause(ctx, certificateCheck) {
			return ctx.Err()
		}
	}
}

// renew renews what is due, and writes what could not be written before.
func (c *certificates) renew() {
	if !time.Now().Before(c.identity.Renewal()) {
		if err := c.identity.Renew(); err != nil {
			c.log.Error("this controller's certificates could not be renewed; trying again", "expires", c.identity.Expires(), "err", err)
			return
		}
		c.log.Info("this controller's certificates were renewed", "expires", c.identity.Expires())
	}
	if at := c.expiries(); !at["api"].Equal(at["cluster"]) {
		if _, err := c.write(); err != nil {
			c.log.Error("the API's certificate was renewed and could not be written; trying again", "expires", at["api"], "err", err)
		}
	}
}

// expiries are when they end: cluster (cluster port and Raft), api (what the API
// serves), and the authorities ca and front-proxy-ca.
func (c *certificates) expiries() map[string]time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	ca, frontProxy := c.bundle.CAExpires()
	return map[string]time.Time{"ca": ca, "front-proxy-ca": frontProxy, "cluster": c.identity.Expires(), "api": c.written}
}

// Kinds of what expires.
const (
	kindAuthority  = "authority"
	kindController = "controller"
	kindNode       = "node"
	kindToken      = "token"
)

// expiries tells when what the cluster's trust rests on ends. Of nodes that have a
// Node object, and of tokens, those that end soonest, and how many more there are.
func (k *controller) expiries(now time.Time) []*pb.Expiry {
	at := k.certificates.expiries()
	out := []*pb.Expiry{
		expiry(kindAuthority, "CA", at["ca"]),
		expiry(kindAuthority, "front proxy CA", at["front-proxy-ca"]),
		expiry(kindController, "controller "+k.name, at["cluster"]),
	}
	if !at["api"].Equal(at["cluster"]) {
		out = append(out, expiry(kindController, "API of controller "+k.name, at["api"]))
	}
	nodes := k.cache.Snapshot().Nodes()
	out = append(out, nodeExpiries(k.trust.Nodes(), func(name string) bool {
		_, ok := nodes.Get("", name)
		return ok
	})...)
	var tokens []*pb.Expiry
	for _, t := range k.trust.Tokens() {
		tokens = append(tokens, expiry(kindToken, "join token "+t.ID, t.Expires))
	}
	return append(out, soonestOf(tokens, "join tokens")...)
}

// nodeExpiries are those of nodes that may connect, and have an object: others are
// not renewed, and nobody waits for them.
func nodeExpiries(nodes []trust.Node, exists func(name string) bool) []*pb.Expiry {
	var out []*pb.Expiry
	for _, n := range nodes {
		if n.Key != "" && !n.Expires.IsZero() && n.Revoked.IsZero() && exists(n.Name) {
			out = append(out, expiry(kindNode, "node "+n.Name, n.Expires))
		}
	}
	return soonestOf(out, "nodes")
}

// soonestOf cuts a list to those that end first and one that counts the others.
func soonestOf(all []*pb.Expiry, what string) []*pb.Expiry {
	slices.SortFunc(all, func(a, b *pb.Expiry) int {
		return cmp.Or(cmp.Compare(a.UnixSeconds, b.UnixSeconds), cmp.Compare(a.What, b.What))
	})
	if len(all) <= soonest+1 {
		return all
	}
	next := all[soonest]
	return append(all[:soonest:soonest], &pb.Expiry{
		Kind: next.Kind, What: fmt.Sprintf("%d more %s", len(all)-soonest, what), UnixSeconds: next.UnixSeconds,
	})
}

func expiry(kind, what string, at time.Time) *pb.Expiry {
	return &pb.Expiry{Kind: kind, What: what, UnixSeconds: at.Unix()}
}
