package dns

import (
	"net"
	"net/netip"
	"slices"
	"sync"
	"time"
)

// ownEvery is how often this machine's addresses are looked at for the sake of strangers.
const ownEvery = time.Second

// clients says who is answered: pods and this machine. The server's address is on every
// node, which forwards and answers whatever comes by any link: a neighbour that has a route
// there would use it to look at the cluster's names, to ask its name servers and, with
// addresses that are not its own, to send their answers to others.
type clients struct {
	pods []netip.Prefix // none: everybody is answered
	now  func() time.Time
	own  func() ([]net.Addr, error)

	mu     sync.Mutex
	known  []netip.Prefix
	looked time.Time
}

func newClients(pods []netip.Prefix) *clients {
	return &clients{pods: pods, now: time.Now, own: net.InterfaceAddrs}
}

// has says whether a client is one.
func (c *clients) has(ip netip.Addr) bool {
	if len(c.pods) == 0 || contain(c.pods, ip) {
		return true
	}
	ip = ip.WithZone("")
	c.mu.Lock()
	defer c.mu.Unlock()
	if contain(c.known, ip) {
		return true
	}
	now := c.now()
	if now.Sub(c.looked) < ownEvery {
		return false
	}
	c.looked = now
	list, err := c.own()
	if err != nil {
		return false // it asks again, and so do we
	}
	c.known = nil
	for _, a := range list {
		n, ok := a.(*net.IPNet)
		if !ok {
			continue
		}
		own, _ := netip.AddrFromSlice(n.IP)
		bits := own.Unmap().BitLen()
		if own.IsLoopback() { // all of the network is this machine
			bits, _ = n.Mask.Size()
		}
		if p, err := own.Unmap().Prefix(bits); err == nil {
			c.known = append(c.known, p)
		}
	}
	return contain(c.known, ip)
}

func contain(list []netip.Prefix, ip netip.Addr) bool {
	return slices.ContainsFunc(list, func(p netip.Prefix) bool { return p.Contains(ip) })
}
