package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"sync/atomic"
	"time"

	corev1 "k8s.io/api/core/v1"

	"timonel/consensus"
	"timonel/dispatch"
	"timonel/gossip"
	"timonel/pki"
	"timonel/state/objects"
)

// Tags by which controllers tell one another their ports. In the pool of nodes they
// are for controllers of earlier versions alone; nothing here goes by them.
const (
	tagAPI     = "api"
	tagCluster = "cluster"
	tagRaft    = "raft"
	tagGossip  = "gossip"
)

// maxControllers bounds the controllers' gossip pool.
const maxControllers = 64

// directory says where the controllers are, and who is whom in gossip.
//
// There are two pools. Only controllers have the key of theirs, so what it says of a
// controller, a controller said. All agents have the key of the other: what it says
// of somebody counts only for a name that the state has, at the address that the state
// has for it: of a Node, at the port that the Node says, or of a member of the log that is of an earlier version and
// in no other pool. An address is where somebody is called; who answers there is told
// by its certificate.
type directory struct {
	controllers *gossip.Pool
	nodes       *gossip.Pool
	cache       *objects.Cache
	config      *config
	log         atomic.Pointer[func() []consensus.Member] // nil until the log is open
}

// located is one controller and where it is.
type located struct {
	gossip.Member
	host          string
	raft, cluster string // host:port
	nodesGossip   string // host:port of its gossip with nodes
}

// members are those of the log; none before there is one.
func (d *directory) members() []consensus.Member {
	if members := d.log.Load(); members != nil {
		return (*members)()
	}
	return nil
}

// recorded is a member of the log, by its recorded address. known is false before there
// is a log.
func (d *directory) recorded(name string) (m recordedMember, member, known bool) {
	members := d.members()
	for _, m := range members {
		if m.ID == name {
			host, _, _ := net.SplitHostPort(m.Addr)
			return recordedMember{host: host, addr: m.Addr}, true, true
		}
	}
	return recordedMember{}, false, len(members) > 0
}

// recordedMember is where the log has a member.
type recordedMember struct{ host, addr string } // addr is that of its Raft port

// lives says whether a controller answers, or is only suspected not to.
func lives(m gossip.Member) bool {
	return m.Role == gossip.RoleController && (m.State == gossip.Alive || m.State == gossip.Suspect)
}

// list returns the controllers that answer, or are only suspected not to.
func (d *directory) list() []located {
	var out []located
	if d.controllers == nil {
		return nil
	}
	for _, m := range d.controllers.Members() {
		if lives(m) {
			out = append(out, d.locate(m))
		}
	}
	if d.nodes == nil {
		return out
	}
	for _, m := range d.nodes.Members() {
		if _, known := d.controllers.Member(m.Name); lives(m) && !known {
			out = append(out, d.locateOld(m))
		}
	}
	return out
}

// find returns where a controller is, whether it answers now or not.
func (d *directory) find(name string) (located, bool) {
	if m, ok := d.controllers.Member(name); ok && m.Role == gossip.RoleController {
		return d.locate(m), true
	}
	if m, ok := d.nodes.Member(name); ok && m.Role == gossip.RoleController {
		return d.locateOld(m), true
	}
	if r, member, _ := d.recorded(name); member { // neither pool has heard of it
		return located{Member: gossip.Member{Name: name, Role: gossip.RoleController}, host: r.host, cluster: d.at(r.host, d.config.clusterPort)}, true
	}
	return located{}, false
}

func (d *directory) at(host string, port int) string { return net.JoinHostPort(host, fmt.Sprint(port)) }

// locate is where a member of the controllers' pool says that it is.
func (d *directory) locate(m gossip.Member) located {
	tagged := func(tag string) string {
		if port := m.Tags[tag]; port != "" {
			return net.JoinHostPort(m.Host(), port)
		}
		return ""
	}
	return located{Member: m, host: m.Host(), raft: tagged(tagRaft), cluster: tagged(tagCluster), nodesGossip: tagged(tagGossip)}
}

// locateOld is where a controller of an earlier version is. Any agent could have said
// what its tags say, so for a member of the log they do not count.
func (d *directory) locateOld(m gossip.Member) located {
	out := d.locate(m)
	out.nodesGossip = m.Addr
	if r, member, _ := d.recorded(m.Name); member {
		out.host, out.raft, out.cluster = r.host, r.addr, d.at(r.host, d.config.clusterPort)
	}
	return out
}

// raftServers is where the replicas' Raft listeners are.
func (d *directory) raftServers() []consensus.Server {
	var out []consensus.Server
	for _, c := range d.list() {
		if c.raft != "" {
			out = append(out, consensus.Server{ID: c.Name, Addr: c.raft})
		}
	}
	return out
}

// voices are the controllers that others may be told of: members of the log, where
// there is one.
func (d *directory) voices() []located {
	var out []located
	for _, c := range d.list() {
		if _, member, known := d.recorded(c.Name); member || !known || c.Name == d.config.name {
			out = append(out, c)
		}
	}
	return out
}

// controllerIPs is where the API is served, for the kubernetes Service.
func (d *directory) controllerIPs() []net.IP {
	var out []net.IP
	for _, c := range d.voices() {
		if ip := net.ParseIP(c.host); ip != nil && c.State == gossip.Alive {
			out = append(out, ip)
		}
	}
	return out
}

// clusterPorts is where agents may connect.
func (d *directory) clusterPorts() []string {
	var out []string
	for _, c := range d.voices() {
		if c.cluster != "" {
			out = append(out, c.cluster)
		}
	}
	return out
}

// admitNode says why somebody may not be in the pool of nodes.
func (d *directory) admitNode(name, role string, addr netip.AddrPort) error {
	switch role {
	case gossip.RoleAgent:
		node, ok := d.cache.Snapshot().Nodes().Get("", name)
		if !ok {
			return fmt.Errorf("there is no Node %q", name)
		}
		if _, port, err := net.SplitHostPort(dispatch.GossipAddress(node)); err == nil && port != strconv.Itoa(int(addr.Port())) {
			return fmt.Errorf("port %d is not that of Node %s, which says %s", addr.Port(), name, port)
		}
		for _, a := range node.Status.Addresses {
			if ip, err := netip.ParseAddr(a.Address); a.Type == corev1.NodeInternalIP && err == nil && ip.Unmap() == addr.Addr() {
				return nil
			}
		}
		return fmt.Errorf("%s is not an InternalIP of Node %s", addr.Addr(), name)
	case gossip.RoleController:
		r, member, known := d.recorded(name)
		host := r.host
		if d.controllers != nil {
			if m, ok := d.controllers.Member(name); ok {
				host, member, known = m.Host(), true, true
				if port := m.Tags[tagGossip]; port != "" && port != strconv.Itoa(int(addr.Port())) {
					return fmt.Errorf("port %d is not that of controller %s, which says %s", addr.Port(), name, port)
				}
			}
		}
		if !known {
			return nil // nothing is founded or joined but by certificate
		}
		if ip, err := netip.ParseAddr(host); !member || err == nil && ip.Unmap() != addr.Addr() {
			return fmt.Errorf("%s is not the address of a controller called %q", addr.Addr(), name)
		}
		return nil
	}
	return fmt.Errorf("role %q", role)
}

// admitController says why somebody may not be in the controllers' pool.
func (d *directory) admitController(_, role string, _ netip.AddrPort) error {
	if role != gossip.RoleController {
		return errors.New("only controllers may")
	}
	return nil
}

// nodeSeeds are the addresses of gossip of all Nodes and members.
func (d *directory) nodeSeeds() []string {
	out := d.memberHosts(d.config.gossipPort)
	for node := range d.cache.Snapshot().Nodes().All() {
		if addr := dispatch.GossipAddress(node); addr != "" {
			out = append(out, addr)
		}
	}
	return out
}

// memberHosts are the members of the log, with a port.
func (d *directory) memberHosts(port int) []string {
	var addrs []string
	for _, m := range d.members() {
		addrs = append(addrs, m.Addr)
	}
	return withPort(addrs, port)
}

// Members implements dispatch.Gossip: the agents of the one pool, and the controllers.
func (d *directory) Members() []gossip.Member {
	var out []gossip.Member
	seen := map[string]bool{}
	for _, m := range d.controllers.Members() {
		if m.Role == gossip.RoleController {
			seen[m.Name] = true
			m.Addr = d.locate(m).nodesGossip // where agents may call it
			out = append(out, m)
		}
	}
	for _, m := range d.nodes.Members() {
		if m.Role == gossip.RoleAgent || !seen[m.Name] {
			out = append(out, m)
		}
	}
	return out
}

// Subscribe implements dispatch.Gossip: what changes in either pool.
func (d *directory) Subscribe(ctx context.Context) <-chan gossip.Event {
	out := make(chan gossip.Event)
	go func() {
		defer close(out)
		nodes, controllers := d.nodes.Subscribe(ctx), d.controllers.Subscribe(ctx)
		for nodes != nil || controllers != nil {
			var e gossip.Event
			var ok bool
			select {
			case e, ok = <-nodes:
				if !ok {
					nodes = nil
				}
			case e, ok = <-controllers:
				if !ok {
					controllers = nil
				}
			}
			if !ok {
				continue
			}
			select {
			case out <- e:
			case <-ctx.Done():
				return
			}
		}
	}()
	return out
}

// Probe implements dispatch.Gossip.
func (d *directory) Probe(ctx context.Context, name string) (time.Duration, error) {
	return d.nodes.Probe(ctx, name)
}

// ProbeAddr implements dispatch.Gossip.
func (d *directory) ProbeAddr(ctx context.Context, name, addr string) (time.Duration, error) {
	return d.nodes.ProbeAddr(ctx, name, addr)
}

// open joins both pools.
func (d *directory) open(clusterID string, nodesKeys, controllersKeys [][]byte, log *slog.Logger) (err error) {
	c := d.config
	d.controllers, err = gossip.Open(gossip.Config{
		Name: c.name, Role: gossip.RoleController, ClusterID: clusterID, Keys: controllersKeys,
		BindAddr: c.bindIP, AdvertiseAddr: c.advertiseIP, Port: c.controllersGossipPort,
		Join:  moved(c.join, c.controllersGossipPort-c.gossipPort),
		Seeds: func() []string { return d.memberHosts(c.controllersGossipPort) },
		Admit: d.admitController, MaxMembers: maxControllers, Tags: c.tags(), Logger: log.With("pool", "controllers"),
	})
	if err != nil {
		return portError("controllers-gossip-port", err)
	}
	d.nodes, err = gossip.Open(gossip.Config{
		Name: c.name, Role: gossip.RoleController, ClusterID: clusterID, Keys: nodesKeys,
		BindAddr: c.bindIP, AdvertiseAddr: c.advertiseIP, Port: c.gossipPort, Join: c.join, Seeds: d.nodeSeeds,
		Admit: d.admitNode, Tags: c.tags(), Logger: log.With("pool", "nodes"),
	})
	if err != nil {
		return errors.Join(portError("gossip-port", err), d.controllers.Close())
	}
	return nil
}

// setKeys has a pool use other keys.
func (d *directory) setKeys(pool string, keys [][]byte) error {
	if pool == pki.PoolControllers {
		return d.controllers.SetKeys(keys)
	}
	return d.nodes.SetKeys(keys)
}

// leave tells both pools that this controller goes, at the same time.
func (d *directory) leave(timeout time.Duration) error {
	left := make(chan error, 1)
	go func() { left <- d.nodes.Leave(timeout) }()
	err := d.controllers.Leave(timeout)
	return errors.Join(err, <-left)
}

func (d *directory) close() error { return errors.Join(d.nodes.Close(), d.controllers.Close()) }

// problems are sentences for the operator.
func (d *directory) problems() []string {
	return slices.Concat(d.controllers.Problems(), d.nodes.Problems())
}

var _ dispatch.Gossip = (*directory)(nil)
