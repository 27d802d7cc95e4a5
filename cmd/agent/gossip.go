package main

import (
	"errors"
	"log/slog"
	"slices"
	"sync"
	"time"

	"timonel/gossip"
	"timonel/pki"
)

// pool is the agent's part in the nodes' gossip pool, from when it knows the cluster,
// and the keys of it, which controllers tell over the stream.
type pool struct {
	o         *options
	join      []string
	log       *slog.Logger
	advertise string

	mu   sync.Mutex
	p    *gossip.Pool
	keys [][]byte // the first seals; on the disk
}

// open joins the pool. An agent whose gossip port is taken still works by its
// stream; it says so.
func (p *pool) open(clusterID string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.p != nil {
		return
	}
	got, err := gossip.Open(gossip.Config{
		Name: p.o.name, Role: gossip.RoleAgent, ClusterID: clusterID, Keys: p.keys,
		BindAddr: p.advertise, AdvertiseAddr: p.advertise, Port: p.o.gossipPort, Join: p.join, Logger: p.log,
	})
	if err != nil {
		p.log.Error("join the gossip pool: a failure of this node will be noticed later (is --gossip-port in use?)", "port", p.o.gossipPort, "error", err)
		return
	}
	p.p = got
}

// keyIDs name the keys that are on the disk, for controllers.
func (p *pool) keyIDs() []string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return pki.GossipKeyIDs(p.keys)
}

// setKeys keeps the keys that a controller tells, and uses them. When it returns
// without error, this agent has them after a restart too, whoever is there to ask.
func (p *pool) setKeys(keys [][]byte) error {
	if err := pki.CheckGossipKeys(keys); err != nil {
		return err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	var kept error
	if !slices.EqualFunc(p.keys, keys, slices.Equal) {
		if kept = pki.SaveGossipKeys(credentialsDir(p.o.dataDir), keys); kept == nil {
			p.keys = keys
		}
		p.log.Info("the keys of gossip are others", "keys", pki.GossipKeyIDs(keys))
	}
	if p.p == nil {
		return kept
	}
	return errors.Join(kept, p.p.SetKeys(keys)) // used until this agent ends, if they cannot be kept
}

func (p *pool) close() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.p == nil {
		return
	}
	_ = p.p.Leave(500 * time.Millisecond)
	_ = p.p.Close()
}
