package service

import (
	"crypto/sha256"
	"encoding/base32"
	"strings"
	"time"
)

// Maps and sets of a table.
const (
	mapServiceIPs             = "service-ips"
	mapNodePorts              = "service-nodeports"
	mapEndpoints              = "endpoints"
	mapLocalEndpoints         = "local-endpoints"
	mapNodePortEndpoints      = "nodeport-endpoints"
	mapNodePortLocalEndpoints = "nodeport-local-endpoints"
	mapNoEndpoints            = "no-endpoints"
	mapNoEndpointsNodePorts   = "no-endpoints-nodeports"
	mapFirewall               = "firewall-ips"
	setClusterIPs             = "cluster-ips"
	setHairpin                = "hairpin"
	setPods                   = "pods"
	setNodePortIPs            = "nodeport-ips"
	setServiceNetworks        = "service-networks"
	setServed                 = "served-here"
)

// Kinds of chains and sets that one port has for itself.
const (
	kindCluster  = "cluster"
	kindLocal    = "local"
	kindExternal = "external"
	kindEndpoint = "endpoint"
	kindAffinity = "affinity"
	kindFirewall = "firewall"
)

// objects are what a Service is in the table.
type objects struct {
	elements []element
	chains   []chain
	sets     []affinitySet
	// What other Services may have as well. It is there while somebody has it.
	sharedElements []element
	sharedChains   []chain
}

// element is one of a map or, without a value, of a set.
type element struct{ in, key, value, comment string }

type chain struct {
	name  string
	rules []string
}

// affinitySet holds the clients of an endpoint, each for as long as timeout after its
// last connection.
type affinitySet struct {
	name    string
	timeout time.Duration
}

// share adds an element that other Services may have as well.
func (o *objects) share(e element) { o.sharedElements = appendNew(o.sharedElements, e) }

// common adds a chain that other Services may have as well, and returns its name.
func (o *objects) common(c chain) string {
	for _, have := range o.sharedChains {
		if have.name == c.name {
			return c.name
		}
	}
	o.sharedChains = append(o.sharedChains, c)
	return c.name
}

// join makes a key or value of parts, as nft prints them.
func join(parts ...string) string { return strings.Join(parts, " . ") }

// nameLimit keeps names within nft's 255 bytes.
const nameLimit = 220

// ownName is the name of a chain or set that one port has for itself. The hash keeps
// names apart that are too long or have letters that nft does not take.
func ownName(kind, of string) string {
	sum := sha256.Sum256([]byte(of))
	clean := strings.Map(func(r rune) rune {
		switch {
		case r >= 'a' && r <= 'z', r >= 'A' && r <= 'Z', r >= '0' && r <= '9', strings.ContainsRune("_./-", r):
			return r
		}
		return '.' // of IPv6 addresses, the colons
	}, of)
	return kind + "/" + base32.StdEncoding.EncodeToString(sum[:5]) + "/" + clean[:min(len(clean), nameLimit)]
}
