package service

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/knftables"

	"timonel/network/feed"
	"timonel/network/netlab"
)

var sequences = flag.Int("sequences", 6, "how many sequences TestSequences makes")

// faults is an nft that does what a test says.
type faults struct {
	refuse string             // what the kernel does not take
	die    context.CancelFunc // called in the next Run,
	after  bool               // which is carried out before
	runs   []int              // operations of each transaction
}

func (f *faults) check(tx *knftables.Transaction) error {
	if f.refuse != "" && strings.Contains(tx.String(), f.refuse) {
		return errors.New("Error: Could not process rule: Cannot allocate memory")
	}
	return nil
}

// faulty lets a lab's next Proxy go through f, which is there for both tables.
func faulty(f *faults) Config {
	return Config{nft: func(family knftables.Family, table string) (knftables.Interface, error) {
		nft, err := knftables.New(family, table, knftables.UseNetlink)
		return &withFaults{nft, f}, err
	}}
}

type withFaults struct {
	knftables.Interface
	f *faults
}

func (n *withFaults) Run(ctx context.Context, tx *knftables.Transaction) error {
	if err := n.f.check(tx); err != nil {
		return err
	}
	if die := n.f.die; die != nil {
		n.f.die = nil
		defer die()
		if n.f.after {
			if err := n.Interface.Run(ctx, tx); err != nil {
				return err
			}
		}
		return context.Canceled
	}
	n.f.runs = append(n.f.runs, tx.NumOperations())
	return n.Interface.Run(ctx, tx)
}

func (n *withFaults) Check(ctx context.Context, tx *knftables.Transaction) error {
	if err := n.f.check(tx); err != nil {
		return err
	}
	return n.Interface.Check(ctx, tx)
}

// same says that the tables are what a fresh agent would make.
func (l *lab) same(what string) {
	l.t.Helper()
	old := l.proxy
	for _, s := range old.sides {
		s.table.now = func() time.Time { return time.Now().Add(time.Hour) }
		require.NoError(l.t, s.table.sweep(l.t.Context()))
		s.table.now = time.Now
	}
	l.start(Config{ClusterPorts: old.cfg.ClusterPorts})
	l.proxy.cfg.Table = "fresh"
	for _, s := range l.proxy.sides {
		s.name = "fresh"
	}
	l.pass()
	for _, family := range []string{"ip", "ip6"} {
		want, got := netlab.Listing(l.t, family, "fresh"), netlab.Listing(l.t, family, old.cfg.Table)
		for _, list := range []struct {
			text        string
			has, hasNot []string
		}{{"lost", want, got}, {"leaked", got, want}} {
			for _, line := range list.has {
				require.True(l.t, slices.Contains(list.hasNot, line), "%s in %s: %s; %s", list.text, family, line, what)
			}
		}
		require.Equal(l.t, want, got, what)
	}
	require.NoError(l.t, Remove(l.t.Context(), "fresh"))
	l.proxy = old
}

// vandal does to nftables what others may do.
func vandal(t *testing.T, r *rand.Rand, table string) string {
	t.Helper()
	for {
		command := [][]string{
			{"flush", "ruleset"}, {"delete", "table", "ip", table}, {"flush", "table", "ip6", table},
			{"flush", "chain", "ip", table, "services"}, {"add", "table", "ip", "somebody"}, {"add", "chain", "ip", table, "mine"},
			{"add", "rule", "ip", table, "services", "counter"}, {"flush", "chain", "ip", table, "nat-prerouting"},
		}[r.IntN(8)]
		if exec.Command("nft", command...).Run() == nil {
			return strings.Join(command, " ")
		}
	}
}

// TestSequences makes random sequences of changes of the cluster, kills in the midst of
// a transaction, restarts, and other people's changes of nftables. After each the tables are
// what a fresh agent would make.
func TestSequences(t *testing.T) {
	t.Parallel()
	base := rand.Uint64()
	inLab(t, func(l *lab) {
		l.quiet = true
		for n := range *sequences {
			seed := base + uint64(n)
			r := rand.New(rand.NewPCG(seed, 0))
			f := &faults{}
			l.start(faulty(f))
			var story []string
			for range 3 + r.IntN(6) {
				l.store.Update(func(t *feed.Txn) {
					for range 1 + r.IntN(4) {
						story = append(story, netlab.RandomService(r, t))
					}
				})
				switch r.IntN(6) {
				case 0:
					ctx, cancel := context.WithCancel(t.Context())
					f.die, f.after = cancel, r.IntN(2) == 0
					l.proxy.pass(ctx)
					cancel()
					f.die = nil
					fallthrough
				case 1:
					story = append(story, "restart")
					l.start(faulty(f))
				case 2:
					l.pass()
					// What is looked at must have been seen as it was.
					for _, s := range l.proxy.sides {
						s.touched(t.Context(), l.proxy.log)
					}
					story = append(story, vandal(t, r, l.proxy.cfg.Table))
					l.proxy.looked = time.Time{}
				}
				l.pass()
			}
			l.same(fmt.Sprintf("seed %d: %s", seed, strings.Join(story, ", ")))
		}
	})
}

func TestWhatTheKernelRefusesIsOneServicesAlone(t *testing.T) {
	t.Parallel()
	inLab(t, func(l *lab) {
		l.quiet = true
		a, c := l.Pod(2), l.Pod(4)
		a.Serve(8080)
		f := &faults{}
		cfg := faulty(f)
		var events []string
		cfg.Event = func(s *corev1.Service, reason, message string) {
			events = append(events, s.Name+" "+reason+": "+message)
		}
		l.start(cfg)
		l.set(svc("bad", "10.96.0.66"), slice("bad", ep("10.244.1.2")))
		var services []*corev1.Service
		for i := range 20 {
			services = append(services, svc(fmt.Sprintf("good%d", i), fmt.Sprintf("10.96.0.%d", i+1)))
		}
		f.refuse = ". 10.96.0.66 ."
		l.store.Update(func(t *feed.Txn) {
			for _, s := range services {
				t.SetService(s)
				t.SetSlice(slice(s.Name, ep("10.244.1.2")))
			}
			t.SetSlice(slice("bad", ep("10.244.1.2"), ep("10.244.1.3")))
		})
		l.proxy.pass(t.Context())
		require.Equal(t, "pod2 10.244.1.4", c.Ask("tcp", "10.96.0.20:80"))
		require.Equal(t, map[string]int{"pod2": 40}, c.Who("tcp", "10.96.0.66:80"), "it stays as it was")
		require.Len(t, events, 1)
		require.Contains(t, events[0], "bad ServiceRulesRefused: node n1: the kernel refuses the rules of this Service")
		require.Contains(t, events[0], "Cannot allocate memory")
		// It is tried again, and said once.
		l.proxy.looked = time.Time{}
		l.proxy.pass(t.Context())
		require.Len(t, events, 1)
		require.Equal(t, 1, l.proxy.Stats().Families[corev1.IPv4Protocol].Refused)
		// A new agent does not get it in either, and the rest is there.
		l.start(cfg)
		l.proxy.pass(t.Context())
		require.Equal(t, "pod2 10.244.1.4", c.Ask("tcp", "10.96.0.20:80"))
		require.Len(t, events, 2)
		f.refuse = ""
		l.proxy.looked = time.Time{}
		l.proxy.pass(t.Context())
		require.Zero(t, l.proxy.Stats().Families[corev1.IPv4Protocol].Refused)
		l.same("after all")
	})
}

func TestOneChangeIsOneSmallTransaction(t *testing.T) {
	t.Parallel()
	inLab(t, func(l *lab) {
		f := &faults{}
		l.start(faulty(f))
		const many = 300
		l.store.Update(func(t *feed.Txn) {
			for i := range many {
				name := fmt.Sprintf("s%d", i)
				t.SetService(svc(name, fmt.Sprintf("10.96.%d.%d", i/200, 1+i%200)))
				t.SetSlice(slice(name, ep("10.244.1.2"), ep("10.244.1.3"), ep("10.244.2.2")))
			}
		})
		l.pass()
		require.Len(t, f.runs, 2, "one for each family")
		f.runs = nil
		l.proxy.looked = time.Time{}
		l.pass()
		require.Empty(t, f.runs, "nobody else has changed anything")
		l.proxy.looked = time.Time{} // it is time to look at each change, too
		l.store.Update(func(t *feed.Txn) {
			t.SetSlice(slice("s7", ep("10.244.1.2"), ep("10.244.1.3"), ep("10.244.2.9")))
		})
		l.pass()
		require.Equal(t, []int{4}, f.runs, "an endpoint by TCP and UDP, taken out and put in")
		f.runs = nil
		l.store.Update(func(t *feed.Txn) {
			s := svc("s7", "10.96.0.8")
			s.Labels = map[string]string{"a": "b"}
			t.SetService(s)
			t.SetSlice(slice("s7", ep("10.244.1.2"), ep("10.244.1.3"), ep("10.244.2.9"), ep("10.244.2.10", notReady)))
		})
		l.pass()
		require.Empty(t, f.runs, "nothing that matters to packets")
	})
}

// An address that is a Service's own, or that a balancer gave it, is nobody else's, who asked
// for it before by spec.externalIPs.
func TestWhatIsGivenIsNotTaken(t *testing.T) {
	t.Parallel()
	inLab(t, func(l *lab) {
		thief, shop, c := l.Pod(2), l.Pod(3), l.Pod(4)
		thief.Serve(8080)
		shop.Serve(8080)
		l.start(Config{})
		made := func(at int64) option {
			return func(s *corev1.Service) { s.CreationTimestamp = metav1.Unix(at, 0) }
		}
		all := []string{"10.96.0.2:80", "203.0.113.7:80"}
		is := func(who string) {
			t.Helper()
			for _, at := range all {
				require.Contains(t, c.Ask("tcp", at), who, at)
			}
			l.same(who)
		}
		l.set(svc("thief", "10.96.0.1", externalIPs("10.96.0.2", "203.0.113.7"), made(1)), slice("thief", ep("10.244.1.2")))
		is("pod2 ")
		l.set(svc("shop", "10.96.0.2", balancer("203.0.113.7"), made(2)), slice("shop", ep("10.244.1.3")))
		is("pod3 ")
		l.set(svc("thief", "10.96.0.1", externalIPs("203.0.113.7", "10.96.0.2"), made(1)))
		is("pod3 ")
		// The right to it changes, and what is asked for does not.
		l.set(svc("shop", "10.96.0.2", externalIPs("203.0.113.7"), made(2)))
		require.Contains(t, c.Ask("tcp", "203.0.113.7:80"), "pod2 ")
		require.Contains(t, c.Ask("tcp", "10.96.0.2:80"), "pod3 ")
		l.same("older")
		l.set(svc("shop", "10.96.0.2", balancer("203.0.113.7"), made(2)))
		is("pod3 ")
		l.store.Update(func(t *feed.Txn) { t.RemoveService(feed.Name{Namespace: "default", Name: "shop"}) })
		l.pass()
		is("pod2 ")
	})
}

// Two Services that ask for one address: the older has it, and the other when it goes.
func TestTwoServicesOfOneAddress(t *testing.T) {
	t.Parallel()
	inLab(t, func(l *lab) {
		a, b, c := l.Pod(2), l.Pod(3), l.Pod(4)
		a.Serve(8080)
		b.Serve(8080)
		var events []string
		l.start(Config{Event: func(s *corev1.Service, reason, message string) {
			events = append(events, s.Name+" "+reason+": "+message)
		}})
		made := func(at int64) option {
			return func(s *corev1.Service) { s.CreationTimestamp = metav1.Unix(at, 0) }
		}
		l.set(svc("young", "10.96.0.1", externalIPs("203.0.113.7"), made(2)), slice("young", ep("10.244.1.2")))
		require.Contains(t, c.Ask("tcp", "203.0.113.7:80"), "pod2 ")
		l.set(svc("old", "10.96.0.2", externalIPs("203.0.113.7"), made(1)), slice("old", ep("10.244.1.3")))
		require.Contains(t, c.Ask("tcp", "203.0.113.7:80"), "pod3 ")
		require.Equal(t, []string{"young ServiceAddressTaken: 203.0.113.7:80/tcp is of Service default/old, which is older or has more right to it: nothing is sent to this one there; remove it from spec.externalIPs or status.loadBalancer of one of them"}, events)
		require.Contains(t, c.Ask("tcp", "10.96.0.1:80"), "pod2 ")
		l.same("both")
		l.store.Update(func(t *feed.Txn) { t.RemoveService(feed.Name{Namespace: "default", Name: "old"}) })
		l.pass()
		require.Contains(t, c.Ask("tcp", "203.0.113.7:80"), "pod2 ")
		l.same("one")
	})
}
