package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"slices"
	"time"

	"timonel/agent/hostile"
	"timonel/agent/pod"
	"timonel/internal/durable"
	"timonel/network/dns"
	pb "timonel/proto/timonel/v1"
)

const (
	// defaultDomain is the cluster's until a controller says another.
	defaultDomain = "cluster.local"
	// namesRetry is when what the machine refused is tried again.
	namesRetry = 2 * time.Second
)

// NoClusterDNS as the only one of Config.ClusterDNS says that there is none.
const NoClusterDNS = "none"

// names is what the controllers say of the cluster's DNS. It is kept on the disk, so
// that pods find names after a restart that no controller sees.
type names struct {
	Domain    string       `json:"domain"`
	Addresses []netip.Addr `json:"addresses"`
	// Pods are the networks of all pods, which are answered.
	Pods []netip.Prefix `json:"pods,omitempty"`
}

func (n names) equal(o names) bool {
	return n.Domain == o.Domain && slices.Equal(n.Addresses, o.Addresses) && slices.Equal(n.Pods, o.Pods)
}

func (c *Config) namesPath() string { return c.dir("dns.json") }

// dnsAddresses are the addresses that this agent has put on the machine.
func (c *Config) dnsAddresses() *dns.Addresses { return dns.NewAddresses(c.dir("dns-addresses.json")) }

// loadNames reads what was known before this process.
func (a *Agent) loadNames() names {
	var n names
	raw, err := hostile.ReadRegular(a.cfg.namesPath(), hostile.MaxOwn)
	if err == nil {
		err = json.Unmarshal(raw, &n)
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		a.log.Warn("what is known of the cluster's DNS cannot be read; it comes anew with the next controller", "error", err)
		return names{}
	}
	return n
}

// learnNames takes what a controller says of the cluster's DNS. One that says nothing
// is older than it.
func (a *Agent) learnNames(c *pb.Cluster) {
	if c.ClusterDomain == "" {
		return
	}
	next := names{Domain: c.ClusterDomain, Pods: podNetworks(c)}
	for _, text := range c.ClusterDns {
		ip, err := netip.ParseAddr(text)
		if err != nil || !ip.IsGlobalUnicast() {
			a.log.Error("the controller says an address of the cluster's DNS that cannot be one", "address", text)
			continue
		}
		next.Addresses = append(next.Addresses, ip)
	}
	a.mu.Lock()
	same := a.names.equal(next)
	a.names = next
	a.mu.Unlock()
	if same {
		return
	}
	raw, err := json.Marshal(next)
	if err == nil {
		err = durable.WriteFile(a.cfg.namesPath(), raw, 0o600)
	}
	if err != nil {
		a.log.Error("keep what is known of the cluster's DNS", "error", err)
	}
	select {
	case a.namesChanged <- struct{}{}:
	default:
	}
}

// serves says at which addresses this agent answers for the cluster's names, and for
// which domain.
func (a *Agent) serves() names {
	a.mu.Lock()
	n := a.names
	a.mu.Unlock()
	if a.cfg.ClusterDomain != "" {
		n.Domain = a.cfg.ClusterDomain
	}
	if n.Domain == "" {
		n.Domain = defaultDomain
	}
	if len(a.cfg.ClusterDNS) > 0 {
		n.Addresses = nil // somebody else's, or none
	}
	return n
}

// podDNS is what pods are told of the cluster's name servers.
func (a *Agent) podDNS() pod.DNS {
	n := a.serves()
	out := pod.DNS{Domain: n.Domain}
	for _, ip := range n.Addresses {
		out.Servers = append(out.Servers, ip.String())
	}
	if len(a.cfg.ClusterDNS) > 0 && a.cfg.ClusterDNS[0] != NoClusterDNS {
		out.Servers = a.cfg.ClusterDNS
	}
	return out
}

// serveNames answers for the cluster's names at its DNS addresses, until ctx ends. The
// addresses stay on the machine for the next agent.
func (a *Agent) serveNames(ctx context.Context) error {
	said := ""
	for ctx.Err() == nil {
		err := a.serveNamesOnce(ctx)
		if err == nil {
			said = ""
			continue
		}
		if text := err.Error(); text != said {
			said = text
			a.log.Error("pods cannot look up names; trying again", "error", err)
		}
		select {
		case <-ctx.Done():
		case <-a.namesChanged:
		case <-time.After(namesRetry):
		}
	}
	return nil
}

// serveNamesOnce answers until the addresses or the domain are others.
func (a *Agent) serveNamesOnce(ctx context.Context) error {
	now := a.serves()
	if err := a.cfg.dnsAddresses().Set(now.Addresses); err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	done := make(chan struct{})
	close(done)
	if len(now.Addresses) > 0 {
		askers := now.Pods
		if len(askers) > 0 { // none: everybody is answered
			askers = slices.Concat(askers, a.cfg.NameClients)
		}
		s, err := dns.New(dns.Config{
			Domain: now.Domain, Addresses: now.Addresses, Pods: askers, Store: a.known, ResolvConf: a.cfg.ResolvConf, Stubs: a.cfg.StubDomains, Logger: a.log,
		})
		if err != nil {
			return fmt.Errorf("the cluster's DNS: %w", err)
		}
		done = make(chan struct{})
		go func() {
			defer close(done)
			_ = s.Run(ctx) // which has no error but that it ended
		}()
	}
	defer func() { cancel(); <-done }()
	look := time.NewTicker(networkLook)
	defer look.Stop()
	for a.serves().equal(now) {
		select {
		case <-ctx.Done():
			return nil
		case <-a.namesChanged:
		case <-look.C: // somebody may have taken them away
			if err := a.cfg.dnsAddresses().Set(now.Addresses); err != nil {
				return err
			}
		}
	}
	return nil
}
