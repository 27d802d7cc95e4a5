package timonelv1

import (
	"net/netip"
	"strings"
)

// How the cluster says which node announces an address of Services of type LoadBalancer:
// in a Lease of the address. Who holds it announces, and the Lease's resourceVersion is the
// number by which a later holder outdoes an earlier one.
const (
	// AddressNamespace is where the Leases are, AddressLease what their names begin with.
	AddressNamespace = "kube-system"
	AddressLease     = "load-balancer-"
	// AddressAnnotation has the address, as netip prints it.
	AddressAnnotation = "timonel.io/load-balancer-address"
)

// AddressLeaseName is the name of the Lease of an address.
func AddressLeaseName(ip netip.Addr) string {
	return AddressLease + strings.ReplaceAll(ip.StringExpanded(), ":", "-")
}

// LeasedAddress is the address that a Lease of AddressNamespace is of, if it is of one.
func LeasedAddress(name string, annotations map[string]string) (netip.Addr, bool) {
	ip, err := netip.ParseAddr(annotations[AddressAnnotation])
	return ip, err == nil && ip.Zone() == "" && name == AddressLeaseName(ip)
}
