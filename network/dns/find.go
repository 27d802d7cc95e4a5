package dns

import (
	"iter"
	"net/netip"
	"slices"
	"strings"

	"github.com/miekg/dns"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"

	"timonel/network/feed"
)

// found is what there is of a name. A name that exists without a record of the kind
// that was asked for says so; one that does not exist is an error to the client.
type found struct {
	unknown   bool // nobody can say yet
	exists    bool
	addresses []netip.Addr
	srv       []srv
	names     []name // of a reverse name
	text      string
	ns, soa   bool
	target    name   // of an alias
	alias     string // the same, as text
	extra     []extra
}

type srv struct {
	port   uint16
	target name
}

// extra are the addresses of a target.
type extra struct {
	owner     name
	addresses []netip.Addr
}

// find looks up a name below the domain.
//
//	DOMAIN                                    NS, SOA
//	dns-version.DOMAIN                        TXT
//	ns.dns.DOMAIN                             A, AAAA: this server
//	A-B-C-D.NAMESPACE.pod.DOMAIN              A, AAAA: what the name says
//	SERVICE.NAMESPACE.svc.DOMAIN              A, AAAA, SRV, CNAME
//	HOSTNAME.SERVICE.NAMESPACE.svc.DOMAIN     A, AAAA, SRV
//	_PORT._PROTOCOL.SERVICE.NAMESPACE.svc.DOMAIN  SRV
func (z *zone) find(labels []string, kind uint16) found {
	last := len(labels) - 1
	if last < 0 {
		return found{exists: true, ns: kind == dns.TypeNS, soa: kind == dns.TypeSOA, extra: z.glue(kind)}
	}
	switch labels[last] {
	case "dns-version":
		f := found{exists: last == 0}
		if f.exists && kind == dns.TypeTXT {
			f.text = version
		}
		return f
	case "dns":
		switch {
		case last == 0:
			return found{exists: true}
		case last == 1 && labels[0] == "ns":
			return found{exists: true, addresses: z.servers}
		}
		return found{}
	case "pod":
		return findPod(labels[:last])
	case "svc":
	default:
		return found{}
	}
	if last == 0 {
		return found{exists: true}
	}
	view := z.view.Load()
	f := z.findService(view, labels[:last], kind)
	if !f.exists && !view.Synced() {
		return found{unknown: true} // it may be there: an error that ends would be kept
	}
	return f
}

func (z *zone) glue(kind uint16) []extra {
	if kind != dns.TypeNS {
		return nil
	}
	return []extra{{z.name("ns", "dns"), z.servers}}
}

// findPod reads an address out of a name: as CoreDNS does by default, it does not ask
// whether there is such a pod.
func findPod(labels []string) found {
	switch len(labels) {
	case 0, 1: // pod.DOMAIN, NAMESPACE.pod.DOMAIN
		return found{exists: true}
	case 2:
		text := labels[0]
		if strings.Count(text, "-") == 3 && !strings.Contains(text, "--") {
			text = strings.ReplaceAll(text, "-", ".")
		} else {
			text = strings.ReplaceAll(text, "-", ":")
		}
		if ip, err := netip.ParseAddr(text); err == nil && ip.Zone() == "" {
			return found{exists: true, addresses: []netip.Addr{ip.Unmap()}}
		}
	}
	return found{}
}

// findService looks up a name below svc.DOMAIN.
func (z *zone) findService(v *feed.View, labels []string, kind uint16) found {
	last := len(labels) - 1
	n := feed.Name{Namespace: labels[last]}
	if last == 0 {
		return found{exists: v.HasServices(n.Namespace)}
	}
	n.Name = labels[last-1]
	svc := v.Service(n)
	if svc == nil || len(labels) > 4 {
		return found{}
	}
	rest := labels[:last-1]
	if svc.Spec.Type == corev1.ServiceTypeExternalName {
		f := found{}
		if len(rest) == 0 {
			f.target = nameOf(strings.ToLower(svc.Spec.ExternalName))
			if _, err := netip.ParseAddr(svc.Spec.ExternalName); err == nil {
				f.target = nil // no name can be looked up by an address
			}
			if f.exists = f.target != nil; f.exists && kind != dns.TypeCNAME && kind != dns.TypeANY {
				f.alias = svc.Spec.ExternalName
			}
		}
		return f
	}
	headless := svc.Spec.ClusterIP == corev1.ClusterIPNone
	switch {
	case len(rest) == 0 && !headless:
		f := found{exists: true, addresses: clusterIPs(svc)}
		if kind == dns.TypeSRV {
			f = z.servicePorts(svc, n, "", "")
			f.exists = true
		}
		return f
	case len(rest) == 0:
		return z.findEndpoints(v, n, svc, kind, func(e endpoint) bool { return true })
	case len(rest) == 1 && !strings.HasPrefix(rest[0], "_"):
		return z.findEndpoints(v, n, svc, kind, func(e endpoint) bool { return e.is(rest[0]) })
	case len(rest) == 1:
		return found{exists: hasProtocol(v, n, svc, headless, strings.TrimPrefix(rest[0], "_"))}
	}
	port, okPort := strings.CutPrefix(rest[0], "_")
	protocol, okProtocol := strings.CutPrefix(rest[1], "_")
	if !okPort || !okProtocol || port == "" {
		return found{}
	}
	var f found
	if headless {
		f = z.endpointPorts(v, n, svc, port, protocol, func(endpoint) bool { return true })
	} else {
		f = z.servicePorts(svc, n, port, protocol)
	}
	f.exists = len(f.srv) > 0
	if kind != dns.TypeSRV {
		f.srv, f.extra = nil, nil
	}
	return f
}

// servicePorts are the SRV records of a Service with an address of its own: of the
// port that is named, or of all.
func (z *zone) servicePorts(svc *corev1.Service, n feed.Name, port, protocol string) (f found) {
	target := z.name(n.Name, n.Namespace, "svc")
	for i := range svc.Spec.Ports {
		p := &svc.Spec.Ports[i]
		if port == "" || strings.EqualFold(p.Name, port) && strings.EqualFold(protocolOf(p.Protocol), protocol) {
			f.srv = append(f.srv, srv{uint16(p.Port), target})
		}
	}
	if len(f.srv) > 0 {
		f.extra = []extra{{target, clusterIPs(svc)}}
	}
	return f
}

// findEndpoints are the records of those endpoints that match.
func (z *zone) findEndpoints(v *feed.View, n feed.Name, svc *corev1.Service, kind uint16, match func(endpoint) bool) (f found) {
	if kind == dns.TypeSRV {
		f = z.endpointPorts(v, n, svc, "", "", match)
	}
	seen := make(map[netip.Addr]struct{}) // an address is in a slice for each set of ports
	for e := range endpoints(v, n, svc) {
		if !match(e) {
			continue
		}
		f.exists = true
		if _, double := seen[e.ip]; !double && ofKind(e.ip, kind) {
			seen[e.ip] = struct{}{}
			f.addresses = append(f.addresses, e.ip)
		}
	}
	return f
}

// endpointPorts are the SRV records of endpoints: of the port that is named, or of all.
func (z *zone) endpointPorts(v *feed.View, n feed.Name, svc *corev1.Service, port, protocol string, match func(endpoint) bool) (f found) {
	type key struct {
		port uint16
		host string
	}
	seen, hosts := make(map[key]bool), make(map[string]int)
	for e := range endpoints(v, n, svc) {
		if !match(e) {
			continue
		}
		for i := range e.slice.Ports {
			p := &e.slice.Ports[i]
			if p.Port == nil || port != "" && (!strings.EqualFold(deref(p.Name), port) || !strings.EqualFold(protocolOf(deref(p.Protocol)), protocol)) {
				continue
			}
			host := e.host()
			target := z.name(host, n.Name, n.Namespace, "svc")
			at, known := hosts[host]
			if !known {
				at = len(f.extra)
				hosts[host] = at
				f.extra = append(f.extra, extra{owner: target})
			}
			if !slices.Contains(f.extra[at].addresses, e.ip) {
				f.extra[at].addresses = append(f.extra[at].addresses, e.ip)
			}
			if k := (key{uint16(*p.Port), host}); !seen[k] {
				seen[k] = true
				f.srv = append(f.srv, srv{k.port, target})
			}
		}
	}
	return f
}

// hasProtocol says whether there are names below _PROTOCOL of a Service.
func hasProtocol(v *feed.View, n feed.Name, svc *corev1.Service, headless bool, protocol string) bool {
	if !headless {
		return slices.ContainsFunc(svc.Spec.Ports, func(p corev1.ServicePort) bool {
			return p.Name != "" && strings.EqualFold(protocolOf(p.Protocol), protocol)
		})
	}
	for e := range endpoints(v, n, svc) {
		for i := range e.slice.Ports {
			if p := &e.slice.Ports[i]; deref(p.Name) != "" && strings.EqualFold(protocolOf(deref(p.Protocol)), protocol) {
				return true
			}
		}
	}
	return false
}

// endpoint is one address of an endpoint that may be named.
type endpoint struct {
	ip    netip.Addr
	named string
	slice *discoveryv1.EndpointSlice
}

// is says whether a label is the endpoint's.
func (e endpoint) is(label string) bool {
	if e.named != "" {
		return strings.EqualFold(e.named, label)
	}
	return dashed(e.ip) == label
}

func (e endpoint) host() string {
	if e.named != "" {
		return strings.ToLower(e.named)
	}
	return dashed(e.ip)
}

// dashed is the name of an endpoint that has none: its address. A label does not end
// in a dash.
func dashed(ip netip.Addr) string {
	text := strings.NewReplacer(".", "-", ":", "-").Replace(ip.String())
	if strings.HasSuffix(text, "-") {
		text += "0"
	}
	return text
}

// endpoints are the addresses of a Service's endpoints that are ready, or of all when
// the Service says so.
func endpoints(v *feed.View, n feed.Name, svc *corev1.Service) iter.Seq[endpoint] {
	return func(yield func(endpoint) bool) {
		if svc.Spec.Type == corev1.ServiceTypeExternalName {
			return
		}
		for _, slice := range v.Slices(n) {
			if slice.AddressType == discoveryv1.AddressTypeFQDN {
				continue
			}
			for i := range slice.Endpoints {
				e := &slice.Endpoints[i]
				if ready := e.Conditions.Ready; ready != nil && !*ready && !svc.Spec.PublishNotReadyAddresses {
					continue
				}
				for _, text := range e.Addresses {
					ip, err := netip.ParseAddr(text)
					if err != nil {
						continue
					}
					if !yield(endpoint{ip, deref(e.Hostname), slice}) {
						return
					}
				}
			}
		}
	}
}

func protocolOf(p corev1.Protocol) string {
	if p == "" {
		return string(corev1.ProtocolTCP)
	}
	return string(p)
}

func deref[T any](p *T) (v T) {
	if p != nil {
		v = *p
	}
	return v
}
