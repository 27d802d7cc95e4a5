package node

import (
	"bytes"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"

	"timonel/network/feed"
	"timonel/network/netlab"
	"timonel/test/needs"
)

var (
	sequences = flag.Int("sequences", 32, "how many sequences TestSequences makes in all")
	seedFlag  = flag.Uint64("seed", 0, "the first of its seeds; 0: any")
)

// nodes are how many nodes go through sequences at a time.
const nodes = 4

// TestSequences makes random sequences of changes of the cluster (Services, slices, nodes,
// policies, pods, names, balancers' addresses) on a node whose agent is killed and started at
// any moment, whose kernel refuses rules, and where others change nftables, routes and
// addresses. After each, rules, routes, neighbours, entries, addresses and conntrack are what a
// fresh agent makes on a fresh node, what is somebody else's is as it was, and pods
// reach each other if the API's words about the objects say so.
func TestSequences(t *testing.T) {
	t.Parallel()
	needs.Root(t, "makes network namespaces")
	if _, err := os.Stat("/usr/lib/cni/bridge"); err != nil {
		needs.Skip(t, "the CNI plugins are not installed")
	}
	base := *seedFlag
	if base == 0 {
		base = rand.Uint64()
	}
	for i := range nodes {
		t.Run(fmt.Sprint("seed ", base+uint64(i)), func(t *testing.T) {
			t.Parallel()
			netlab.In(t, func(old *netlab.Node) {
				netlab.In(t, func(fresh *netlab.Node) {
					s := &story{
						t: t, seed: base + uint64(i), random: rand.New(rand.NewPCG(base+uint64(i), 1)), world: newWorld(base + uint64(i)), store: feed.NewStore("n1"),
						old: newMachine(t, old), fresh: newMachine(t, fresh),
					}
					s.run((*sequences + nodes - 1 - i) / nodes)
				})
			})
		})
	}
}

// machine is a node with pods, and the process of an agent.
type machine struct {
	t     *testing.T
	l     *netlab.Node
	hosts map[slot]*netlab.Host
	afar  *netlab.Host // a client outside
	dir   string
	cmd   *exec.Cmd
	in    io.WriteCloser
	out   *bytes.Buffer
}

// ports are those at which pods answer.
var ports = []int{53, 80, 8080}

func newMachine(t *testing.T, l *netlab.Node) *machine {
	m := &machine{t: t, l: l, hosts: map[slot]*netlab.Host{}, dir: t.TempDir()}
	t.Cleanup(m.kill)
	l.Self().Do(func() { m.build() })
	nft, err := exec.LookPath("nft")
	l.Must(err)
	l.Must(os.Mkdir(filepath.Join(m.dir, "bin"), 0o700))
	// This nft does not take what has one of the words in a file.
	l.Must(os.WriteFile(filepath.Join(m.dir, "bin", "nft"), fmt.Appendf(nil, `#!/bin/sh
[ -s %[1]s/refuse ] || exec %[2]s "$@"
text=$(cat)
case "$text" in *"$(cat %[1]s/refuse)"*) echo 'Error: Could not process rule: Cannot allocate memory' >&2; exit 1;; esac
printf '%%s\n' "$text" | %[2]s "$@"
`, m.dir, nft), 0o700))
	return m
}

func (m *machine) build() {
	// Time must not take away what the agent has to.
	for _, name := range []string{"udp_timeout", "udp_timeout_stream"} {
		m.l.Must(os.WriteFile("/proc/sys/net/netfilter/nf_conntrack_"+name, []byte("3600"), 0o644))
	}
	m.afar = m.l.Outside()
	n2 := []string{"198.51.100.2/24", "2001:db8:2::2/64"}
	for _, s := range slots {
		if s.node == 2 {
			for _, ip := range s.addresses() {
				n2 = append(n2, netip.PrefixFrom(ip, ip.BitLen()).String())
			}
		}
	}
	other := m.l.Attach("n2", "", n2, []string{"198.51.100.1", "2001:db8:2::1"})
	m.l.Address("v-n2", "198.51.100.1/24", "2001:db8:2::1/64")
	for _, s := range slots {
		if s.node == 2 {
			m.hosts[s] = other
			continue
		}
		h := m.l.Pod(s.n)
		m.hosts[s] = h
		h.Do(func() {
			link, err := netlink.LinkByName("p-" + h.Name)
			m.l.Must(err)
			m.l.Must(netlink.LinkSetHardwareAddr(link, macOf(s)))
		})
	}
}

// serve makes all pods answer.
func (m *machine) serve() {
	for _, s := range slots {
		for _, ip := range s.addresses() {
			for _, port := range ports {
				m.hosts[s].Serve(port, ip.String())
			}
		}
	}
}

// start starts an agent that knows the world as it is.
func (m *machine) start(seed uint64, steps int64) {
	m.t.Helper()
	m.l.Self().Do(func() {
		m.out = &bytes.Buffer{}
		cmd := exec.Command(os.Args[0])
		cmd.Env = append(os.Environ(), fmt.Sprint(envSeed, "=", seed), fmt.Sprint(envSteps, "=", steps), envDir+"="+m.dir, "PATH="+filepath.Join(m.dir, "bin")+":"+os.Getenv("PATH"))
		cmd.Stdout, cmd.Stderr = m.out, m.out
		var err error
		m.in, err = cmd.StdinPipe()
		m.l.Must(err)
		m.l.Must(cmd.Start())
		m.cmd = cmd
	})
}

// kill ends the agent as a machine does that has no memory left.
func (m *machine) kill() {
	if m.cmd != nil {
		_ = m.cmd.Process.Kill()
		_ = m.cmd.Wait()
		m.cmd = nil
	}
}

// tables are those of the agent.
var agentTables = [][2]string{{"ip", servicesTable}, {"ip6", servicesTable}, {"inet", policyTable}, {"bridge", policyTable}, {"inet", podsTable}, {"inet", hostPortsTable}}

// state is all that the agent made in the kernel but conntrack's entries.
func (m *machine) state() (out []string) {
	m.l.Self().Do(func() {
		for _, table := range agentTables {
			for _, line := range netlab.Listing(m.t, table[0], table[1]) {
				out = append(out, strings.Join(table[:], " ")+" "+line)
			}
		}
		out = append(out, strings.Split(netlab.Routes(m.t, "timonel-vxlan"), "\n")...)
		lo, err := exec.Command("ip", "-o", "addr", "show", "dev", "lo").Output()
		m.l.Must(err)
		out = append(out, string(lo))
	})
	return out
}

// difference is what one has and the other has not.
func difference(a, b []string) (out []string) {
	for _, line := range a {
		if !slices.Contains(b, line) {
			out = append(out, line)
		}
	}
	return out
}

// story is the life of one node.
type story struct {
	t          *testing.T
	seed       uint64
	random     *rand.Rand
	world      *world
	store      *feed.Store
	old, fresh *machine
	words      []string // what happened
	strangers  []string // somebody else's table
}

func (s *story) run(sequences int) {
	s.store.Update(func(t *feed.Txn) { s.world.tell(t) })
	s.old.serve()
	s.old.start(s.seed, 0)
	for n := range sequences {
		s.words = nil
		for range 1 + s.random.IntN(4) {
			s.store.Update(s.world.step)
			if _, err := io.WriteString(s.old.in, "step\n"); err != nil {
				s.t.Fatalf("the agent has ended: %v: %s", err, s.old.out)
			}
			s.flows()
			switch s.random.IntN(8) {
			case 0, 1:
				s.words = append(s.words, s.vandal())
			case 2:
				word := []string{" . 10.96.0.3 . ", "203.0.113.7", "10.244.2.", "policies"}[s.random.IntN(4)]
				s.words = append(s.words, "refuse "+word)
				s.old.l.Must(os.WriteFile(filepath.Join(s.old.dir, "refuse"), []byte(word), 0o600))
			case 3, 4, 5:
				s.words = append(s.words, "restart")
				s.restart()
			}
		}
		if os.Remove(filepath.Join(s.old.dir, "refuse")) == nil {
			s.restart() // what was refused is tried again after a while, by a new agent at once
		}
		s.same(fmt.Sprintf("seed %d, sequence %d, step %d: %s", s.seed, n, s.world.steps, strings.Join(s.words, ", ")))
	}
}

// restart kills the agent a moment after it was told something, and starts another.
func (s *story) restart() {
	time.Sleep(time.Duration(s.random.IntN(80)) * time.Millisecond) // any moment is right
	s.old.kill()
	s.old.start(s.seed, s.world.steps)
}

// vandal does what others may do to a node.
func (s *story) vandal() (word string) {
	const stranger = "add table ip stranger; add chain ip stranger c { type filter hook forward priority 10; }; add rule ip stranger c ip saddr 203.0.113.250 drop"
	s.old.l.Self().Do(func() {
		commands := []string{
			"nft flush ruleset", "nft delete table ip " + servicesTable, "nft flush table ip6 " + servicesTable, "nft flush chain ip " + servicesTable + " services",
			"nft add chain ip " + servicesTable + " mine", "nft add rule ip " + servicesTable + " services counter", "nft delete table inet " + policyTable,
			"nft flush chain bridge " + policyTable + " from-pods", "nft add chain inet " + policyTable + " mine", "nft delete table inet " + podsTable, "nft delete table inet " + hostPortsTable, "nft flush chain inet " + hostPortsTable + " ports", "nft flush chain inet " + podsTable + " postrouting",
			"ip route flush proto 157", "ip -6 route flush proto 157", "ip link del timonel-vxlan", "ip neigh flush dev timonel-vxlan nud permanent",
			"ip addr del 10.96.0.10/32 dev lo", "ip link set timonel-vxlan mtu 1300",
		}
		word = commands[s.random.IntN(len(commands))]
		_ = exec.Command("sh", "-c", word).Run() // there may be no such thing
		if s.strangers == nil || word == commands[0] {
			s.old.l.Must(exec.Command("nft", stranger).Run())
			s.strangers = netlab.Listing(s.t, "ip", "stranger")
		}
	})
	return word
}

// flows lets pods, another node and a client outside, for whom no policies hold, send to Services by UDP, which
// conntrack remembers.
func (s *story) flows() {
	for _, svc := range s.store.View().Services() {
		for _, h := range []*netlab.Host{s.old.afar, s.old.hosts[slots[s.random.IntN(len(slots))]]} {
			h.Do(func() {
				if c, err := netlab.Dial("udp", netip.Addr{}, svc.Spec.ClusterIP+":80", netlab.Impatience); err == nil {
					_, _ = c.Write([]byte("hello\n")) // whoever hears it
					_ = c.Close()
				}
			})
		}
	}
}

// patience is for a node to come to rest, however busy the machine is.
const patience = 60 * time.Second

// same says that the node is what a fresh one is, and does what it should.
func (s *story) same(what string) {
	s.fresh.kill()
	s.fresh.l.Self().Do(func() {
		s.fresh.l.Must(exec.Command("sh", "-c", "nft flush ruleset; ip route flush proto 157; ip -6 route flush proto 157; ip link del timonel-vxlan 2>/dev/null; ip addr flush dev lo; ip addr add 127.0.0.1/8 dev lo; ip addr add ::1/128 dev lo; true").Run())
	})
	s.fresh.l.Must(os.RemoveAll(filepath.Join(s.fresh.dir, "state")))
	s.fresh.l.Must(os.RemoveAll(filepath.Join(s.fresh.dir, "dns.json")))
	s.fresh.start(s.seed, s.world.steps)
	var lost, leaked, flows []string
	equal := 0 // times in a row: one might be of two that have done as little
	for end := time.Now().Add(patience); ; time.Sleep(300 * time.Millisecond) {
		want, got := s.fresh.state(), s.old.state()
		lost, leaked, flows = difference(want, got), difference(got, want), s.stale()
		equal++
		if !slices.Equal(want, got) || len(flows) > 0 || slices.ContainsFunc(want, func(line string) bool { return strings.Contains(line, "no table") }) {
			equal = 0
		}
		if equal == 2 {
			break
		}
		if time.Now().After(end) {
			s.t.Fatalf("%s:\nlost: %s\nleaked: %s\nflows: %s\nthe agent says: %s", what, strings.Join(lost, "\n"), strings.Join(leaked, "\n"), strings.Join(flows, "\n"), s.old.out)
		}
	}
	if s.strangers != nil {
		s.old.l.Self().Do(func() { require.Equal(s.t, s.strangers, netlab.Listing(s.t, "ip", "stranger"), what) })
	}
	s.packets(what)
	s.flows() // of all Services that there are, which the next sequence changes
}

// stale are conntrack's entries of UDP that lead from an address of a Service to none of its
// endpoints.
func (s *story) stale() (out []string) {
	view := s.store.View()
	leads := map[string]bool{}
	for name, svc := range view.Services() {
		for _, slice := range view.Slices(name) {
			for _, e := range slice.Endpoints {
				if e.Conditions.Serving != nil && *e.Conditions.Serving {
					for _, to := range slices.Concat(svc.Spec.ClusterIPs, svc.Spec.ExternalIPs) {
						leads[to+" "+e.Addresses[0]] = true
					}
				}
			}
		}
	}
	s.old.l.Self().Do(func() {
		list, err := netlink.ConntrackTableList(netlink.ConntrackTable, unix.AF_INET)
		s.old.l.Must(err)
		for _, f := range list {
			if f.Forward.Protocol != unix.IPPROTO_UDP || f.Forward.DstPort != 80 || !strings.HasPrefix(f.Forward.DstIP.String(), "10.96.0.") || f.Reverse.SrcIP.Equal(f.Forward.DstIP) {
				continue
			}
			if !leads[f.Forward.DstIP.String()+" "+f.Reverse.SrcIP.String()] {
				out = append(out, f.String())
			}
		}
	})
	return out
}

// packets asks some pods from others, and compares with what the objects say.
func (s *story) packets(what string) {
	var live []slot
	for _, at := range slots {
		if s.world.pods[at] != nil {
			live = append(live, at)
		}
	}
	if len(live) == 0 {
		return
	}
	var all sync.WaitGroup
	wrong := make(chan string, 8)
	for range cap(wrong) {
		from, to := live[s.random.IntN(len(live))], live[s.random.IntN(len(live))]
		if from.node == 2 && to.node == 2 {
			continue
		}
		family, port := s.random.IntN(2), ports[s.random.IntN(len(ports))]
		protocol := []corev1.Protocol{corev1.ProtocolTCP, corev1.ProtocolUDP}[s.random.IntN(2)]
		may := s.world.may(from, to, family, protocol, uint16(port))
		all.Go(func() {
			got := s.ask(from, to, family, strings.ToLower(string(protocol)), port, may)
			if got != may {
				wrong <- fmt.Sprintf("%v to %v by %s %d, family %d: the objects say %v, packets say %v", from, to, protocol, port, family, may, got)
			}
		})
	}
	all.Wait()
	if len(wrong) > 0 {
		s.t.Fatalf("%s: %s", what, <-wrong)
	}
}

// ask says whether a pod reaches another, and is patient if it should.
func (s *story) ask(from, to slot, family int, network string, port int, expect bool) (reached bool) {
	d := netlab.Impatience
	if expect {
		d = netlab.Patience
	}
	s.old.hosts[from].Do(func() {
		for end := time.Now().Add(d); ; {
			c, err := netlab.Dial(network, from.addresses()[family], netip.AddrPortFrom(to.addresses()[family], uint16(port)).String(), time.Until(end))
			if err != nil {
				return
			}
			answer := netlab.Talk(c, min(time.Until(end), 2*time.Second))
			_ = c.Close()
			if reached = strings.Contains(answer, " "); reached || network == "tcp" || time.Now().After(end) {
				return // a packet of UDP may be lost
			}
		}
	})
	return reached
}
