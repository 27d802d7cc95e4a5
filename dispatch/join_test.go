package dispatch

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"net"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"timonel/internal/ports"
	"timonel/pki"
	pb "timonel/proto/timonel/v1"
	"timonel/trust"
)

// newToken makes a join token and returns the part that an agent shows.
func (c *cluster) newToken(spec trust.TokenSpec) string {
	c.t.Helper()
	_, secret, err := c.trust.CreateToken(context.Background(), spec)
	require.NoError(c.t, err)
	return secret
}

// joinTo asks a controller for a certificate, with the token alone.
func (c *cluster) joinTo(controller, secret, name string, csr []byte) (*pb.JoinResponse, error) {
	c.t.Helper()
	token, err := pki.ParseToken(c.bundle.Token())
	require.NoError(c.t, err)
	agents := pb.NewAgentsClient(c.dial(controller, token.ClientTLS(c.addr(controller))))
	return agents.Join(c.t.Context(), &pb.JoinRequest{Token: secret, NodeName: name, Csr: csr})
}

func newCSR(t *testing.T, name string) pki.NodeRequest {
	t.Helper()
	request, err := pki.NewNodeRequest(name)
	require.NoError(t, err)
	return request
}

func requireCode(t *testing.T, err error, code codes.Code, part string) {
	t.Helper()
	require.Equal(t, code, status.Code(err), "%v", err)
	require.ErrorContains(t, err, part)
}

func TestJoin(t *testing.T) {
	t.Parallel()
	c := newCluster(t, "c1", "c2")
	secret := c.newToken(trust.TokenSpec{})
	request := newCSR(t, "a1")

	for _, wrong := range []string{"wrong", strings.ToUpper(secret), secret + " ", " " + secret, "-", "x-", secret[:len(secret)-1],
		strings.Repeat("a", 16<<10), c.bundle.BootstrapSecret(), "bootstrap-" + c.bundle.BootstrapSecret()} {
		_, err := c.joinTo("c1", wrong, "a1", request.CSR)
		if status.Code(err) != codes.ResourceExhausted { // the ninth wrong one comes too fast
			requireCode(t, err, codes.PermissionDenied, "token")
		}
	}
	_, err := c.joinTo("c1", secret, "a2", request.CSR)
	require.Equal(t, codes.ResourceExhausted, status.Code(err), "too many were wrong: %v", err)
	_, err = c.joinTo("c2", secret, "a2", request.CSR)
	requireCode(t, err, codes.InvalidArgument, "instead of")

	answer, err := c.joinTo("c2", secret, "a1", request.CSR)
	require.NoError(t, err)
	require.ElementsMatch(t, c.addrs(), answer.Controllers)
	require.Equal(t, c.bundle.GossipKey(), answer.GossipKey)
	require.Equal(t, [][]byte{c.bundle.GossipKey()}, answer.GossipKeys)
	node := pki.Node{CA: answer.Ca, Pair: pki.KeyPair{Cert: answer.Certificate, Key: request.Key}, GossipKeys: answer.GossipKeys}
	require.NoError(t, node.Save(t.TempDir()+"/node"))
	_, until, err := node.Validity()
	require.NoError(t, err)
	require.WithinDuration(t, time.Now().Add(pki.NodeLifetime), until, time.Minute)

	// With its certificate a node may ask nothing of controllers.
	_, err = pb.NewPeersClient(c.dial("c1", tlsOf(t, node))).Status(t.Context(), &pb.StatusRequest{})
	requireCode(t, err, codes.PermissionDenied, "node a1")
	_, err = pb.NewPeersClient(c.dial("c1", tlsOf(t, node))).Claim(t.Context(), &pb.ClaimRequest{NodeName: "a2"})
	requireCode(t, err, codes.PermissionDenied, "node a1")
}

// A name is bound to its first key, connected or not, on every controller, until it
// is reset; the key of before is good for nothing then.
func TestTokenDoesNotTakeOverANode(t *testing.T) {
	t.Parallel()
	c := newCluster(t, "c1", "c2", "c3")
	secret := c.newToken(trust.TokenSpec{})
	first, second := newCSR(t, "a1"), newCSR(t, "a1")
	answer, err := c.joinTo("c1", secret, "a1", first.CSR)
	require.NoError(t, err)
	owner := tlsOf(t, pki.Node{CA: answer.Ca, Pair: pki.KeyPair{Cert: answer.Certificate, Key: first.Key}, GossipKeys: answer.GossipKeys})
	a := c.connectAs("c1", &pb.Hello{NodeName: "a1"}, owner)
	a.batch()
	for _, controller := range []string{"c1", "c2", "c3"} {
		_, err := c.joinTo(controller, secret, "a1", second.CSR)
		requireCode(t, err, codes.PermissionDenied, "bound to another key")
	}
	for _, name := range []string{"c1", "c9", "kube-apiserver", "localhost"} {
		_, err := c.joinTo("c2", secret, name, newCSR(t, name).CSR)
		requireCode(t, err, codes.PermissionDenied, "reserved")
	}
	// A certificate of that name and another key, however it came to be.
	stranger := c.connectAs("c2", &pb.Hello{NodeName: "a1"}, tlsOf(t, c.newCredentials("a1")))
	requireCode(t, stranger.end(), codes.PermissionDenied, "bound to another key")

	_, err = c.trust.ResetNode(t.Context(), "a1", trust.By{User: "admin"})
	require.NoError(t, err)
	requireCode(t, a.end(), codes.PermissionDenied, "revoked")
	_, err = c.joinTo("c3", secret, "a1", first.CSR)
	requireCode(t, err, codes.PermissionDenied, "key of this node was revoked")
	_, err = c.joinTo("c3", secret, "a1", second.CSR)
	require.NoError(t, err)
	back := c.connectAs("c3", &pb.Hello{NodeName: "a1"}, owner)
	requireCode(t, back.end(), codes.PermissionDenied, "revoked")
}

func TestRevocationCutsWhatIsOpen(t *testing.T) {
	t.Parallel()
	c := newCluster(t, "c1", "c2")
	c.put(nodeObject("a1"))
	a := c.connect("c1", &pb.Hello{NodeName: "a1"})
	a.batch()
	// A tunnel that the agent holds open.
	id, _ := c.controllers["c1"].tunnels.expect("a1")
	tunnel, err := pb.NewAgentsClient(a.conn).Tunnel(metadata.AppendToOutgoingContext(t.Context(), pb.TunnelIDKey, id))
	require.NoError(t, err)
	eventually(t, "the tunnel is open", func() bool {
		tunnels := c.controllers["c1"].tunnels
		tunnels.mu.Lock()
		defer tunnels.mu.Unlock()
		_, waiting := tunnels.waiting[id]
		return !waiting
	})
	other := c.connect("c1", &pb.Hello{NodeName: "a2"})
	other.batch()

	begin := time.Now()
	_, err = c.trust.RevokeNode(t.Context(), "a1", trust.By{User: "admin", Reason: "stolen"})
	require.NoError(t, err)
	requireCode(t, a.end(), codes.PermissionDenied, "revoked")
	_, err = tunnel.Recv()
	requireCode(t, err, codes.PermissionDenied, "revoked")
	require.Less(t, time.Since(begin), 10*time.Second)

	for _, controller := range []string{"c1", "c2"} {
		again := c.connect(controller, &pb.Hello{NodeName: "a1"})
		requireCode(t, again.end(), codes.PermissionDenied, "revoked")
		credentials := c.credentials("a1")
		same, err := pki.NewNodeRequestFor("a1", credentials.Pair.Key)
		require.NoError(t, err)
		_, err = pb.NewAgentsClient(c.dial(controller, c.nodeTLS("a1"))).Join(t.Context(), &pb.JoinRequest{NodeName: "a1", Csr: same.CSR})
		requireCode(t, err, codes.PermissionDenied, "revoked")
		tunnel, err := pb.NewAgentsClient(c.dial(controller, c.nodeTLS("a1"))).Tunnel(metadata.AppendToOutgoingContext(t.Context(), pb.TunnelIDKey, "x"))
		require.NoError(t, err)
		_, err = tunnel.Recv()
		requireCode(t, err, codes.PermissionDenied, "revoked")
	}
	secret := c.newToken(trust.TokenSpec{})
	_, err = c.joinTo("c2", secret, "a1", newCSR(t, "a1").CSR)
	requireCode(t, err, codes.PermissionDenied, "timonel node reset a1")
	c.put(podOn("a2", "web", "u1"))
	require.Contains(t, other.batch(), "synced", "others are served on")
}

func TestRenewal(t *testing.T) {
	t.Parallel()
	c := newCluster(t, "c1")
	credentials := c.credentials("a1")
	same, err := pki.NewNodeRequestFor("a1", credentials.Pair.Key)
	require.NoError(t, err)
	agents := pb.NewAgentsClient(c.dial("c1", c.nodeTLS("a1")))
	renew := func(name string, csr []byte) error {
		_, err := agents.Join(t.Context(), &pb.JoinRequest{NodeName: name, Csr: csr})
		return err
	}
	requireCode(t, renew("a1", same.CSR), codes.PermissionDenied, "there is no Node a1")
	node := nodeObject("a1")
	c.put(node)
	requireCode(t, renew("a1", same.CSR), codes.PermissionDenied, "connects first")
	a := c.connect("c1", &pb.Hello{NodeName: "a1"})
	a.batch()
	require.NoError(t, renew("a1", same.CSR))
	requireCode(t, renew("a1", newCSR(t, "a1").CSR), codes.PermissionDenied, "another")
	requireCode(t, renew("a2", newCSR(t, "a2").CSR), codes.PermissionDenied, "is that of node a1")
	record, _, err := c.trust.Node("a1")
	require.NoError(t, err)
	require.WithinDuration(t, time.Now().Add(pki.NodeLifetime), record.Expires, time.Minute)
	c.remove(node)
	requireCode(t, renew("a1", same.CSR), codes.PermissionDenied, "there is no Node a1")
	// Without a certificate there is nothing to renew.
	_, err = c.joinTo("c1", "", "a1", same.CSR)
	requireCode(t, err, codes.PermissionDenied, "token")
}

// A node that renews, joins again or starts all the time does not fill the log.
func TestANodeDoesNotFillTheLog(t *testing.T) {
	t.Parallel()
	c := newCluster(t, "c1", "c2")
	secret := c.newToken(trust.TokenSpec{Uses: 1})
	request := newCSR(t, "a1")
	c.put(nodeObject("a1"))
	answer, err := c.joinTo("c1", secret, "a1", request.CSR)
	require.NoError(t, err)
	node := pki.Node{CA: answer.Ca, Pair: pki.KeyPair{Cert: answer.Certificate, Key: request.Key}, GossipKeys: answer.GossipKeys}
	config := tlsOf(t, node)
	before := c.store.View().Revision()
	_, first, err := node.Validity()
	require.NoError(t, err)
	same, err := pki.NewNodeRequestFor("a1", request.Key)
	require.NoError(t, err)
	for i := range 50 {
		var again *pb.JoinResponse
		if controller := []string{"c1", "c2"}[i%2]; i%4 < 2 {
			again, err = c.joinTo(controller, secret, "a1", request.CSR)
		} else {
			again, err = pb.NewAgentsClient(c.dial(controller, config)).Join(t.Context(), &pb.JoinRequest{NodeName: "a1", Csr: same.CSR})
		}
		require.NoError(t, err)
		node.Pair.Cert = again.Certificate
		_, until, err := node.Validity()
		require.NoError(t, err)
		require.Equal(t, first, until, "the state knows of no other")
	}
	require.Equal(t, before, c.store.View().Revision(), "each was committed")

	exhausted := false
	for i := range 3 * startBurst {
		instance := string(rune('a' + i))
		a := c.connectAs("c1", &pb.Hello{NodeName: "a1", Instance: instance}, config)
		for !exhausted && c.trust.Instance("a1") != instance { // until it is admitted
			select {
			case _, ok := <-a.got:
				exhausted = !ok && status.Code(a.err) == codes.ResourceExhausted
				require.True(t, ok || exhausted, "%v", a.err)
			case <-time.After(time.Millisecond):
			}
		}
		a.cancel()
		_ = a.end()
		eventually(t, "c1 notices", func() bool { return c.controllers["c1"].hub.session("a1") == nil })
	}
	require.True(t, exhausted, "30 processes started in a moment")
	require.Less(t, c.store.View().Revision()-before, int64(3*startBurst))
	other := c.connect("c1", &pb.Hello{NodeName: "a2", Instance: "x"})
	other.batch()
}

func TestStartsAreCounted(t *testing.T) {
	t.Parallel()
	now := time.Unix(1e9, 0)
	s := newStarts(func() time.Time { return now })
	for i := range 100 {
		wait, ok := s.take("a1")
		require.Equal(t, i < startBurst, ok, "start %d", i)
		if !ok {
			require.Equal(t, startEvery, wait)
		}
	}
	now = now.Add(startEvery)
	_, ok := s.take("a1")
	require.True(t, ok)
	for i := range 5 * startsMax {
		now = now.Add(startEvery)
		_, ok := s.take(string(rune('b' + i)))
		require.True(t, ok)
	}
	require.LessOrEqual(t, len(s.nodes), startsMax+1)
}

// Two agents that have one certificate: the second is not served while the first is,
// wherever they connect; a process that was restarted or has moved is.
func TestOneProcessPerNode(t *testing.T) {
	t.Parallel()
	c := newCluster(t, "c1", "c2", "c3")
	c.put(nodeObject("a1"))
	first := c.connect("c1", &pb.Hello{NodeName: "a1", Instance: "first"})
	first.batch()
	for _, controller := range []string{"c1", "c2", "c3"} {
		for _, instance := range []string{"second", noInstance} {
			copied := c.connect(controller, &pb.Hello{NodeName: "a1", Instance: instance})
			requireCode(t, copied.end(), codes.FailedPrecondition, "is connected to controller c1")
		}
	}
	c.put(podOn("a1", "web", "u1"))
	require.Contains(t, first.batch(), "synced")

	moved := c.connect("c2", &pb.Hello{NodeName: "a1", Instance: "first"})
	moved.batch()
	first.cancel()
	eventually(t, "c1 notices", func() bool { return c.controllers["c1"].hub.session("a1") == nil })

	moved.cancel()
	eventually(t, "c2 notices", func() bool { return c.controllers["c2"].hub.session("a1") == nil })
	restarted := c.connect("c3", &pb.Hello{NodeName: "a1", Instance: "third"})
	restarted.batch()
	stale := c.connect("c1", &pb.Hello{NodeName: "a1", Instance: "first"})
	requireCode(t, stale.end(), codes.FailedPrecondition, "is connected to controller c3")
}

// Agents of before there were instances: two with one certificate are never both
// served, on whichever controllers, and one that moves or starts again is at once.
func TestOneStreamOfAnAgentWithoutInstance(t *testing.T) {
	t.Parallel()
	c := newCluster(t, "c1", "c2", "c3")
	c.put(nodeObject("a1"))
	first := c.connect("c1", &pb.Hello{NodeName: "a1", Instance: noInstance})
	first.batch()
	for i, controller := range []string{"c2", "c3", "c1", "c1"} {
		next := c.connect(controller, &pb.Hello{NodeName: "a1", Instance: noInstance})
		next.batch()
		require.Error(t, first.end(), "stream %d goes on beside a newer one", i)
		first = next
	}
	c.put(podOn("a1", "web", "u1"))
	require.Contains(t, first.batch(), "synced")

	for instance, want := range map[string]codes.Code{
		"stream:x": codes.InvalidArgument, strings.Repeat("x", 65): codes.InvalidArgument,
		"a newer build": codes.FailedPrecondition, // waits for the other's stream to end
	} {
		second := c.connect("c2", &pb.Hello{NodeName: "a1", Instance: instance})
		require.Equal(t, want, status.Code(second.end()), instance)
	}
	first.cancel()
	eventually(t, "c1 notices", func() bool { return c.controllers["c1"].hub.session("a1") == nil })
	upgraded := c.connect("c2", &pb.Hello{NodeName: "a1", Instance: "a newer build"})
	upgraded.batch()
	stale := c.connect("c3", &pb.Hello{NodeName: "a1", Instance: noInstance})
	requireCode(t, stale.end(), codes.FailedPrecondition, "is connected to controller c2")
}

// Many processes with one certificate at once: one at most is served in the end.
func TestProcessesThatRaceForANode(t *testing.T) {
	t.Parallel()
	for name, instance := range map[string]func(int) string{
		"with instances":   func(i int) string { return string(rune('a' + i)) },
		"without":          func(int) string { return noInstance },
		"with and without": func(i int) string { return []string{noInstance, string(rune('a' + i))}[i%2] },
	} {
		t.Run(name, func(t *testing.T) { raceForANode(t, instance) }) // one after another: each opens many connections
	}
}

func raceForANode(t *testing.T, instance func(int) string) {
	c := newCluster(t, "c1", "c2", "c3")
	c.put(nodeObject("a1"))
	config := c.nodeTLS("a1")
	var wait sync.WaitGroup
	agents := make([]*agent, 12)
	for i := range agents {
		wait.Go(func() {
			hello := &pb.Hello{NodeName: "a1", Instance: instance(i)}
			agents[i] = c.connectAs([]string{"c1", "c2", "c3"}[i%3], hello, config)
		})
	}
	wait.Wait()
	served := func() (n int) {
		for _, k := range c.controllers {
			if s := k.hub.session("a1"); s != nil && s.instance == c.trust.Instance("a1") {
				n++
			} else if s != nil {
				return -1 // it is about to end
			}
		}
		return n
	}
	eventually(t, "one is served", func() bool { return served() == 1 })
	node, _, err := c.trust.Node("a1")
	require.NoError(t, err)
	require.NotEmpty(t, node.Instance)
}

// A process that was admitted first, and is slow, does not end the one that took its
// place: else nobody would be served.
func TestALateProcessDoesNotEndTheAdmittedOne(t *testing.T) {
	t.Parallel()
	c := newCluster(t, "c1")
	c.put(nodeObject("a1"))
	admitted := c.connect("c1", &pb.Hello{NodeName: "a1", Instance: "second"})
	admitted.batch()
	hub := c.controllers["c1"].hub
	served := hub.session("a1")
	var ended error
	hub.add(&session{d: served.d, node: "a1", instance: "first", cancel: func(err error) { ended = err }})
	require.ErrorIs(t, ended, errSuperseded)
	require.True(t, hub.session("a1") == served)
	c.put(podOn("a1", "web", "u1"))
	require.Contains(t, admitted.batch()[0], "pod default/web uid=u1")
}

func TestRequestsThatAskForMore(t *testing.T) {
	t.Parallel()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	require.NoError(t, err)
	names := make([]string, 300)
	for i := range names {
		names[i] = strings.Repeat("a", 60) + ".example.org"
	}
	good := pkix.Name{CommonName: "system:node:a1", Organization: []string{"system:nodes"}}
	for name, template := range map[string]x509.CertificateRequest{
		"a SAN":                   {Subject: good, DNSNames: []string{"kubernetes"}},
		"an address":              {Subject: good, IPAddresses: []net.IP{net.IPv4(10, 96, 0, 1)}},
		"many SANs":               {Subject: good, DNSNames: names},
		"another organisation":    {Subject: pkix.Name{CommonName: "system:node:a1", Organization: []string{"system:masters"}}},
		"a second organisation":   {Subject: pkix.Name{CommonName: "system:node:a1", Organization: []string{"system:nodes", "system:masters"}}},
		"a controller":            {Subject: pkix.Name{CommonName: "timonel:controller:c1", Organization: []string{"timonel:controllers"}}},
		"an organisational unit":  {Subject: pkix.Name{CommonName: "system:node:a1", Organization: []string{"system:nodes"}, OrganizationalUnit: []string{"x"}}},
		"no organisation":         {Subject: pkix.Name{CommonName: "system:node:a1"}},
		"the name in big letters": {Subject: pkix.Name{CommonName: "system:node:A1", Organization: []string{"system:nodes"}}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			csr, err := x509.CreateCertificateRequest(rand.Reader, &template, key)
			require.NoError(t, err)
			c := newCluster(t, "c1")
			_, err = c.joinTo("c1", c.newToken(trust.TokenSpec{}), "a1", csr)
			require.Equal(t, codes.InvalidArgument, status.Code(err), "%v", err)
			_, found, err := c.trust.Node("a1")
			require.NoError(t, err)
			require.False(t, found, "a name is bound to the key of a request that was refused")
		})
	}
}

func TestFailuresCountBySource(t *testing.T) {
	t.Parallel()
	now := time.Unix(1e9, 0)
	a := newAttempts(func() time.Time { return now })
	bad, good := netip.MustParseAddr("10.0.0.1"), netip.MustParseAddr("10.0.0.2")
	logged := 0
	for i := range 1000 {
		_, ok := a.allowed(bad)
		require.Equal(t, i < failureBurst, ok, "attempt %d", i)
		if log, _ := a.failed(bad); log {
			logged++
		}
	}
	require.Equal(t, logBurst, logged)
	_, ok := a.allowed(good)
	require.True(t, ok, "others are held up")
	now = now.Add(failureEvery)
	_, ok = a.allowed(bad)
	require.True(t, ok)
	log, unlogged := a.failed(bad)
	require.True(t, log)
	require.Equal(t, 1000-logBurst, unlogged)
	_, ok = a.allowed(bad)
	require.False(t, ok, "one more, and not a burst")

	var ip [4]byte
	for i := range 3 * sourcesMax {
		ip[0], ip[1], ip[2] = byte(i>>16), byte(i>>8), byte(i)
		a.failed(netip.AddrFrom4(ip))
	}
	require.LessOrEqual(t, len(a.sources), sourcesMax)
	v6 := func(s string) netip.Addr { return ports.SourceOf(&net.TCPAddr{IP: net.ParseIP(s), Port: 1}) }
	require.Equal(t, v6("2001:db8::1"), v6("2001:db8::ffff"))
	require.NotEqual(t, v6("2001:db8::1"), v6("2001:db8:0:1::1"))
	require.Equal(t, netip.MustParseAddr("10.0.0.1"), v6("::ffff:10.0.0.1"))
}
