package dns

import (
	"encoding/binary"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/miekg/dns"
	corev1 "k8s.io/api/core/v1"

	"timonel/network/feed"
)

const (
	// ttl is for how many seconds records of the cluster are good elsewhere: the
	// next question costs no more than a hop within the node.
	ttl = 5
	// version is that of the specification, of which all records are.
	version    = "1.1.0"
	versionTTL = 28800
)

// zone is what the cluster's domain and the reverse domains say. Names are looked up
// in the View itself; what is kept besides is whose an address is.
type zone struct {
	labels []string // of the domain
	suffix name
	// servers are the addresses of the server, and of the name ns.dns.DOMAIN.
	servers []netip.Addr

	view   atomic.Pointer[feed.View]
	serial atomic.Uint32
	mu     sync.RWMutex
	owners map[[16]byte]*owner
}

// owner is a Service that has an address, or an endpoint with it.
type owner struct {
	service feed.Name
	next    *owner
}

func newZone(domain string, servers []netip.Addr) *zone {
	z := &zone{labels: strings.Split(domain, "."), servers: servers, owners: make(map[[16]byte]*owner)}
	z.suffix = append(appendLabels(nil, z.labels...), 0)
	z.view.Store(&feed.View{})
	return z
}

// apply makes the zone that of a newer view.
func (z *zone) apply(c feed.Changes, now time.Time) {
	old := z.view.Load()
	z.mu.Lock()
	defer z.mu.Unlock()
	if c.Reset {
		clear(z.owners)
		for n := range c.View.Services() {
			z.note(c.View, n)
		}
	} else {
		for n := range c.Services {
			for ip := range addresses(old, n) {
				z.forget(ip, n)
			}
			z.note(c.View, n)
		}
	}
	z.view.Store(c.View)
	z.serial.Store(uint32(now.Unix()))
}

func (z *zone) note(v *feed.View, n feed.Name) {
	if v.Service(n) == nil {
		return
	}
	for ip := range addresses(v, n) {
		z.owners[ip.As16()] = &owner{n, z.owners[ip.As16()]}
	}
}

func (z *zone) forget(ip netip.Addr, n feed.Name) {
	key := ip.As16()
	var keep *owner
	for o := z.owners[key]; o != nil; o = o.next {
		if o.service != n {
			keep = &owner{o.service, keep}
		}
	}
	if keep == nil {
		delete(z.owners, key)
		return
	}
	z.owners[key] = keep
}

// addresses are those of a Service and its ready endpoints, each once.
func addresses(v *feed.View, n feed.Name) map[netip.Addr]struct{} {
	out := make(map[netip.Addr]struct{})
	svc := v.Service(n)
	if svc == nil {
		return out
	}
	for _, ip := range clusterIPs(svc) {
		out[ip] = struct{}{}
	}
	for e := range endpoints(v, n, svc) {
		out[e.ip] = struct{}{}
	}
	return out
}

// answer writes what the zone says. With more set, the name is not the zone's, or an
// alias of a name that is not: more says which, and the answer is written up to there.
func (z *zone) answer(r *reply, q *query, turn uint32) (rcode int, outside string, mine bool) {
	n := len(q.labels) - len(z.labels)
	if n >= 0 && equal(q.labels[n:], z.labels) {
		offset := 0
		for _, l := range q.labels[:n] {
			offset += 1 + len(l)
		}
		f := z.find(q.labels[:n], q.kind)
		return z.write(r, q, f, pointer(offset), turn), f.alias, true
	}
	if n := len(q.labels) - 2; n > 0 && q.labels[n+1] == "arpa" && (q.labels[n] == "in-addr" || q.labels[n] == "ip6") {
		ip, ok := reverseAddress(q.labels[:n], q.labels[n] == "ip6")
		if !ok {
			return 0, "", false
		}
		v := z.view.Load()
		names := z.pointers(v, ip)
		if len(names) == 0 {
			// Before anything is known, no other server may say that it is nobody's.
			return dns.RcodeServerFailure, "", !v.Synced() && ip.IsPrivate()
		}
		f := found{exists: true}
		if q.kind == dns.TypePTR {
			f.names = names
		}
		offset := 0
		for _, l := range q.labels[:n] {
			offset += 1 + len(l)
		}
		return z.write(r, q, f, pointer(offset), turn), "", true
	}
	return 0, "", false
}

// write puts what was found into an answer.
func (z *zone) write(r *reply, q *query, f found, apex name, turn uint32) int {
	self := pointer(0)
	const count = answerSection
	before := binary.BigEndian.Uint16(r.b[count:])
	switch {
	case f.unknown:
		return dns.RcodeServerFailure
	case f.target != nil:
		r.add(count, self, dns.TypeCNAME, ttl, f.target)
		return dns.RcodeSuccess
	}
	for i := range f.srv {
		s := f.srv[(i+int(turn%uint32(len(f.srv))))%len(f.srv)]
		data := binary.BigEndian.AppendUint16(nil, 0) // priority
		data = binary.BigEndian.AppendUint16(data, uint16(max(100/len(f.srv), 1)))
		data = binary.BigEndian.AppendUint16(data, s.port)
		if !r.add(count, self, dns.TypeSRV, ttl, append(data, s.target...)) {
			break
		}
	}
	for _, p := range f.names {
		r.add(count, self, dns.TypePTR, ttl, p)
	}
	if f.text != "" {
		r.add(count, self, dns.TypeTXT, versionTTL, append([]byte{byte(len(f.text))}, f.text...))
	}
	if f.ns {
		r.add(count, self, dns.TypeNS, ttl, z.name("ns", "dns"))
	}
	if f.soa {
		r.add(count, self, dns.TypeSOA, ttl, z.soa())
	}
	r.addresses(count, self, q.kind, ttl, f.addresses, turn)
	if binary.BigEndian.Uint16(r.b[count:]) == before && r.b[2]&(flagTC>>8) == 0 {
		r.add(authoritySection, apex, dns.TypeSOA, ttl, z.soa())
		if !f.exists {
			return dns.RcodeNameError
		}
		return dns.RcodeSuccess
	}
	for _, e := range f.extra {
		r.addresses(additionalSection, e.owner, dns.TypeA, ttl, e.addresses, turn)
		r.addresses(additionalSection, e.owner, dns.TypeAAAA, ttl, e.addresses, turn)
	}
	return dns.RcodeSuccess
}

// name is one within the domain.
func (z *zone) name(labels ...string) name { return append(appendLabels(nil, labels...), z.suffix...) }

func (z *zone) soa() []byte {
	b := append(z.name("ns", "dns"), z.name("hostmaster")...)
	for _, n := range []uint32{z.serial.Load(), 7200, 1800, 86400, ttl} {
		b = binary.BigEndian.AppendUint32(b, n)
	}
	return b
}

// clusterIPs are the addresses that a Service has itself.
func clusterIPs(svc *corev1.Service) []netip.Addr {
	if svc.Spec.Type == corev1.ServiceTypeExternalName {
		return nil
	}
	list := svc.Spec.ClusterIPs
	if len(list) == 0 {
		list = []string{svc.Spec.ClusterIP}
	}
	out := make([]netip.Addr, 0, len(list))
	for _, text := range list {
		if ip, err := netip.ParseAddr(text); err == nil { // not None
			out = append(out, ip)
		}
	}
	return out
}

func equal(a, b []string) bool {
	for i := range b {
		if a[i] != b[i] {
			return false
		}
	}
	return true
}
