//go:build e2e

package e2e

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"path/filepath"
	"regexp"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"github.com/vishvananda/netns"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"timonel/gossip"
	"timonel/internal/machines"
	"timonel/pki"
	"timonel/test/harness"
	"timonel/test/intruder"
)

// TestGossip attacks a cluster with the key that every agent has, from a machine of the
// attacker's own, and gives all members new keys while some of them fail: nobody is lost,
// and the old keys are worth nothing.
func TestGossip(t *testing.T) {
	t.Parallel()
	c := harness.Up(t, harness.Options{Controllers: 3, Agents: 2})
	bundle, err := pki.LoadBundle(c.Spec.BundleDir())
	require.NoError(t, err)
	controllersKey, err := bundle.FirstGossipKey(pki.PoolControllers)
	require.NoError(t, err)
	attacker := attackerOf(t, c)
	stolen, err := pki.LoadNode(filepath.Join(c.Spec.DataDir("a1"), "pki"), "a1")
	require.NoError(t, err)

	t.Run("the key that agents have deceives nobody", func(t *testing.T) {
		before := c.Status(t)
		stop := make(chan struct{})
		var attack sync.WaitGroup
		attack.Go(func() { attacker.flood(stolen.GossipKeys[0], bundle.ClusterID(), stop) })
		end := sync.OnceFunc(func() { close(stop); attack.Wait() })
		defer end()
		harness.Eventually(t, time.Minute, "every controller refuses the ghosts", func() error {
			for _, on := range c.Spec.ControllerNames() {
				if n := refusals(t, c, on, pki.PoolNodes, "not-a-member"); n < 2000 {
					return fmt.Errorf("%s has refused %d", on, n)
				}
			}
			return nil
		})
		harness.For(t, 3*time.Second, "nobody is deceived", func() error { return deceived(t, c) })
		// Before another leads, who grows by what a leader does. A controller that has just
		// started grows by some 90 MB of garbage; ghosts that were believed took 1 GB.
		for i, k := range c.Status(t).Controllers {
			require.Less(t, k.Memory.Anonymous-before.Controllers[i].Memory.Anonymous, int64(160<<20), "%s grew", k.Name)
		}
		c.Kill(t, "c1", true)
		c.Start(t, "c1")
		harness.Eventually(t, time.Minute, "c1 is where it was", func() error { return settled(t, c) })
		harness.For(t, 3*time.Second, "nobody is deceived", func() error { return deceived(t, c) })
		end()
	})

	t.Run("keys are rotated while members fail", func(t *testing.T) {
		// a1 lives, and its Node is watched all the while.
		stop := make(chan struct{})
		lost := make(chan string, 1)
		var watch sync.WaitGroup
		client := c.Client(t, "")
		watch.Go(func() {
			for {
				if node, err := client.CoreV1().Nodes().Get(t.Context(), "a1", metav1.GetOptions{}); err == nil {
					if ready, why := harness.NodeReady(node); !ready {
						select {
						case lost <- why:
						default:
						}
					}
				}
				select {
				case <-stop:
					return
				case <-time.After(100 * time.Millisecond):
				}
			}
		})
		// a2 lives by gossip for some seconds more and does not answer: the first step waits
		// for it, and c2 is killed meanwhile.
		require.NoError(t, c.Spec.Pause(t.Context(), "a2", true))
		out := c.Run(t, "gossip", "rotate-key", "--detach")
		require.Contains(t, out, "are being rotated")
		c.Kill(t, "c2", true)
		out, err := c.Try(t.Context(), "gossip", "rotate-key", "--pool", "nodes")
		if err != nil { // it may be over already on a machine that is quick
			require.Contains(t, out, "is being rotated already")
			require.Contains(t, out, "members have done it")
		}
		rotated := awaitRotated(t, c, 1)
		require.NoError(t, c.Spec.Resume(t.Context(), "a2"))
		c.Start(t, "c2")
		c.WaitNode(t, "a2", true, time.Minute)
		awaitAll(t, c)
		close(stop)
		watch.Wait()
		select {
		case why := <-lost:
			t.Fatalf("a1 was not Ready: %s", why)
		default:
		}
		node, err := pki.LoadNode(filepath.Join(c.Spec.DataDir("a2"), "pki"), "a2")
		require.NoError(t, err)
		require.Equal(t, []string{rotated[pki.PoolNodes]}, pki.GossipKeyIDs(node.GossipKeys), "what a2 has on its disk")
	})

	t.Run("the old keys are worth nothing", func(t *testing.T) {
		for pool, key := range map[string][]byte{pki.PoolNodes: stolen.GossipKeys[0], pki.PoolControllers: controllersKey} {
			before := map[string]int{}
			for _, on := range c.Spec.ControllerNames() {
				before[on] = refusals(t, c, on, pool, "wrong-key")
			}
			stop := make(chan struct{})
			var attack sync.WaitGroup
			attack.Go(func() { attacker.flood(key, bundle.ClusterID(), stop) })
			harness.Eventually(t, time.Minute, "every controller cannot read what the old key sealed", func() error {
				for _, on := range c.Spec.ControllerNames() {
					if n := refusals(t, c, on, pool, "wrong-key") - before[on]; n < 100 {
						return fmt.Errorf("%s: %d", on, n)
					}
				}
				return nil
			})
			require.NoError(t, deceived(t, c))
			close(stop)
			attack.Wait()
		}
	})

	t.Run("all controllers start at once with the new keys", func(t *testing.T) {
		for _, name := range c.Spec.ControllerNames() {
			c.Kill(t, name, true)
		}
		for _, name := range c.Spec.ControllerNames() {
			require.NoError(t, c.Spec.Start(t.Context(), name))
		}
		harness.Eventually(t, time.Minute, "all are back", func() error { return settled(t, c) })
		awaitAll(t, c)
		// And one with nothing but the bundle and where the others are.
		c.Kill(t, "c3", false)
		c.Run(t, "wipe", "c3")
		c.Start(t, "c3")
		awaitAll(t, c)
	})

	t.Run("bad input", func(t *testing.T) {
		for want, args := range map[string][]string{
			`"agents" is not controllers or nodes`: {"gossip", "rotate-key", "--pool", "agents"},
			"want a second at least":               {"gossip", "rotate-key", "--wait", "0s"},
			"want table or json":                   {"gossip", "keys", "-o", "yaml"},
		} {
			out, err := c.Try(t.Context(), args...)
			require.Error(t, err)
			require.Contains(t, out, want)
		}
	})
}

// ringStatus is what `timonel gossip keys -o json` says of a pool.
type ringStatus struct {
	Pool         string                `json:"pool"`
	Generation   int64                 `json:"generation"`
	Step         string                `json:"step"`
	Keys         []struct{ ID string } `json:"keys"`
	Have         int                   `json:"have"`
	WaitingCount int                   `json:"waitingCount"`
	AwayCount    int                   `json:"awayCount"`
}

func ringsOf(t *testing.T, c *harness.Cluster) ([]ringStatus, error) {
	t.Helper()
	out, err := c.Try(t.Context(), "gossip", "keys", "-o", "json")
	if err != nil {
		return nil, errors.New(out)
	}
	var rings []ringStatus
	require.NoError(t, json.Unmarshal([]byte(out), &rings), out)
	require.Len(t, rings, 2)
	return rings, nil
}

// awaitRotated waits until both pools have had so many rotations, and returns the names
// of their keys.
func awaitRotated(t *testing.T, c *harness.Cluster, times int64) map[string]string {
	t.Helper()
	keys := map[string]string{}
	harness.Eventually(t, 2*time.Minute, "the keys are rotated", func() error {
		rings, err := ringsOf(t, c)
		if err != nil {
			return err
		}
		for _, r := range rings {
			if r.Step != "" || r.Generation < 3*times {
				return fmt.Errorf("%+v", r)
			}
			keys[r.Pool] = r.Keys[0].ID
		}
		return nil
	})
	return keys
}

// awaitAll waits until every member has the keys, and is alive to every controller.
func awaitAll(t *testing.T, c *harness.Cluster) {
	t.Helper()
	harness.Eventually(t, time.Minute, "every member has the keys", func() error {
		rings, err := ringsOf(t, c)
		if err != nil {
			return err
		}
		for _, r := range rings {
			if want := map[string]int{pki.PoolControllers: 3, pki.PoolNodes: 5}[r.Pool]; r.Have != want || r.WaitingCount+r.AwayCount > 0 || len(r.Keys) != 1 {
				return fmt.Errorf("%+v", r)
			}
		}
		return nil
	})
	harness.Eventually(t, time.Minute, "every member is alive to every controller", func() error { return settled(t, c) })
}

// deceived says what an attacker has achieved: a member that there is not, or elsewhere
// than it is, a Node that is not Ready, an API where there is no controller.
func deceived(t *testing.T, c *harness.Cluster) error {
	t.Helper()
	s := c.Status(t)
	for _, k := range s.Controllers {
		for _, m := range k.Members {
			if c.Spec.Check(m.Name) != nil || m.Address != net.JoinHostPort(c.Spec.Address(m.Name).String(), "7946") {
				return fmt.Errorf("%s believes in %+v", k.Name, m)
			}
		}
	}
	for _, n := range s.Nodes {
		if !n.Ready {
			return fmt.Errorf("node %+v", n)
		}
	}
	_, err := served(t, c)
	return err
}

// settled says what is not as it should be: every member alive to every controller,
// every agent connected, the API served by all controllers, and nobody deceived.
func settled(t *testing.T, c *harness.Cluster) error {
	t.Helper()
	s := c.Status(t)
	for _, k := range s.Controllers {
		if !k.Answers || len(k.Members) != 5 {
			return fmt.Errorf("%s answers: %v, members: %v", k.Name, k.Answers, k.Members)
		}
		for _, m := range k.Members {
			if m.State != "alive" {
				return fmt.Errorf("%s sees %+v", k.Name, m)
			}
		}
	}
	for _, n := range s.Nodes {
		if n.StreamTo == "" {
			return fmt.Errorf("node %+v", n)
		}
	}
	if at, err := served(t, c); err != nil || at != 3 {
		return fmt.Errorf("the API is served at %d addresses: %w", at, err)
	}
	return deceived(t, c)
}

// served is at how many controllers the API is, as clients are told.
func served(t *testing.T, c *harness.Cluster) (int, error) {
	t.Helper()
	list, err := c.Client(t, "").DiscoveryV1().EndpointSlices(corev1.NamespaceDefault).List(t.Context(), metav1.ListOptions{
		LabelSelector: discoveryv1.LabelServiceName + "=kubernetes",
	})
	if err != nil {
		return 0, err
	}
	controllers := map[string]bool{}
	for _, name := range c.Spec.ControllerNames() {
		controllers[c.Spec.Address(name).String()] = true
	}
	at := map[string]bool{}
	for _, slice := range list.Items {
		for _, e := range slice.Endpoints {
			for _, a := range e.Addresses {
				if at[a] = true; !controllers[a] {
					return 0, fmt.Errorf("the API is said to be at %s", a)
				}
			}
		}
	}
	return len(at), nil
}

// refusals is how often a controller has refused what came by gossip.
func refusals(t *testing.T, c *harness.Cluster, on, pool, reason string) int {
	t.Helper()
	raw, err := c.Client(t, on).RESTClient().Get().AbsPath("/metrics").DoRaw(t.Context())
	if err != nil {
		return 0
	}
	m := regexp.MustCompile(`timonel_gossip_refused_total\{pool="` + pool + `",reason="` + reason + `"\} ([0-9.e+]+)`).FindSubmatch(raw)
	if m == nil {
		return 0
	}
	n, err := strconv.ParseFloat(string(m[1]), 64)
	require.NoError(t, err)
	return int(n)
}

// attackerMachine is a machine beside the cluster's.
type attackerMachine struct {
	t       *testing.T
	c       *harness.Cluster
	machine *machines.Machine
}

func attackerOf(t *testing.T, c *harness.Cluster) *attackerMachine {
	t.Helper()
	network := c.Spec.Network()
	at := network.Prefix.Addr().As4()
	at[3] = 240
	m := network.Machine("x1", netip.AddrFrom4(at), filepath.Join(t.TempDir(), "x1"))
	require.NoError(t, m.Boot(t.Context(), harness.Program(t, "machine")))
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute) // the test's has ended
		defer cancel()
		require.NoError(t, m.PowerOff(ctx))
	})
	return &attackerMachine{t: t, c: c, machine: m}
}

// flood says with a key all that an attacker would, to all members, until stop is
// closed: 2,000 ghosts, and that c1, c2 and a1 are here.
func (a *attackerMachine) flood(key []byte, cluster string, stop <-chan struct{}) {
	runtime.LockOSThread() // for good: the thread is in the machine's network
	space, err := netns.GetFromName(a.machine.Namespace())
	if err == nil {
		err = netns.Set(space)
		space.Close()
	}
	if err != nil {
		a.t.Errorf("enter the attacker's network: %v", err)
		return
	}
	x, err := intruder.New(key, cluster)
	if err != nil {
		a.t.Error(err)
		return
	}
	defer x.Close()
	own := net.IP(a.machine.Address.AsSlice())
	tags := map[string]string{"api": "6443", "cluster": "7443", "raft": "7444", "gossip": "7946"}
	var members []intruder.Member
	for i := range 2000 {
		role := []string{gossip.RoleAgent, gossip.RoleController}[i%2]
		members = append(members, intruder.Member{Name: fmt.Sprintf("ghost-%d", i), Role: role, IP: net.IPv4(10, 9, byte(i/250), byte(i%250)), Port: 7946, Incarnation: 1, Tags: tags})
	}
	for round := 1; ; round++ {
		for _, name := range a.c.Spec.Names() {
			ports := []string{"7946"}
			if strings.HasPrefix(name, "c") {
				ports = append(ports, "7947")
			}
			for _, port := range ports {
				to := net.JoinHostPort(a.c.Spec.Address(name).String(), port)
				for _, m := range []string{"c1", "c2", "a1"} {
					role := gossip.RoleController
					if m == "a1" {
						role = gossip.RoleAgent
					}
					_ = x.Packet(to, x.Alive(intruder.Member{Name: m, Role: role, IP: own, Port: 7946, Incarnation: 1000 * round, Tags: tags}))
					_ = x.Packet(to, x.Gone(intruder.Dead, m, "a2", 1000*round))
					_ = x.Packet(to, x.Gone(intruder.Suspect, m, "a2", 1000*round))
				}
				for i := range 50 { // a part in each round, all in forty
					_ = x.Packet(to, x.Alive(members[(50*round+i)%len(members)]))
				}
				_ = x.Stream(to, x.State(members[:200]...), time.Second)
			}
		}
		select {
		case <-stop:
			return
		case <-time.After(50 * time.Millisecond): // more would only keep the machine from answering
		}
	}
}
