// Package netlab is a node in network namespaces, with pods on a bridge, another node and a
// client outside, for tests that send packets.
package netlab

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os/exec"
	"runtime"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"timonel/test/needs"
)

// A Node is a node in a network namespace of its own, with pods on a bridge and a client
// outside, each in one too. The test's goroutine is the node.
type Node struct {
	t    testing.TB
	node netns.NsHandle
}

// Addresses of the node and of a client outside.
const (
	NodeIP, NodeIP6       = "192.0.2.1", "2001:db8::1"
	OutsideIP, OutsideIP6 = "192.0.2.9", "2001:db8::9"
)

// In runs body as the node. Threads that were in a namespace end with it.
func In(t testing.TB, body func(l *Node)) {
	t.Helper()
	needs.Root(t, "makes network namespaces")
	if _, err := exec.LookPath("nft"); err != nil {
		needs.Skip(t, "nft is not installed")
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread() // and never unlocked
		l := &Node{t: t}
		l.Must(unix.Unshare(unix.CLONE_NEWNET))
		var err error
		l.node, err = netns.Get()
		l.Must(err)
		defer l.node.Close()
		lo, err := netlink.LinkByName("lo")
		l.Must(err)
		l.Must(netlink.LinkSetUp(lo))
		for path, value := range map[string]string{
			"net/ipv4/ip_forward": "1", "net/ipv6/conf/all/forwarding": "1", "net/ipv6/conf/default/accept_dad": "0",
		} {
			l.Must(exec.Command("sh", "-c", "echo "+value+" > /proc/sys/"+path).Run())
		}
		bridge := &netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: "br0"}}
		l.Must(netlink.LinkAdd(bridge))
		l.Address("br0", "10.244.1.1/24", "fd00:1::1/64")
		l.Must(netlink.LinkSetUp(bridge))
		// What is addressed to a Service and is not translated needs a route to be rejected.
		wan := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "wan"}, PeerName: "wan-peer"}
		l.Must(netlink.LinkAdd(wan))
		peer, err := netlink.LinkByName("wan-peer")
		l.Must(err)
		l.Must(netlink.LinkSetUp(peer))
		l.Address("wan", "203.0.113.129/25", "2001:db8:ffff::1/64")
		l.Must(netlink.LinkSetUp(wan))
		for _, gw := range []string{"203.0.113.130", "2001:db8:ffff::2"} {
			l.Must(netlink.RouteAdd(&netlink.Route{Gw: net.ParseIP(gw), LinkIndex: wan.Attrs().Index}))
		}
		body(l)
	}()
	<-done
}

// Must ends the test for an error.
func (l *Node) Must(err error) {
	if err != nil {
		l.t.Helper()
		require.NoError(l.t, err)
	}
}

// Address gives a link of this namespace addresses.
func (l *Node) Address(link string, addresses ...string) {
	dev, err := netlink.LinkByName(link)
	l.Must(err)
	for _, text := range addresses {
		a, err := netlink.ParseAddr(text)
		l.Must(err)
		a.Flags = unix.IFA_F_NODAD
		l.Must(netlink.AddrAdd(dev, a))
	}
}

// A Host is somebody with a network namespace.
type Host struct {
	l    *Node
	Name string
	ns   netns.NsHandle
}

// Attach makes a host on a link of the node; bridge: on which bridge, or none.
func (l *Node) Attach(name, bridge string, addresses, gateways []string) *Host {
	l.t.Helper()
	veth := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "v-" + name}, PeerName: "p-" + name}
	l.Must(netlink.LinkAdd(veth))
	ns, err := netns.New()
	l.Must(err)
	l.Must(netns.Set(l.node))
	l.t.Cleanup(func() { ns.Close() })
	peer, err := netlink.LinkByName("p-" + name)
	l.Must(err)
	l.Must(netlink.LinkSetNsFd(peer, int(ns)))
	if bridge != "" {
		br, err := netlink.LinkByName(bridge)
		l.Must(err)
		l.Must(netlink.LinkSetMaster(veth, br))
		l.Must(netlink.LinkSetHairpin(veth, true))
	}
	l.Must(netlink.LinkSetUp(veth))
	h := &Host{l, name, ns}
	h.Do(func() {
		lo, err := netlink.LinkByName("lo")
		l.Must(err)
		l.Must(netlink.LinkSetUp(lo))
		l.Must(exec.Command("sh", "-c", "echo 0 > /proc/sys/net/ipv6/conf/default/accept_dad").Run())
		l.Address("p-"+name, addresses...)
		dev, err := netlink.LinkByName("p-" + name)
		l.Must(err)
		l.Must(netlink.LinkSetUp(dev))
		for _, gw := range gateways {
			l.Must(netlink.RouteAdd(&netlink.Route{Gw: net.ParseIP(gw), LinkIndex: dev.Attrs().Index}))
		}
	})
	return h
}

// Pod makes a pod with the addresses of its number.
func (l *Node) Pod(n int) *Host {
	return l.Attach(fmt.Sprintf("pod%d", n), "br0", []string{fmt.Sprintf("10.244.1.%d/24", n), fmt.Sprintf("fd00:1::%d/64", n)}, []string{"10.244.1.1", "fd00:1::1"})
}

// Outside makes a client that is not of the cluster.
func (l *Node) Outside() *Host {
	l.t.Helper()
	h := l.Attach("out", "", []string{OutsideIP + "/24", OutsideIP6 + "/64"}, []string{NodeIP, NodeIP6})
	l.Address("v-out", NodeIP+"/24", NodeIP6+"/64")
	return h
}

// OtherNode makes another node with a pod of its own.
func (l *Node) OtherNode() *Host {
	l.t.Helper()
	h := l.Attach("n2", "", []string{"198.51.100.2/24", "2001:db8:2::2/64", "10.244.2.2/32", "fd00:2::2/128"}, []string{"198.51.100.1", "2001:db8:2::1"})
	l.Address("v-n2", "198.51.100.1/24", "2001:db8:2::1/64")
	link, err := netlink.LinkByName("v-n2")
	l.Must(err)
	for dst, gw := range map[string]string{"10.244.2.0/24": "198.51.100.2", "fd00:2::/64": "2001:db8:2::2"} {
		_, n, err := net.ParseCIDR(dst)
		l.Must(err)
		l.Must(netlink.RouteAdd(&netlink.Route{Dst: n, Gw: net.ParseIP(gw), LinkIndex: link.Attrs().Index}))
	}
	return h
}

// Do runs f as the host.
func (h *Host) Do(f func()) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread() // and never unlocked
		h.l.Must(netns.Set(h.ns))
		f()
	}()
	<-done
}

// Self is the node as a host.
func (l *Node) Self() *Host { return &Host{l, "node", l.node} }

// Go runs f beside the test, as the node.
func (l *Node) Go(f func()) {
	h := Host{l: l, ns: l.node}
	go h.Do(f)
}

// Serve answers on a port by TCP and UDP with the host's name and the client's address,
// at all addresses or those given.
func (h *Host) Serve(port int, at ...string) {
	h.l.t.Helper()
	if len(at) == 0 {
		at = []string{""}
	}
	for _, ip := range at {
		h.serveAt(net.JoinHostPort(ip, strconv.Itoa(port)))
	}
}

func (h *Host) serveAt(address string) {
	h.Do(func() {
		l, err := net.Listen("tcp", address)
		h.l.Must(err)
		u, err := net.ListenPacket("udp", address)
		h.l.Must(err)
		h.l.t.Cleanup(func() { l.Close(); u.Close() })
		go func() {
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				go func() {
					defer c.Close()
					for r := bufio.NewReader(c); ; {
						if _, err := r.ReadString('\n'); err != nil {
							return
						}
						fmt.Fprintf(c, "%s %s\n", h.Name, hostOf(c.RemoteAddr()))
					}
				}()
			}
		}()
		go func() {
			b := make([]byte, 100)
			for {
				_, from, err := u.ReadFrom(b)
				if err != nil {
					return
				}
				_, _ = u.WriteTo(fmt.Appendf(nil, "%s %s\n", h.Name, hostOf(from)), from)
			}
		}()
	})
}

func hostOf(a net.Addr) string {
	host, _, _ := net.SplitHostPort(a.String())
	ip, _ := netip.ParseAddr(host)
	return ip.Unmap().String()
}

// Patience is for answers that must come, and for those that must not.
const Patience, Impatience = 20 * time.Second, 400 * time.Millisecond

// Ask returns "NAME CLIENT" as the server that answers says it, or what went wrong:
// refused or nothing.
func Ask(network, address string) string { return Asking(network, address, Patience) }

// Asking is Ask with other patience.
func Asking(network, address string, d time.Duration) string {
	c, err := Dial(network, netip.Addr{}, address, d)
	if err != nil {
		return Failure(err)
	}
	defer c.Close()
	return Talk(c, d)
}

// clientPort is the last from which a client sent by UDP.
var clientPort atomic.Uint32

// Dial connects from an address, zero: any. By UDP each is from another port: conntrack knows
// what was sent from one for half a minute, and the kernel would give out the same again.
func Dial(network string, from netip.Addr, to string, d time.Duration) (net.Conn, error) {
	for {
		dialer := &net.Dialer{Timeout: d}
		switch {
		case network == "udp":
			dialer.LocalAddr = net.UDPAddrFromAddrPort(netip.AddrPortFrom(from, uint16(10000+clientPort.Add(1)%50000)))
			if !from.IsValid() {
				dialer.LocalAddr.(*net.UDPAddr).IP = nil
			}
		case from.IsValid():
			dialer.LocalAddr = net.TCPAddrFromAddrPort(netip.AddrPortFrom(from, 0))
		}
		c, err := dialer.DialContext(context.Background(), network, to)
		if network != "udp" || !errors.Is(err, unix.EADDRINUSE) {
			return c, err
		}
	}
}

// Talk is Ask over a connection.
func Talk(c net.Conn, d time.Duration) string {
	_ = c.SetDeadline(time.Now().Add(d))
	if _, err := io.WriteString(c, "hello\n"); err != nil {
		return Failure(err)
	}
	line, err := bufio.NewReader(c).ReadString('\n')
	if err != nil {
		return Failure(err)
	}
	return strings.TrimSpace(line)
}

// Failure is what went wrong, in a word.
func Failure(err error) string {
	switch text := err.Error(); {
	case strings.Contains(text, "refused"):
		return "refused"
	case strings.Contains(text, "timeout"):
		return "nothing"
	default:
		return text
	}
}

// Ask is [Ask] as the host.
func (h *Host) Ask(network, address string) (out string) {
	h.Do(func() { out = Ask(network, address) })
	return out
}

// Silent is for what must get no answer.
func (h *Host) Silent(network, address string) (out string) {
	h.Do(func() { out = Asking(network, address, Impatience) })
	return out
}

// Who asks many times and says which servers answered.
func (h *Host) Who(network, address string) map[string]int {
	out := map[string]int{}
	h.Do(func() {
		for range 40 {
			name, _, _ := strings.Cut(Ask(network, address), " ")
			out[name]++
		}
	})
	return out
}
