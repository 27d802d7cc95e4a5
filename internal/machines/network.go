package machines

import (
	"errors"
	"fmt"
	"hash/fnv"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

const netnsDir = "/run/netns"

// Network is the wire between a cluster's machines. Name is the cluster's; all
// names on the host (bridge, links, namespaces, nftables tables) derive from it.
type Network struct {
	Name   string
	Prefix netip.Prefix // the host has its first address
}

// Machine describes a machine on the network. It makes nothing yet.
func (n Network) Machine(name string, address netip.Addr, dir string) *Machine {
	return &Machine{Name: name, Address: address, Dir: dir, network: n}
}

// Host is the host's own address on the network: the machines' gateway.
func (n Network) Host() netip.Addr { return n.Prefix.Masked().Addr().Next() }

// Bridge is the name of the network's bridge on the host.
func (n Network) Bridge() string { return n.short() }

// Link is the name of the host's end of a machine's link.
func (n Network) Link(machine string) string { return n.short() + "-" + machine }

// Namespace is the name of a machine's network namespace, as `ip netns` shows it.
func (n Network) Namespace(machine string) string { return n.Name + "-" + machine }

// short is the name where the kernel allows 15 bytes: kept when it fits beside
// a machine's name, else shortened with a hash that keeps it unique.
func (n Network) short() string {
	if len(n.Name) <= 9 {
		return n.Name
	}
	h := fnv.New32a()
	h.Write([]byte(n.Name))
	return n.Name[:3] + fmt.Sprintf("%06x", h.Sum32()&0xffffff)
}

// CheckName returns an error when a cluster's name cannot name interfaces,
// namespaces and tables.
func CheckName(name string) error {
	if name == "" || len(name) > 40 {
		return fmt.Errorf("cluster name %q: want 1 to 40 characters", name)
	}
	for i, r := range name {
		letter := r >= 'a' && r <= 'z'
		if !letter && (i == 0 || r != '-' && (r < '0' || r > '9')) {
			return fmt.Errorf("cluster name %q: want lower-case letters, digits and '-', a letter first", name)
		}
	}
	return nil
}

// FreePrefix returns the first of count neighbouring subnets, of 16 or 24 bits, that
// overlaps no route and no address of the host.
func FreePrefix(first netip.Prefix, count int) (netip.Prefix, error) {
	used, err := usedPrefixes()
	if err != nil {
		return netip.Prefix{}, err
	}
	candidate := first
	for i := range count {
		a := first.Addr().As4()
		a[first.Bits()/8-1] += byte(i)
		candidate = netip.PrefixFrom(netip.AddrFrom4(a), first.Bits())
		if !overlapsAny(candidate, used) {
			return candidate, nil
		}
	}
	return netip.Prefix{}, fmt.Errorf("every subnet from %s to %s is in use on this host: give a free one", first, candidate)
}

func usedPrefixes() ([]netip.Prefix, error) {
	routes, err := netlink.RouteList(nil, netlink.FAMILY_V4)
	if err != nil {
		return nil, fmt.Errorf("list the host's routes: %w", err)
	}
	addresses, err := netlink.AddrList(nil, netlink.FAMILY_V4)
	if err != nil {
		return nil, fmt.Errorf("list the host's addresses: %w", err)
	}
	var used []netip.Prefix
	add := func(network *net.IPNet) {
		if network == nil {
			return
		}
		addr, ok := netip.AddrFromSlice(network.IP.To4())
		ones, _ := network.Mask.Size()
		if ok && ones > 0 {
			used = append(used, netip.PrefixFrom(addr, ones))
		}
	}
	for _, route := range routes {
		add(route.Dst)
	}
	for _, address := range addresses {
		add(address.IPNet)
	}
	return used, nil
}

func overlapsAny(candidate netip.Prefix, used []netip.Prefix) bool {
	for _, prefix := range used {
		if candidate.Overlaps(prefix) {
			return true
		}
	}
	return false
}

// Create makes the bridge, the host's address on it and the nftables tables.
// What is there already stays as it is.
func (n Network) Create() error {
	bridge, err := netlink.LinkByName(n.Bridge())
	if errors.As(err, &netlink.LinkNotFoundError{}) {
		attributes := netlink.NewLinkAttrs()
		attributes.Name = n.Bridge()
		if err := netlink.LinkAdd(&netlink.Bridge{LinkAttrs: attributes}); err != nil {
			return fmt.Errorf("create bridge %s: %w", n.Bridge(), err)
		}
		bridge, err = netlink.LinkByName(n.Bridge())
	}
	if err != nil {
		return fmt.Errorf("find bridge %s: %w", n.Bridge(), err)
	}
	if bridge.Type() != "bridge" {
		return fmt.Errorf("interface %s exists and is a %s, not a bridge: choose another cluster name", n.Bridge(), bridge.Type())
	}
	if err := netlink.LinkSetAlias(bridge, linkAlias); err != nil {
		return fmt.Errorf("mark bridge %s: %w", n.Bridge(), err)
	}
	address := &netlink.Addr{IPNet: ipNet(n.Host(), n.Prefix.Bits())}
	if err := netlink.AddrReplace(bridge, address); err != nil {
		return fmt.Errorf("give bridge %s the address %s: %w", n.Bridge(), n.Host(), err)
	}
	if err := netlink.LinkSetUp(bridge); err != nil {
		return fmt.Errorf("set bridge %s up: %w", n.Bridge(), err)
	}
	return n.createTables()
}

// Delete removes the bridge, with the routes over it, and the tables. What is
// not there is no error.
func (n Network) Delete() error {
	var failed []error
	if bridge, err := netlink.LinkByName(n.Bridge()); err == nil && bridge.Type() == "bridge" {
		if err := netlink.LinkDel(bridge); err != nil {
			failed = append(failed, fmt.Errorf("delete bridge %s: %w", n.Bridge(), err))
		}
	}
	return errors.Join(append(failed, n.deleteTables())...)
}

// Route sends the host's packets for prefix to a machine, in place of any
// older route of this network for it.
func (n Network) Route(prefix netip.Prefix, via netip.Addr) error {
	bridge, err := netlink.LinkByName(n.Bridge())
	if err != nil {
		return fmt.Errorf("route %s: bridge %s: %w", prefix, n.Bridge(), err)
	}
	route := &netlink.Route{LinkIndex: bridge.Attrs().Index, Dst: ipNet(prefix.Addr(), prefix.Bits()), Gw: via.AsSlice()}
	if err := netlink.RouteReplace(route); err != nil {
		return fmt.Errorf("route %s via %s: %w", prefix, via, err)
	}
	return nil
}

// attach makes a machine's network namespace with eth0 in it. A namespace that
// is there stays as it is.
func (n Network) attach(machine string, address netip.Addr) error {
	if _, err := netlink.LinkByName(n.Link(machine)); err == nil && n.hasNamespace(machine) {
		return n.setLink(machine, true)
	}
	if err := n.detach(machine); err != nil {
		return err
	}
	handle, err := createNamespace(n.Namespace(machine))
	if err != nil {
		return fmt.Errorf("create network namespace %s: %w", n.Namespace(machine), err)
	}
	defer handle.Close()
	bridge, err := netlink.LinkByName(n.Bridge())
	if err != nil {
		return fmt.Errorf("bridge %s: %w", n.Bridge(), err)
	}
	attributes := netlink.NewLinkAttrs()
	attributes.Name = n.Link(machine)
	attributes.MasterIndex = bridge.Attrs().Index
	pair := &netlink.Veth{LinkAttrs: attributes, PeerName: "eth0", PeerNamespace: netlink.NsFd(handle),
		PeerHardwareAddr: hardwareAddr(address)}
	if err := netlink.LinkAdd(pair); err != nil {
		return fmt.Errorf("create link %s: %w", attributes.Name, err)
	}
	if err := n.setLink(machine, true); err != nil {
		return err
	}
	inside, err := netlink.NewHandleAt(handle)
	if err != nil {
		return fmt.Errorf("enter network namespace %s: %w", n.Namespace(machine), err)
	}
	defer inside.Close()
	return n.configure(inside, address)
}

// configure sets lo and eth0 up in a machine's namespace.
func (n Network) configure(inside *netlink.Handle, address netip.Addr) error {
	for _, name := range []string{"lo", "eth0"} {
		link, err := inside.LinkByName(name)
		if err != nil {
			return fmt.Errorf("find %s of %s: %w", name, address, err)
		}
		if err := inside.LinkSetUp(link); err != nil {
			return fmt.Errorf("set %s of %s up: %w", name, address, err)
		}
		if name == "lo" {
			continue
		}
		if err := inside.AddrReplace(link, &netlink.Addr{IPNet: ipNet(address, n.Prefix.Bits())}); err != nil {
			return fmt.Errorf("give eth0 the address %s: %w", address, err)
		}
		route := &netlink.Route{LinkIndex: link.Attrs().Index, Gw: n.Host().AsSlice()}
		if err := inside.RouteReplace(route); err != nil {
			return fmt.Errorf("default route of %s: %w", address, err)
		}
	}
	return nil
}

// setLink sets the host's end of a machine's link up or down, as if its cable
// were plugged in or pulled.
func (n Network) setLink(machine string, up bool) error {
	link, err := netlink.LinkByName(n.Link(machine))
	if err != nil {
		return fmt.Errorf("link %s: %w", n.Link(machine), err)
	}
	set := netlink.LinkSetDown
	if up {
		set = netlink.LinkSetUp
	}
	if err := set(link); err != nil {
		return fmt.Errorf("set link %s: %w", n.Link(machine), err)
	}
	return nil
}

// detach removes a machine's network namespace and its link.
func (n Network) detach(machine string) error {
	var failed []error
	if link, err := netlink.LinkByName(n.Link(machine)); err == nil {
		if err := netlink.LinkDel(link); err != nil {
			failed = append(failed, fmt.Errorf("delete link %s: %w", n.Link(machine), err))
		}
	}
	if n.hasNamespace(machine) {
		path := filepath.Join(netnsDir, n.Namespace(machine))
		if err := unix.Unmount(path, unix.MNT_DETACH); err != nil && !errors.Is(err, unix.EINVAL) {
			failed = append(failed, fmt.Errorf("unmount %s: %w", path, err))
		}
		if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
			failed = append(failed, fmt.Errorf("delete network namespace %s: %w", n.Namespace(machine), err))
		}
	}
	return errors.Join(failed...)
}

func (n Network) hasNamespace(machine string) bool {
	_, err := os.Lstat(filepath.Join(netnsDir, n.Namespace(machine)))
	return err == nil
}

// Leftovers lists what of the network is still on the host.
func (n Network) Leftovers(machineNames []string) []string {
	var left []string
	if _, err := netlink.LinkByName(n.Bridge()); err == nil {
		left = append(left, "interface "+n.Bridge())
	}
	for _, name := range machineNames {
		if _, err := netlink.LinkByName(n.Link(name)); err == nil {
			left = append(left, "interface "+n.Link(name))
		}
		if n.hasNamespace(name) {
			left = append(left, "network namespace "+n.Namespace(name))
		}
	}
	return append(left, n.leftoverTables()...)
}

// createNamespace makes a named network namespace without leaving the caller's:
// the thread that made it is given up, not reused.
func createNamespace(name string) (netns.NsHandle, error) {
	type made struct {
		handle netns.NsHandle
		err    error
	}
	result := make(chan made, 1)
	go func() {
		runtime.LockOSThread()
		handle, err := netns.NewNamed(name)
		result <- made{handle, err}
	}()
	r := <-result
	return r.handle, r.err
}

// inNamespace runs f on a thread that is in the named network namespace.
// Processes that f starts are in it too. The thread is given up afterwards.
func inNamespace(name string, f func() error) error {
	result := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		handle, err := netns.GetFromName(name)
		if err != nil {
			result <- fmt.Errorf("network namespace %s: %w", name, err)
			return
		}
		defer handle.Close()
		if err := netns.Set(handle); err != nil {
			result <- fmt.Errorf("enter network namespace %s: %w", name, err)
			return
		}
		result <- f()
	}()
	return <-result
}

// hardwareAddr derives a stable, locally administered address, so that a
// machine that was off is found again at once.
func hardwareAddr(address netip.Addr) net.HardwareAddr {
	b := address.As4()
	return net.HardwareAddr{0x02, 0x74, b[0], b[1], b[2], b[3]}
}

func ipNet(address netip.Addr, bits int) *net.IPNet {
	return &net.IPNet{IP: address.AsSlice(), Mask: net.CIDRMask(bits, address.BitLen())}
}

// SetForwarding turns the host's IPv4 forwarding on or off and returns what it
// was.
func SetForwarding(on bool) (was bool, err error) {
	const file = "/proc/sys/net/ipv4/ip_forward"
	content, err := os.ReadFile(file)
	if err != nil {
		return false, fmt.Errorf("read the host's forwarding: %w", err)
	}
	was = strings.TrimSpace(string(content)) == "1"
	if was == on {
		return was, nil
	}
	value := 0
	if on {
		value = 1
	}
	if err := os.WriteFile(file, []byte(strconv.Itoa(value)), 0o644); err != nil {
		return was, fmt.Errorf("set the host's forwarding: %w", err)
	}
	return was, nil
}
