package pod

import (
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	runtimev1 "k8s.io/cri-api/pkg/apis/runtime/v1"

	"timonel/agent/hostile"
)

// dnsConfig is a pod's resolv.conf, by its dnsPolicy and dnsConfig.
func (m *Manager) dnsConfig(pod *corev1.Pod) (*runtimev1.DNSConfig, error) {
	node := func() (*runtimev1.DNSConfig, error) {
		raw, err := hostile.ReadRegular(m.cfg.ResolvConf, maxHosts)
		if errors.Is(err, fs.ErrNotExist) {
			return &runtimev1.DNSConfig{}, nil
		}
		if err != nil {
			return nil, fmt.Errorf("read the node's name servers: %w", err)
		}
		return parseResolvConf(string(raw)), nil
	}
	policy := pod.Spec.DNSPolicy
	if policy == corev1.DNSClusterFirst && pod.Spec.HostNetwork {
		policy = corev1.DNSDefault
	}
	cluster := policy == corev1.DNSClusterFirst || policy == corev1.DNSClusterFirstWithHostNet
	var cfg *runtimev1.DNSConfig
	var err error
	switch {
	case policy == corev1.DNSNone:
		cfg = &runtimev1.DNSConfig{}
	case cluster && len(m.cfg.ClusterDNS) > 0:
		host, err := node()
		if err != nil {
			return nil, err
		}
		d := m.cfg.ClusterDomain
		cfg = &runtimev1.DNSConfig{
			Servers:  slices.Clone(m.cfg.ClusterDNS),
			Searches: append([]string{pod.Namespace + ".svc." + d, "svc." + d, d}, host.Searches...),
			Options:  []string{"ndots:5"},
		}
	default:
		if cfg, err = node(); err != nil {
			return nil, err
		}
	}
	if extra := pod.Spec.DNSConfig; extra != nil {
		cfg.Servers = unique(append(cfg.Servers, extra.Nameservers...))
		cfg.Searches = unique(append(cfg.Searches, extra.Searches...))
		for _, o := range extra.Options {
			text := o.Name
			if o.Value != nil {
				text += ":" + *o.Value
			}
			cfg.Options = slices.DeleteFunc(cfg.Options, func(old string) bool { name, _, _ := strings.Cut(old, ":"); return name == o.Name })
			cfg.Options = append(cfg.Options, text)
		}
	}
	if len(cfg.Servers) > 3 { // what the C library reads
		cfg.Servers = cfg.Servers[:3]
	}
	return cfg, nil
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

func parseResolvConf(text string) *runtimev1.DNSConfig {
	cfg := &runtimev1.DNSConfig{}
	for line := range strings.Lines(text) {
		fields := strings.Fields(line)
		if len(fields) < 2 {
			continue
		}
		switch fields[0] {
		case "nameserver":
			cfg.Servers = append(cfg.Servers, fields[1])
		case "search":
			cfg.Searches = fields[1:]
		case "options":
			cfg.Options = append(cfg.Options, fields[1:]...)
		}
	}
	return cfg
}
