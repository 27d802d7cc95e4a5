package main

import (
	"context"
	"net"
	"net/netip"
	"slices"
	"strings"
	"time"

	"timonel/dispatch"
	pb "timonel/proto/timonel/v1"

	"k8s.io/client-go/rest"
)

// newDispatch makes the controllers' end of the agents' streams, and the tracker
// of their nodes.
func (k *controller) newDispatch() (*dispatch.Dispatcher, *dispatch.Tracker, error) {
	d, err := dispatch.New(dispatch.Config{
		Name:      k.name,
		ClusterID: k.bundle.ClusterID(),
		Store:     k.store,
		Objects:   k.cache,
		Barrier:   k.replica.ReadBarrier,
		InTouch:   k.replica.InTouch,
		API: func(node string) *rest.Config {
			return k.apiAs("system:node:"+node, "system:nodes")
		},
		Bundle:      k.bundle,
		Trust:       k.trust,
		Gossip:      k.directory,
		PeerConn:    k.peers.conn,
		TunnelConn:  k.tunnels.conn,
		Controllers: k.directory.clusterPorts,
		Status:      k.status,
		ReportBytes: k.shares.reports, UsageBytes: k.shares.usage, NetworkBytes: k.shares.network,
		Keys:    k.keys,
		Network: k.network(),
		Logger:  k.log,
	})
	if err != nil {
		return nil, nil, err
	}
	return d, d.NewTracker(), nil
}

// network is whose addresses are whose, for what nodes are told of one another.
func (k *controller) network() dispatch.Network {
	return dispatch.Network{
		Pods: k.pods(), ForeignPods: k.podAddresses == podsOfCluster, Services: k.services(),
		Controllers: k.controllerAddresses, Domain: k.clusterDomain, DNS: k.dnsAddresses(),
		Ports: []uint16{uint16(k.clusterPort), uint16(k.raftPort), uint16(k.gossipPort), uint16(k.controllersGossipPort)},
	}
}

// controllerAddresses are those of all members, alive or not, and this one's own.
func (k *controller) controllerAddresses() []netip.Addr {
	all := []string{k.advertised(k.raftPort)}
	for _, m := range k.replica.Members() {
		all = append(all, m.Addr)
	}
	var out []netip.Addr
	for _, addr := range all {
		host, _, _ := net.SplitHostPort(addr)
		if ip, err := netip.ParseAddr(host); err == nil {
			out = append(out, ip.Unmap())
		}
	}
	return out
}

// status is what `timonel status` shows of this controller. dispatch adds the
// agents that are connected here.
func (k *controller) status(context.Context) *pb.StatusResponse {
	s := k.replica.Status()
	resident, anonymous := residentMemory()
	out := &pb.StatusResponse{
		Name: k.name, ClusterId: k.bundle.ClusterID(), Version: version,
		Role: s.Role, Leader: s.Leader.ID, Term: s.Term,
		CommitIndex: s.CommitIndex, AppliedIndex: s.AppliedIndex, LastIndex: s.LastIndex,
		Revision:      k.store.View().Revision(),
		ResidentBytes: resident, AnonymousBytes: anonymous,
		FsyncMicroseconds: uint64(s.Fsync / time.Microsecond),
		Problems:          slices.Concat(s.Problems, k.directory.problems(), k.keys.sentences()),
		ClusterVersion:    uint32(k.store.View().ClusterVersion()), NewestVersion: uint32(k.newest),
	}
	if problem := k.clusterVersion.problem(k.store); problem != "" {
		out.Problems = append(out.Problems, problem)
	}
	if problem := k.quota.Status().Problem(); problem != "" {
		out.Problems = append(out.Problems, problem)
	}
	if k.scheduler != nil {
		out.Problems = append(out.Problems, k.scheduler.Problems()...)
	}
	out.Expiries = k.expiries(time.Now())
	for _, m := range k.directory.Members() {
		out.Members = append(out.Members, &pb.Member{
			Name: m.Name, Address: m.Addr, Role: m.Role, State: strings.ToLower(m.State.String()),
		})
	}
	return out
}
