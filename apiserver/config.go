package apiserver

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"time"

	utilnet "k8s.io/apimachinery/pkg/util/net"
	"k8s.io/kubernetes/plugin/pkg/admission/noderestriction"

	"timonel/pki"
	"timonel/state/storage"
	"timonel/trust"
)

// Defaults of [Config].
const (
	DefaultPort                         = 6443
	DefaultUnreachableTolerationSeconds = 30
	DefaultDrainTimeout                 = 3 * time.Second
	DefaultEventTTL                     = time.Hour

	// Issuer is the issuer, and the default audience, of service account tokens.
	Issuer = "https://kubernetes.default.svc.cluster.local"
)

// DefaultServiceCIDR is the network of Services' cluster IPs; its first address
// is the kubernetes Service's.
var DefaultServiceCIDR = netip.MustParsePrefix("10.96.0.0/16")

// DefaultNodePortRange is upstream's, 30000-32767.
var DefaultNodePortRange = utilnet.PortRange{Base: 30000, Size: 2768}

// Config says what a [Server] serves, from where, and whom it asks.
type Config struct {
	// Name is the controller's, as in c1. Required.
	Name string

	// BindAddress is where to listen. Default: all addresses, IPv4.
	BindAddress net.IP
	// AdvertiseAddress is the address others reach this replica by. It must be
	// of the first ServiceCIDR's family. Required.
	AdvertiseAddress net.IP
	// Port to listen on. Default: 6443.
	Port int
	// Listener, when set, is used instead of BindAddress and Port.
	Listener net.Listener

	// Certificates are the files that [pki.Controller.WriteFiles] wrote. Required.
	Certificates pki.Files

	// Backend is the replicated state. Required.
	Backend storage.Backend
	// Trust says of whom certificates and tokens are good no more. Default: of
	// nobody.
	Trust *trust.Registry

	// ServiceCIDRs are the networks of Services: one, or one of each family. Default:
	// 10.96.0.0/16.
	ServiceCIDRs []netip.Prefix
	// DNSAddresses are those of the Service kube-system/kube-dns, which is made when there
	// is none. Default: none is made.
	DNSAddresses []netip.Addr
	// NodePortRange is where node ports come from. Default: 30000-32767.
	NodePortRange utilnet.PortRange

	// DialKubelet connects to the kubelet API of a node's agent, which speaks
	// plain HTTP on a connection that is already authenticated both ways.
	// Without it, logs, exec, attach, port-forward and node proxy answer 503.
	DialKubelet func(ctx context.Context, node string) (net.Conn, error)

	// Usage tells what nodes take. Without it there is no API metrics.k8s.io, but for
	// somebody's own.
	Usage Usage

	// NodeAddress says why a node may not say of itself that it has an address: it is
	// a controller's, another node's, of the pods' network. It is asked when a node
	// registers or changes its addresses. Default: nothing speaks against it but what
	// no node may have.
	NodeAddress func(node string, ip netip.Addr) error
	// PodAddress says why a node may not say of one of its pods that it has an address: it
	// is not of the node's ranges or, of a pod on the node's own network, not one of the
	// node's. It is asked for addresses that the pod did not have before. Default: nothing
	// speaks against any.
	PodAddress func(node string, hostNetwork bool, ip netip.Addr) error

	// Controllers lists the advertise addresses of the controllers that are
	// alive: the endpoints of the kubernetes Service. Default: AdvertiseAddress.
	Controllers func() []net.IP
	// IsLeader says whether this replica leads. What is done by one replica for
	// all (the kubernetes Service's endpoints, allocator repair) asks it.
	// Default: always.
	IsLeader func() bool

	// Health holds further checks, by name, for /livez and /readyz (a check in
	// ReadyOnly does not count for liveness) and for componentstatuses.
	Health map[string]func(ctx context.Context) error
	// ReadyOnly names the checks of Health that only matter to /readyz, such as
	// "is there a leader": restarting this replica would not help.
	ReadyOnly []string
	// Warnings, by name, say in /readyz?verbose what will be a problem soon, in the
	// name of a check that passes; "" is none. The words should be few and the same
	// for as long as the problem is.
	Warnings map[string]func() string
	// Paths are handlers of further paths under "/timonel/", behind
	// authentication and RBAC (nonResourceURLs, whose verb is the method in lower
	// case). One that ends in "/" serves what is below it too. Requests have no
	// deadline: handlers bound their own time.
	Paths map[string]http.Handler

	// EnableAdmission and DisableAdmission name admission plugins to turn on beside
	// upstream's default ones, or off. Those that hold nodes in their bounds stay on.
	EnableAdmission, DisableAdmission []string
	// AdmissionConfig is a file of kind AdmissionConfiguration, for plugins that have
	// one, such as PodSecurity. Default: none.
	AdmissionConfig string

	// UnreachableTolerationSeconds is how long a pod that does not say stays
	// bound to a node that is not ready or unreachable. Default: 30 (upstream:
	// 300).
	UnreachableTolerationSeconds int64
	// Caches keeps decoded objects to serve reads. Default: one of 16 MiB.
	Caches *storage.Caches
	// WatchBytes is how many bytes of events may wait for clients that have taken none for
	// some seconds. Beyond, the slowest are cut off. All open watches may hold four times as
	// much. Default and least: 16 MiB.
	WatchBytes int64
	// BodyBytes bounds what bodies of requests take in memory, all together: as they come, and
	// as objects, as far as can be told. Default and least: 96 MiB.
	BodyBytes int64
	// TunnelBytes bounds what streams from nodes take: logs, exec, attach and port-forward, as
	// if no client read. Those beyond it are refused. Default and least: 64 MiB.
	TunnelBytes int64
	// AnswerBytes bounds what answers of requests take in memory, all together: the objects
	// that are read, and what is made of them, as far as can be told. Default and least: 96
	// MiB.
	AnswerBytes int64
	// EventTTL is how long Events are kept. Default: 1 h.
	EventTTL time.Duration
	// DrainTimeout is how long Run waits for requests in flight after its
	// context ended. Default: 3 s.
	DrainTimeout time.Duration
}

// withDefaults returns c with what is unset set.
func (c Config) withDefaults() Config {
	if c.BindAddress == nil {
		c.BindAddress = net.IPv4zero
	}
	if c.Port == 0 {
		c.Port = DefaultPort
	}
	if len(c.ServiceCIDRs) == 0 {
		c.ServiceCIDRs = []netip.Prefix{DefaultServiceCIDR}
	}
	if c.NodePortRange.Size == 0 {
		c.NodePortRange = DefaultNodePortRange
	}
	if c.Controllers == nil {
		self := c.AdvertiseAddress
		c.Controllers = func() []net.IP { return []net.IP{self} }
	}
	if c.IsLeader == nil {
		c.IsLeader = func() bool { return true }
	}
	if c.UnreachableTolerationSeconds == 0 {
		c.UnreachableTolerationSeconds = DefaultUnreachableTolerationSeconds
	}
	if c.Caches == nil {
		c.Caches = storage.NewCaches(0)
	}
	if c.EventTTL == 0 {
		c.EventTTL = DefaultEventTTL
	}
	if c.DrainTimeout == 0 {
		c.DrainTimeout = DefaultDrainTimeout
	}
	return c
}

// Validate reports everything that is wrong with c, by field.
func (c Config) Validate() error {
	var errs []error
	wrong := func(field, format string, args ...any) {
		errs = append(errs, fmt.Errorf("apiserver config: %s %s", field, fmt.Sprintf(format, args...)))
	}
	if c.Name == "" {
		wrong("Name", "is required")
	}
	if c.Backend == nil {
		wrong("Backend", "is required")
	}
	switch {
	case c.AdvertiseAddress == nil:
		wrong("AdvertiseAddress", "is required")
	case c.AdvertiseAddress.IsUnspecified():
		wrong("AdvertiseAddress", "%s is not an address that others can reach", c.AdvertiseAddress)
	case len(c.ServiceCIDRs) > 0 && (c.AdvertiseAddress.To4() != nil) != c.ServiceCIDRs[0].Addr().Is4():
		wrong("AdvertiseAddress", "%s and the first of ServiceCIDRs, %s, must be of one IP family", c.AdvertiseAddress, c.ServiceCIDRs[0])
	}
	if len(c.ServiceCIDRs) > 2 || len(c.ServiceCIDRs) == 2 && c.ServiceCIDRs[0].Addr().Is4() == c.ServiceCIDRs[1].Addr().Is4() {
		wrong("ServiceCIDRs", "%v are not one network, or one of each IP family", c.ServiceCIDRs)
	}
	if c.Port < 0 || c.Port > 65535 {
		wrong("Port", "%d is not a port", c.Port)
	}
	for _, s := range c.ServiceCIDRs {
		if s.Addr().BitLen()-s.Bits() < 3 {
			wrong("ServiceCIDRs", "%s has fewer than 8 addresses", s)
		}
	}
	if r := c.NodePortRange; r.Size != 0 && (r.Base < 1 || r.Base+r.Size-1 > 65535) {
		wrong("NodePortRange", "%s is not a range of ports", r.String())
	}
	if c.UnreachableTolerationSeconds < 0 {
		wrong("UnreachableTolerationSeconds", "%d must not be negative", c.UnreachableTolerationSeconds)
	}
	for _, name := range c.DisableAdmission {
		switch {
		case name == noderestriction.PluginName || name == nodeNetworkName:
			wrong("DisableAdmission", "%s keeps nodes from what is not theirs, and cannot be turned off", name)
		case slices.Contains(c.EnableAdmission, name):
			wrong("DisableAdmission", "%s is in EnableAdmission too", name)
		}
	}
	for _, file := range []struct{ field, path string }{
		{"CA", c.Certificates.CA},
		{"FrontProxyCA", c.Certificates.FrontProxyCA},
		{"APIServingCert", c.Certificates.APIServingCert},
		{"APIServingKey", c.Certificates.APIServingKey},
		{"FrontProxyClientCert", c.Certificates.FrontProxyClientCert},
		{"FrontProxyClientKey", c.Certificates.FrontProxyClientKey},
		{"ServiceAccountKey", c.Certificates.ServiceAccountKey},
	} {
		if file.path == "" {
			wrong("Certificates."+file.field, "is required")
		}
	}
	for _, name := range c.ReadyOnly {
		if c.Health[name] == nil {
			wrong("ReadyOnly", "names %q, which is not a check in Health", name)
		}
	}
	for path, handler := range c.Paths {
		if !strings.HasPrefix(path, "/timonel/") || handler == nil {
			wrong("Paths", "%q: needs a handler, and a path under /timonel/", path)
		}
	}
	return errors.Join(errs...)
}
