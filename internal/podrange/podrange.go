// Package podrange says which addresses are the pods' and which part of them is one
// node's: for those who give the parts out, those who tell of them, and those who make
// routes to them.
package podrange

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
)

// Prefix lengths of a node's part where nothing else is said.
const (
	DefaultBits4 = 24
	DefaultBits6 = 64
)

// mostParts is into how many parts one network may be cut, as a power of two.
const mostParts = 16

// Ranges are the networks of a cluster's pods, in the order in which nodes get their
// parts of them: one part of each family, of the first network that has one left. The
// zero value is a cluster whose pods' addresses are not known.
type Ranges struct {
	Networks []netip.Prefix `json:"networks,omitempty"`
	// Bits4 and Bits6 are the prefix lengths of a node's part. Zero: the default.
	Bits4 int `json:"bits4,omitempty"`
	Bits6 int `json:"bits6,omitempty"`
}

// Parse reads networks as flags have them.
func Parse(networks []string) (Ranges, error) {
	var r Ranges
	for _, text := range networks {
		p, err := netip.ParsePrefix(text)
		if err != nil || p != p.Masked() {
			return r, fmt.Errorf("%q is not a network such as 10.244.0.0/16", text)
		}
		r.Networks = append(r.Networks, p)
	}
	return r, nil
}

// Validate says what is wrong with the ranges.
func (r Ranges) Validate() error {
	if len(r.Networks) == 0 {
		return errors.New("no network: give one such as 10.244.0.0/16")
	}
	for i, n := range r.Networks {
		bits := r.Bits(n)
		switch {
		case bits < n.Bits() || bits > n.Addr().BitLen():
			return fmt.Errorf("a node's part of %s is to be a /%d: give a prefix length of %d to %d", n, bits, n.Bits(), n.Addr().BitLen())
		case bits-n.Bits() > mostParts:
			return fmt.Errorf("%s would be cut into more than %d parts of a /%d: give a longer prefix of the network or a shorter one of nodes", n, 1<<mostParts, bits)
		case bits > n.Addr().BitLen()-2:
			return fmt.Errorf("a node's part of %s is to be a /%d, which has no address for a pod: give a shorter prefix", n, bits)
		}
		for _, other := range r.Networks[:i] {
			if other.Overlaps(n) {
				return fmt.Errorf("%s overlaps %s", n, other)
			}
		}
	}
	return nil
}

// Known says whether there are any.
func (r Ranges) Known() bool { return len(r.Networks) > 0 }

// Equal says whether both are the same.
func (r Ranges) Equal(o Ranges) bool {
	return slices.Equal(r.Networks, o.Networks) && r.Bits4 == o.Bits4 && r.Bits6 == o.Bits6
}

// Bits is the prefix length of a node's part of a network.
func (r Ranges) Bits(network netip.Prefix) int {
	switch {
	case network.Addr().Is4() && r.Bits4 != 0:
		return r.Bits4
	case network.Addr().Is4():
		return DefaultBits4
	case r.Bits6 != 0:
		return r.Bits6
	}
	return DefaultBits6
}

// Families are the networks by family, the first network's family first.
func (r Ranges) Families() [][]netip.Prefix {
	var out [][]netip.Prefix
	for _, n := range r.Networks {
		i := slices.IndexFunc(out, func(f []netip.Prefix) bool { return f[0].Addr().Is4() == n.Addr().Is4() })
		if i < 0 {
			out = append(out, nil)
			i = len(out) - 1
		}
		out[i] = append(out[i], n)
	}
	return out
}

// Contains says whether an address is a pod's.
func (r Ranges) Contains(ip netip.Addr) bool {
	return slices.ContainsFunc(r.Networks, func(n netip.Prefix) bool { return n.Contains(ip) })
}

// CheckPart says why a network, which is masked, cannot be a node's part.
func (r Ranges) CheckPart(p netip.Prefix) error {
	for _, n := range r.Networks {
		switch {
		case !n.Overlaps(p):
		case p.Bits() < n.Bits():
			return fmt.Errorf("%s is not of the pods' network %s", p, n)
		case p.Bits() != r.Bits(n):
			return fmt.Errorf("%s is not a /%d, which a node's range of %s is", p, r.Bits(n), n)
		default:
			return nil
		}
	}
	return fmt.Errorf("%s is not of the pods' network %s", p, r)
}

func (r Ranges) String() string {
	text := make([]string, 0, len(r.Networks))
	for _, n := range r.Networks {
		text = append(text, n.String())
	}
	return strings.Join(text, ", ")
}
