package address

import (
	"context"
	"encoding/binary"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os/exec"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/mdlayher/ndp"
	"github.com/mdlayher/packet"
	"github.com/stretchr/testify/require"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"timonel/network/feed"
	pb "timonel/proto/timonel/v1"
	"timonel/test/needs"
)

// lan is machines on one bridge, each in a network namespace. The test's goroutine is in
// the bridge's.
type lan struct {
	t      *testing.T
	number int
	ended  sync.WaitGroup
	events chan string
	stops  []func()
}

type machine struct {
	announcer *Announcer
	l         *lan
	ns        netns.NsHandle
	name      string
	mac       mac
	ip        string
	store     *feed.Store
	stop      func()
}

func inLAN(t *testing.T, body func(l *lan)) {
	t.Helper()
	needs.Root(t, "makes network namespaces")
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread() // and never unlocked: the thread ends, and its namespace
		l := &lan{t: t, events: make(chan string, 64)}
		defer func() {
			for _, stop := range l.stops {
				stop()
			}
			l.ended.Wait()
		}()
		require.NoError(t, unix.Unshare(unix.CLONE_NEWNET))
		require.NoError(t, netlink.LinkAdd(&netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: "br0"}}))
		bridge, err := netlink.LinkByName("br0")
		require.NoError(t, err)
		require.NoError(t, netlink.LinkSetUp(bridge))
		body(l)
	}()
	<-done
}

// machine adds one to the bridge.
func (l *lan) machine() *machine {
	l.number++
	own, err := netns.Get()
	require.NoError(l.t, err)
	defer own.Close()
	ns, err := netns.New() // which is the thread's now
	require.NoError(l.t, err)
	require.NoError(l.t, netns.Set(own))
	m := &machine{l: l, ns: ns, name: fmt.Sprintf("m%d", l.number), ip: fmt.Sprintf("192.0.2.%d", l.number), stop: func() {}}
	m.mac = mac{2, 0, 0, 0, 1, byte(l.number)}
	require.NoError(l.t, netlink.LinkAdd(&netlink.Veth{
		LinkAttrs: netlink.LinkAttrs{Name: m.name}, PeerName: "eth0", PeerNamespace: netlink.NsFd(ns), PeerHardwareAddr: net.HardwareAddr(m.mac[:]),
	}))
	bridge, err := netlink.LinkByName("br0")
	require.NoError(l.t, err)
	link, err := netlink.LinkByName(m.name)
	require.NoError(l.t, err)
	require.NoError(l.t, netlink.LinkSetMaster(link, bridge))
	require.NoError(l.t, netlink.LinkSetUp(link))
	m.in(func() {
		eth, err := netlink.LinkByName("eth0")
		require.NoError(l.t, err)
		m.has(m.ip + "/24")
		m.has(fmt.Sprintf("2001:db8::%d/64", l.number))
		require.NoError(l.t, netlink.LinkSetUp(eth))
	})
	return m
}

// in runs f in the machine's namespace.
func (m *machine) in(f func()) {
	own, err := netns.Get()
	require.NoError(m.l.t, err)
	defer own.Close()
	require.NoError(m.l.t, netns.Set(m.ns))
	defer func() { require.NoError(m.l.t, netns.Set(own)) }()
	f()
}

// has gives the machine's own kernel an address.
func (m *machine) has(text string) {
	eth, err := netlink.LinkByName("eth0")
	require.NoError(m.l.t, err)
	a, err := netlink.ParseAddr(text)
	require.NoError(m.l.t, err)
	a.Flags = unix.IFA_F_NODAD
	require.NoError(m.l.t, netlink.AddrAdd(eth, a))
}

// announce runs an agent's part on the machine, until the test ends or stop.
func (m *machine) announce() {
	if m.store == nil {
		m.store = feed.NewStore(m.name)
		m.store.Update(func(t *feed.Txn) { t.SetSynced() })
	}
	a, err := New(Config{
		Node: m.name, NodeIPs: []netip.Addr{netip.MustParseAddr(m.ip)}, Store: m.store, Logger: slog.New(slog.DiscardHandler),
		Event: func(s *corev1.Service, reason, message string) { m.l.events <- s.Name + " " + reason + ": " + message },
	})
	require.NoError(m.l.t, err)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	m.l.ended.Go(func() {
		defer close(done)
		runtime.LockOSThread() // and never unlocked
		if err := netns.Set(m.ns); err != nil {
			panic(err)
		}
		_ = a.Run(ctx)
	})
	m.announcer = a
	m.stop = func() { cancel(); <-done }
	m.l.stops = append(m.l.stops, m.stop)
}

// told is what the controllers say to the machine.
func (m *machine) told(ip, holder string, number uint64) {
	m.store.Update(func(t *feed.Txn) {
		t.SetAddress(&pb.AddressHolder{Address: ip, NodeName: holder, Number: number})
		t.SetService(&corev1.Service{
			ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: "web"},
			Status:     corev1.ServiceStatus{LoadBalancer: corev1.LoadBalancerStatus{Ingress: []corev1.LoadBalancerIngress{{IP: ip}}}},
		})
	})
}

// client asks who has an address, again and again, each time as somebody else, so that it
// is known which question was answered.
type client struct {
	l     *lan
	mac   mac
	v4    bool
	conn  *packet.Conn
	mu    sync.Mutex
	asked uint16
	by    map[uint16]map[mac]bool // who answered a question
}

func (l *lan) client(ip netip.Addr) *client {
	m := l.machine()
	c := &client{l: l, mac: m.mac, v4: ip.Is4(), by: map[uint16]map[mac]bool{}}
	m.in(func() {
		eth, err := net.InterfaceByName("eth0")
		require.NoError(l.t, err)
		kind := unix.ETH_P_ARP
		if !c.v4 {
			kind = unix.ETH_P_IPV6
		}
		c.conn, err = packet.Listen(eth, packet.Raw, kind, nil)
		require.NoError(l.t, err)
	})
	l.stops = append(l.stops, func() { c.conn.Close() })
	l.ended.Go(func() {
		buffer := make([]byte, 2048)
		for {
			n, _, err := c.conn.ReadFrom(buffer)
			if err != nil {
				return
			}
			c.heard(buffer[:n])
		}
	})
	return c
}

// heard takes an answer: the question is in the address that it goes to.
func (c *client) heard(raw []byte) {
	at, limit := headerBytes+24+2, headerBytes+arpBytes
	if !c.v4 {
		at, limit = headerBytes+24+14, headerBytes+ipv6Bytes
	}
	if mac(raw[:6]) != c.mac || len(raw) < limit {
		return
	}
	for _, m := range parse(raw) {
		if m.verb == claims {
			c.mu.Lock()
			q := binary.BigEndian.Uint16(raw[at:])
			if c.by[q] == nil {
				c.by[q] = map[mac]bool{}
			}
			c.by[q][m.from] = true
			c.mu.Unlock()
		}
	}
}

// ask asks once and returns the question's number.
func (c *client) ask(ip netip.Addr) uint16 {
	c.mu.Lock()
	c.asked++
	q := c.asked
	c.mu.Unlock()
	var raw []byte
	if c.v4 {
		raw = renderARP(message{verb: probes, ip: ip, from: c.mac}, mac{})[0]
		copy(raw[headerBytes+14:], []byte{192, 0, byte(q >> 8), byte(q)})
		raw = raw[:headerBytes+arpBytes]
	} else {
		source := netip.MustParseAddr("2001:db8::").As16()
		binary.BigEndian.PutUint16(source[14:], q)
		raw = solicit(c.mac, netip.AddrFrom16(source), ip)
	}
	_, err := c.conn.WriteTo(raw, &packet.Addr{HardwareAddr: raw[:6]})
	require.NoError(c.l.t, err)
	return q
}

// solicit is a question by NDP.
func solicit(from mac, source, target netip.Addr) []byte {
	group, err := ndp.SolicitedNodeMulticast(target)
	if err != nil {
		panic(err)
	}
	raw, err := ndp.MarshalMessageChecksum(&ndp.NeighborSolicitation{TargetAddress: target, Options: []ndp.Option{
		&ndp.LinkLayerAddress{Direction: ndp.Source, Addr: from[:]},
	}}, source, group)
	if err != nil {
		panic(err)
	}
	end := group.As16()
	out := header(mac{0x33, 0x33, end[12], end[13], end[14], end[15]}, from, unix.ETH_P_IPV6)
	out = append(out, 0x60, 0, 0, 0)
	out = binary.BigEndian.AppendUint16(out, uint16(len(raw)))
	out = append(out, icmpv6, 255)
	out = append(append(out, source.AsSlice()...), group.AsSlice()...)
	return append(out, raw...)
}

func (c *client) answers(q uint16) (out []mac) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for m := range c.by[q] {
		out = append(out, m)
	}
	return out
}

// until asks until the machine answers, and nobody else ever does for the same question.
func (c *client) until(ip netip.Addr, m *machine) time.Duration {
	began := time.Now()
	for time.Since(began) < 30*time.Second {
		q := c.ask(ip)
		for wait := 0; wait < 20 && len(c.answers(q)) == 0; wait++ {
			time.Sleep(5 * time.Millisecond) // what is not answered is asked again
		}
		if by := c.answers(q); len(by) == 1 && by[0] == m.mac {
			return time.Since(began)
		}
	}
	c.l.t.Fatalf("%s does not answer for %s", m.name, ip)
	return 0
}

// onlyOne says that no question was answered by two.
func (c *client) onlyOne() {
	c.mu.Lock()
	defer c.mu.Unlock()
	for q, by := range c.by {
		require.LessOrEqual(c.l.t, len(by), 1, "question %d was answered by %v", q, by)
	}
}

// TestAnAddressMoves on a real segment: it is taken, moved while the old holder was not
// told, given back after that one's agent is dead, and kept by nobody else meanwhile.
func TestAnAddressMoves(t *testing.T) {
	t.Parallel()
	for _, text := range []string{"192.0.2.200", "2001:db8::200"} {
		t.Run(text, func(t *testing.T) {
			t.Parallel()
			inLAN(t, func(l *lan) {
				ip := netip.MustParseAddr(text)
				one, two, c := l.machine(), l.machine(), l.client(ip)
				one.announce()
				two.announce()
				one.told(text, one.name, 5)
				two.told(text, one.name, 5)
				c.until(ip, one)

				two.told(text, two.name, 9) // nobody tells one
				t.Logf("moved in %s", c.until(ip, two))
				q := make([]uint16, 100)
				for i := range q {
					q[i] = c.ask(ip)
				}
				c.until(ip, two)
				for _, q := range q {
					require.NotContains(t, c.answers(q), one.mac)
				}

				two.stop()
				one.told(text, one.name, 12)
				c.until(ip, one)
				two.announce() // it comes back and believes what it knew
				q = q[:0]
				for range 200 {
					q = append(q, c.ask(ip))
					time.Sleep(3 * time.Millisecond) // longer than it takes to take an address
				}
				c.until(ip, one)
				for _, q := range q {
					require.NotContains(t, c.answers(q), two.mac)
				}
				one.told(text, "", 13)
				two.told(text, two.name, 14)
				c.until(ip, two)
				c.onlyOne()
			})
		})
	}
}

// TestAnotherMachineOnTheSegment has the address: it keeps it, users are told, and it is
// taken when that machine has gone.
func TestAnotherMachineOnTheSegment(t *testing.T) {
	t.Parallel()
	for _, text := range []string{"192.0.2.200", "2001:db8::200"} {
		t.Run(text, func(t *testing.T) {
			t.Parallel()
			inLAN(t, func(l *lan) {
				ip := netip.MustParseAddr(text)
				node, other, c := l.machine(), l.machine(), l.client(ip)
				bits := "/24"
				if ip.Is6() {
					bits = "/64"
				}
				other.in(func() { other.has(text + bits) })
				c.until(ip, other)
				node.announce()
				node.told(text, node.name, 5)
				select {
				case event := <-l.events:
					require.True(t, strings.HasPrefix(event, "web AddressInUse: node "+node.name), event)
					require.Contains(t, event, other.mac.String())
				case <-time.After(30 * time.Second):
					t.Fatal("nobody is told")
				}
				c.until(ip, other)
				other.in(func() { require.NoError(t, exec.Command("ip", "link", "set", "eth0", "down").Run()) })
				c.until(ip, node)
				c.onlyOne()
			})
		})
	}
}

// TestALinkThatWasDown is asked again before it is answered on.
func TestALinkThatWasDown(t *testing.T) {
	t.Parallel()
	inLAN(t, func(l *lan) {
		ip := netip.MustParseAddr("192.0.2.200")
		one, two, c := l.machine(), l.machine(), l.client(ip)
		one.announce()
		two.announce()
		one.told(ip.String(), one.name, 5)
		c.until(ip, one)
		require.NoError(t, exec.Command("ip", "link", "set", one.name, "down").Run()) // its cable
		two.told(ip.String(), two.name, 6)
		c.until(ip, two)
		require.Eventually(t, func() bool { return one.announcer.held.Load() == 0 }, 30*time.Second, time.Millisecond)
		require.NoError(t, exec.Command("ip", "link", "set", one.name, "up").Run())
		for range 200 {
			q := c.ask(ip)
			time.Sleep(5 * time.Millisecond)
			require.NotContains(t, c.answers(q), one.mac)
		}
		c.until(ip, two)
		c.onlyOne()
	})
}
