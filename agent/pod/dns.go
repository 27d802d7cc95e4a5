package pod

import (
	"fmt"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	runtimev1 "k8s.io/cri-api/pkg/apis/runtime/v1"

	"timonel/network/dns/resolvconf"
)

// What C libraries read of a resolv.conf, and so upstream's limits.
const (
	maxNameservers  = 3
	maxSearchPaths  = 32
	maxSearchLength = 2048
	maxSearchPath   = 253
)

// DNS is what pods are told of the cluster's name servers.
type DNS struct {
	// Servers are the cluster's. Without any, pods use the node's.
	Servers []string
	// Domain is the cluster's.
	Domain string
}

// podDNS is a pod's resolv.conf, and what of it had to be left out, or cannot be had,
// as events say it.
type podDNS struct {
	*runtimev1.DNSConfig
	omitted []string
	missing string
}

// dnsConfig is a pod's resolv.conf, by its dnsPolicy and dnsConfig.
func (m *Manager) dnsConfig(pod *corev1.Pod) (podDNS, error) {
	node, err := resolvconf.Read(m.cfg.ResolvConf)
	if err != nil {
		return podDNS{}, fmt.Errorf("read the node's name servers: %w", err)
	}
	cluster := m.cfg.DNS()
	cfg := podDNS{DNSConfig: &runtimev1.DNSConfig{Servers: node.Servers, Searches: node.Searches, Options: node.Options}}
	policy := pod.Spec.DNSPolicy
	if policy == corev1.DNSClusterFirst && pod.Spec.HostNetwork {
		policy = corev1.DNSDefault
	}
	switch policy {
	case corev1.DNSNone:
		cfg.DNSConfig = &runtimev1.DNSConfig{}
	case corev1.DNSDefault:
	default:
		if len(cluster.Servers) == 0 {
			cfg.missing = fmt.Sprintf("pod: %q. kubelet does not have ClusterDNS IP configured and cannot create Pod using %q policy. Falling back to %q policy.",
				fmt.Sprintf("%s_%s(%s)", pod.Name, pod.Namespace, pod.UID), corev1.DNSClusterFirst, corev1.DNSDefault)
			break
		}
		d := cluster.Domain
		cfg.DNSConfig = &runtimev1.DNSConfig{
			Servers:  slices.Clone(cluster.Servers),
			Searches: unique(append([]string{pod.Namespace + ".svc." + d, "svc." + d, d}, node.Searches...)),
			Options:  []string{"ndots:5"},
		}
	}
	if extra := pod.Spec.DNSConfig; extra != nil {
		cfg.Servers = unique(append(cfg.Servers, extra.Nameservers...))
		cfg.Searches = unique(append(cfg.Searches, extra.Searches...))
		for _, o := range extra.Options {
			text := o.Name
			if o.Value != nil && *o.Value != "" {
				text += ":" + *o.Value
			}
			cfg.Options = resolvconf.MergeOptions(cfg.Options, text)
		}
	}
	cfg.fit()
	return cfg, nil
}

// fit leaves out what no C library would read, and says so.
func (c *podDNS) fit() {
	if len(c.Servers) > maxNameservers {
		c.Servers = c.Servers[:maxNameservers]
		c.omitted = append(c.omitted, "Nameserver limits were exceeded, some nameservers have been omitted, the applied nameserver line is: "+strings.Join(c.Servers, " "))
	}
	before := len(c.Searches)
	searches := c.Searches[:min(before, maxSearchPaths)]
	// Some C libraries end a program whose resolv.conf has a longer one.
	searches = slices.DeleteFunc(slices.Clone(searches), func(s string) bool { return len(s) > maxSearchPath })
	for len(strings.Join(searches, " ")) > maxSearchLength {
		searches = searches[:len(searches)-1]
	}
	if c.Searches = searches; len(searches) < before {
		c.omitted = append(c.omitted, "Search Line limits were exceeded, some search paths have been omitted, the applied search line is: "+strings.Join(searches, " "))
	}
}

// tellDNS tells of what a pod's resolv.conf lacks.
func (w *worker) tellDNS(pod *corev1.Pod) error {
	cfg, err := w.m.dnsConfig(pod)
	if err != nil {
		return err
	}
	for _, text := range cfg.omitted {
		w.event(pod, corev1.EventTypeWarning, "DNSConfigForming", text, "")
	}
	if cfg.missing != "" {
		w.eventOnce(pod, corev1.EventTypeWarning, "MissingClusterDNS", cfg.missing, "")
	}
	return nil
}

func unique(list []string) []string {
	var out []string
	for _, s := range list {
		if !slices.Contains(out, s) {
			out = append(out, s)
		}
	}
	return out
}
