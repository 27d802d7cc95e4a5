package podnet

import (
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"timonel/internal/podrange"
	"timonel/test/needs"
)

// A lab is a router with segments of machines, each in a network namespace.
type lab struct {
	t      *testing.T
	router *machine
	links  int
}

// A machine is somebody with a network namespace: a node, a pod, the router.
type machine struct {
	l    *lab
	name string
	ns   netns.NsHandle
	net  *Network // a node's
	peer Peer
	dir  string

	events []string
}

const cniBin = "/usr/lib/cni"

func newLab(t *testing.T) *lab {
	t.Helper()
	needs.Root(t, "makes network namespaces")
	for _, program := range []string{"nft", "ip"} {
		if _, err := exec.LookPath(program); err != nil {
			needs.Skip(t, program+" is not installed")
		}
	}
	if _, err := os.Stat(filepath.Join(cniBin, "bridge")); err != nil {
		needs.Skip(t, "the CNI plugins are not installed")
	}
	l := &lab{t: t}
	l.router = l.machine("router")
	return l
}

// machine makes a network namespace that ends with the test.
func (l *lab) machine(name string) *machine {
	l.t.Helper()
	m := &machine{l: l, name: name, dir: l.t.TempDir()}
	made := make(chan error)
	go func() {
		runtime.LockOSThread() // and never unlocked
		ns, err := netns.New()
		m.ns = ns
		made <- err
	}()
	require.NoError(l.t, <-made)
	l.t.Cleanup(func() { m.ns.Close() })
	m.run("ip link set lo up; echo 1 > /proc/sys/net/ipv4/ip_forward; echo 1 > /proc/sys/net/ipv6/conf/all/forwarding; echo 0 > /proc/sys/net/ipv6/conf/default/accept_dad")
	return m
}

// in runs f in the machine.
func (m *machine) in(f func()) {
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // and never unlocked: the thread ends
		err := netns.Set(m.ns)
		if err == nil {
			f()
		}
		done <- err
	}()
	require.NoError(m.l.t, <-done)
}

// run runs a shell line in the machine and returns what it prints.
func (m *machine) run(line string) string {
	m.l.t.Helper()
	var out []byte
	var err error
	m.in(func() { out, err = exec.Command("sh", "-ec", line).CombinedOutput() })
	require.NoError(m.l.t, err, "%s: %s: %s", m.name, line, out)
	return string(out)
}

// join connects a machine with the router's segment, of which the router has the first
// address; on the router it is a bridge.
func (l *lab) join(m *machine, segment, gateway string, mtu int, addresses ...string) {
	l.t.Helper()
	l.links++
	port := fmt.Sprint("p", l.links)
	l.router.run(fmt.Sprintf(`ip link show %[1]s >/dev/null 2>&1 || { ip link add %[1]s type bridge; ip link set %[1]s mtu %[4]d up; ip addr add %[2]s dev %[1]s; }
		ip link add %[3]s mtu %[4]d type veth peer name %[3]s-in; ip link set %[3]s master %[1]s up`, segment, gateway, port, mtu))
	// The thread's own namespace is none that a path names.
	l.router.run(fmt.Sprintf("ip link set %s-in netns /proc/%d/fd/%d", port, os.Getpid(), int(m.ns)))
	m.run(fmt.Sprintf("ip link set %s-in name eth0; ip link set eth0 mtu %d up", port, mtu))
	for _, a := range addresses {
		m.run("ip addr add " + a + " dev eth0")
	}
	m.run("ip route replace default via " + strings.Split(gateway, "/")[0])
}

var labGuard = Guard{
	Pods: podrange.Ranges{Networks: []netip.Prefix{netip.MustParsePrefix("10.244.0.0/16"), netip.MustParsePrefix("fd00:244::/48")}},
}

// node makes the pod network of a machine.
func (m *machine) node(mode Mode, address string, cidrs ...string) *machine {
	m.l.t.Helper()
	m.peer = Peer{Name: m.name, CIDRs: cidrs, Addresses: []string{address}}
	m.start(Config{Mode: mode, NodeIPs: []netip.Addr{netip.MustParseAddr(address)}})
	return m
}

// start makes the Network of a fresh agent.
func (m *machine) start(cfg Config) {
	m.l.t.Helper()
	cfg.Name, cfg.Bridge, cfg.ConfDir, cfg.StateDir = m.name, "br-pods", filepath.Join(m.dir, "conf"), filepath.Join(m.dir, "state")
	cfg.BinDir, cfg.Table, cfg.Logger = cniBin, "timonel-test", slog.New(slog.DiscardHandler)
	cfg.Event = func(reason, message string) { m.events = append(m.events, reason+": "+message) }
	var err error
	m.in(func() { m.net, err = New(cfg) })
	require.NoError(m.l.t, err)
}

// update tells a node of the others.
func (m *machine) update(others ...*machine) error {
	var peers []Peer
	for _, o := range others {
		peers = append(peers, o.peer)
	}
	return m.updateWith(m.peer.CIDRs, peers)
}

func (m *machine) updateWith(own []string, peers []Peer) (err error) {
	m.in(func() { _, err = m.net.Update(own, peers, labGuard) })
	return err
}

// pod makes a pod of a node, as containerd would, and returns its addresses.
func (m *machine) pod(name string) (pod *machine, ips []netip.Addr) {
	m.l.t.Helper()
	pod = m.l.machine(name)
	raw, err := os.ReadFile(m.net.confPath())
	require.NoError(m.l.t, err)
	var list struct {
		CNIVersion, Name string
		Plugins          []map[string]any
	}
	require.NoError(m.l.t, json.Unmarshal(raw, &list))
	conf := list.Plugins[0]
	conf["cniVersion"], conf["name"] = list.CNIVersion, list.Name
	in, err := json.Marshal(conf)
	require.NoError(m.l.t, err)
	var out []byte
	m.in(func() {
		cmd := exec.Command(filepath.Join(cniBin, conf["type"].(string)))
		cmd.Stdin = strings.NewReader(string(in))
		cmd.Env = []string{"PATH=" + os.Getenv("PATH"), "CNI_COMMAND=ADD", "CNI_CONTAINERID=" + name, "CNI_IFNAME=eth0", "CNI_PATH=" + cniBin,
			fmt.Sprintf("CNI_NETNS=/proc/%d/fd/%d", os.Getpid(), int(pod.ns))}
		out, err = cmd.Output()
	})
	require.NoError(m.l.t, err, string(out))
	var result struct{ IPs []struct{ Address string } }
	require.NoError(m.l.t, json.Unmarshal(out, &result))
	for _, ip := range result.IPs {
		ips = append(ips, netip.MustParsePrefix(ip.Address).Addr())
	}
	return pod, ips
}

// answer echoes UDP packets at port 7 of an address of the machine: whom one came from,
// and how long it was.
func (m *machine) answer(ip netip.Addr) {
	m.l.t.Helper()
	var conn *net.UDPConn
	var err error
	m.in(func() { conn, err = net.ListenUDP("udp", net.UDPAddrFromAddrPort(netip.AddrPortFrom(ip, 7))) })
	require.NoError(m.l.t, err)
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		buf := make([]byte, 1<<16)
		for {
			n, from, err := conn.ReadFromUDPAddrPort(buf)
			if err != nil {
				return
			}
			_, _ = conn.WriteToUDPAddrPort(fmt.Appendf(nil, "%s %d", from.Addr().Unmap(), n), from)
		}
	}()
	m.l.t.Cleanup(func() { conn.Close(); <-ended })
}

var errNoAnswer = errors.New("no answer")

// ask sends a packet of a size, never in fragments, to a machine that answers, and returns
// what it says, or that it says nothing at tries tries.
func (m *machine) ask(ip netip.Addr, size, tries int) (answer string, err error) {
	m.l.t.Helper()
	var conn *net.UDPConn
	m.in(func() { conn, err = net.DialUDP("udp", nil, net.UDPAddrFromAddrPort(netip.AddrPortFrom(ip, 7))) })
	if err != nil {
		return "", err
	}
	defer conn.Close()
	raw, err := conn.SyscallConn()
	require.NoError(m.l.t, err)
	require.NoError(m.l.t, raw.Control(func(fd uintptr) {
		if ip.Is4() {
			err = unix.SetsockoptInt(int(fd), unix.IPPROTO_IP, unix.IP_MTU_DISCOVER, unix.IP_PMTUDISC_DO)
		} else {
			err = unix.SetsockoptInt(int(fd), unix.IPPROTO_IPV6, unix.IPV6_MTU_DISCOVER, unix.IP_PMTUDISC_DO)
		}
	}))
	require.NoError(m.l.t, err)
	buf := make([]byte, 256)
	for range tries {
		if _, err := conn.Write(make([]byte, size)); err != nil {
			if errors.Is(err, unix.EMSGSIZE) {
				return "", err
			}
			time.Sleep(10 * time.Millisecond)
			continue // an ICMP error of the one before
		}
		require.NoError(m.l.t, conn.SetReadDeadline(time.Now().Add(200*time.Millisecond)))
		if n, err := conn.Read(buf); err == nil {
			return string(buf[:n]), nil
		}
	}
	return "", errNoAnswer
}

// reaches requires an answer that says who asked.
func (m *machine) reaches(ip netip.Addr, size int, as netip.Addr) {
	m.l.t.Helper()
	got, err := m.ask(ip, size, 50)
	require.NoError(m.l.t, err, "%s to %s with %d bytes", m.name, ip, size)
	require.Equal(m.l.t, fmt.Sprintf("%s %d", as, size), got, "%s to %s", m.name, ip)
}
