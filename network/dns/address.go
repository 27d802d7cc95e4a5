package dns

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"timonel/internal/durable"
)

// loopback is the link that the server's addresses are on: there it answers pods, and
// programs of the node, by whatever link they come.
const loopback = "lo"

// Addresses are those that the server has put on this machine, kept in a file, so that
// they can be taken away and an address that somebody else put there never is.
type Addresses struct{ path string }

// NewAddresses returns what the file at path says.
func NewAddresses(path string) *Addresses { return &Addresses{path} }

func (a *Addresses) read() ([]netip.Addr, error) {
	raw, err := os.ReadFile(a.path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	var list []netip.Addr
	if err == nil {
		err = json.Unmarshal(raw, &list)
	}
	if err != nil {
		return nil, fmt.Errorf("read which DNS addresses are ours: %w", err)
	}
	return list, nil
}

// Set puts addresses on the machine and takes away those of before that are not among
// them. One that is there already, and not ours, is used and left.
func (a *Addresses) Set(want []netip.Addr) error {
	had, err := a.read()
	if err != nil {
		return err
	}
	link, err := netlink.LinkByName(loopback)
	if err != nil {
		return fmt.Errorf("find the link %s: %w", loopback, err)
	}
	if err := netlink.LinkSetUp(link); err != nil {
		return fmt.Errorf("bring up the link %s: %w", loopback, err)
	}
	var ours []netip.Addr
	for _, ip := range want {
		has, err := hasAddress(ip)
		if err != nil {
			return err
		}
		if !has || slices.Contains(had, ip) {
			ours = append(ours, ip)
		}
	}
	// What is ours is written down before it is there, and for as long as it is.
	if err := a.keep(union(had, ours)); err != nil {
		return err
	}
	var errs []error
	left := slices.Clone(ours)
	for _, ip := range ours {
		if err := netlink.AddrReplace(link, addressOf(ip)); err != nil {
			errs = append(errs, fmt.Errorf("put the DNS address %s on %s: %w", ip, loopback, err))
		}
	}
	for _, ip := range had {
		if slices.Contains(ours, ip) {
			continue
		}
		if err := netlink.AddrDel(link, addressOf(ip)); err != nil && !errors.Is(err, unix.EADDRNOTAVAIL) {
			errs = append(errs, fmt.Errorf("take the DNS address %s off %s: %w", ip, loopback, err))
			left = append(left, ip)
		}
	}
	return errors.Join(append(errs, a.keep(left))...)
}

func (a *Addresses) keep(list []netip.Addr) error {
	had, err := a.read()
	if err != nil || slices.Equal(had, list) {
		return err
	}
	raw, err := json.Marshal(list)
	if err == nil {
		err = durable.WriteFile(a.path, raw, 0o600)
	}
	if err != nil {
		return fmt.Errorf("keep which DNS addresses are ours: %w", err)
	}
	return nil
}

func union(a, b []netip.Addr) []netip.Addr {
	out := slices.Clone(a)
	for _, ip := range b {
		if !slices.Contains(out, ip) {
			out = append(out, ip)
		}
	}
	return out
}

func addressOf(ip netip.Addr) *netlink.Addr {
	return &netlink.Addr{IPNet: &net.IPNet{IP: ip.AsSlice(), Mask: net.CIDRMask(ip.BitLen(), ip.BitLen())}, Scope: unix.RT_SCOPE_HOST, Flags: unix.IFA_F_NODAD}
}

// hasAddress says whether an address is on some link of this machine.
func hasAddress(ip netip.Addr) (bool, error) {
	list, err := net.InterfaceAddrs()
	if err != nil {
		return false, fmt.Errorf("list this machine's addresses: %w", err)
	}
	return slices.ContainsFunc(list, func(a net.Addr) bool {
		n, ok := a.(*net.IPNet)
		return ok && n.IP.Equal(net.IP(ip.AsSlice()))
	}), nil
}
