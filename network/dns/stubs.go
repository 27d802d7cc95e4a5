package dns

import (
	"fmt"
	"net/netip"
	"strings"

	"k8s.io/apimachinery/pkg/util/validation"
)

// ParseStubs reads domains with name servers of their own, each as
// DOMAIN=ADDRESS[:PORT],…
func ParseStubs(list []string) (map[string][]netip.AddrPort, error) {
	out := make(map[string][]netip.AddrPort)
	for _, item := range list {
		domain, servers, ok := strings.Cut(item, "=")
		domain = strings.ToLower(strings.TrimSuffix(strings.TrimSpace(domain), "."))
		if !ok || len(validation.IsDNS1123Subdomain(domain)) > 0 {
			return nil, fmt.Errorf("%q is not DOMAIN=ADDRESS[:PORT],…", item)
		}
		if len(out[domain]) > 0 {
			return nil, fmt.Errorf("%s is given twice", domain)
		}
		for _, text := range strings.Split(servers, ",") {
			server := addrPorts([]string{strings.TrimSpace(text)})
			if len(server) == 0 || server[0].Port() == 0 {
				return nil, fmt.Errorf("%q of %s is not an IP address, with a port or without", text, domain)
			}
			out[domain] = append(out[domain], server...)
		}
	}
	return out, nil
}
