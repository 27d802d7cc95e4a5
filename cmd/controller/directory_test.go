package main

import (
	"bytes"
	"fmt"
	"log/slog"
	"net"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"timonel/consensus"
	"timonel/gossip"
	"timonel/state"
	"timonel/state/objects"
	"timonel/test/intruder"
)

// freePort is a port of 127.0.0.1 that nobody has now, UDP and TCP.
func freePort(t *testing.T) int {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	defer l.Close()
	return l.Addr().(*net.TCPAddr).Port
}

// TestDirectoryUnderAttack: whoever has the workers' key moves no controller, adds
// none to what agents and clients are told, and no node.
func TestDirectoryUnderAttack(t *testing.T) {
	t.Parallel()
	workers, own := bytes.Repeat([]byte{1}, 32), bytes.Repeat([]byte{2}, 32)
	open := func(name string, members ...consensus.Member) *directory {
		c := &config{name: name, bindIP: "127.0.0.1", advertiseIP: "127.0.0.1", apiPort: 6443, clusterPort: 7443, raftPort: 7444,
			gossipPort: freePort(t), controllersGossipPort: freePort(t)}
		d := &directory{cache: objects.NewCache(state.New(state.Options{})), config: c}
		get := func() []consensus.Member { return members }
		d.log.Store(&get)
		require.NoError(t, d.open("cluster-1", [][]byte{workers}, [][]byte{own}, slog.New(slog.DiscardHandler)))
		t.Cleanup(func() { require.NoError(t, d.close()) })
		return d
	}
	d := open("c1", consensus.Member{Server: consensus.Server{ID: "c1", Addr: "127.0.0.1:7444"}}, consensus.Member{Server: consensus.Server{ID: "c2", Addr: "127.0.0.2:7444"}})

	x, err := intruder.New(workers, "cluster-1")
	require.NoError(t, err)
	defer x.Close()
	addr := d.nodes.Addr()
	tags := map[string]string{tagRaft: "1", tagCluster: "2", tagAPI: "3", tagGossip: "4"}
	for i := range 2000 {
		role := []string{gossip.RoleController, gossip.RoleAgent}[i%2]
		ip := net.IPv4(10, 9, byte(i/250), byte(i%250))
		for _, name := range []string{fmt.Sprintf("ghost-%d", i), "c1", "c2"} {
			require.NoError(t, x.Packet(addr, x.Alive(intruder.Member{Name: name, Role: role, IP: ip, Port: 7946, Incarnation: i, Tags: tags})))
		}
		// The controllers' pool has another key.
		require.NoError(t, x.Packet(d.controllers.Addr(), x.Alive(intruder.Member{Name: "c2", Role: role, IP: ip, Port: 7946, Incarnation: i, Tags: tags})))
	}
	// At c2's own address, with ports of the intruder's choice.
	require.NoError(t, x.Packet(addr, x.Alive(intruder.Member{Name: "c2", Role: gossip.RoleController, IP: net.IPv4(127, 0, 0, 2), Port: 9, Incarnation: 1 << 20, Tags: tags})))
	require.Eventually(t, func() bool {
		return d.nodes.Refused()["not-a-member"] > 100 && d.controllers.Refused()["wrong-key"] > 100
	}, time.Minute, 10*time.Millisecond)

	for _, m := range d.nodes.Members() {
		require.Contains(t, []string{"c1", "c2"}, m.Name)
	}
	require.Len(t, d.controllers.Members(), 1)
	require.Subset(t, []string{"127.0.0.1:7443", "127.0.0.2:7443"}, d.clusterPorts())
	require.Equal(t, []net.IP{net.ParseIP("127.0.0.1")}, d.controllerIPs(), "c2 does not answer")
	for _, s := range d.raftServers() {
		require.Contains(t, []consensus.Server{{ID: "c1", Addr: "127.0.0.1:7444"}, {ID: "c2", Addr: "127.0.0.2:7444"}}, s)
	}
	two, ok := d.find("c2")
	require.True(t, ok)
	require.Equal(t, "127.0.0.2:7443", two.cluster)
	_, ok = d.find("ghost-0")
	require.False(t, ok)
}
