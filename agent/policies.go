package agent

import (
	"net"
	"net/netip"
	"slices"
	"strconv"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"

	"timonel/network/policy"
)

// policyTable is the name of the nftables tables of network policies.
const policyTable = "timonel-policy"

// Ports of controllers where they are by default, for controllers that do not say theirs.
var controllerPorts = []uint16{7444, 7946, 7947} // Raft's, and both pools' of gossip

// metadata are where clouds tell a machine what it is and who it may be.
var metadata = []netip.AddrPort{netip.MustParseAddrPort("169.254.169.254:80"), netip.MustParseAddrPort("[fd00:ec2::254]:80")}

// newPolicies makes what holds pods to network policies.
func (a *Agent) newPolicies() (err error) {
	a.policies, err = policy.New(policy.Config{
		Table: policyTable, Bridge: a.cfg.Bridge, Store: a.known, Watcher: &a.watcher, Event: a.policyEvent, Logger: a.cfg.Logger,
		Changed: func() { a.pods.WakeAll() },
	})
	if err == nil {
		a.tellPolicies()
	}
	return err
}

// tellPolicies says which ports are the cluster's own.
func (a *Agent) tellPolicies() {
	var list []policy.Guarded
	add := func(protocol corev1.Protocol, ip netip.Addr, port uint16) {
		if g := (policy.Guarded{Protocol: protocol, At: netip.AddrPortFrom(ip.Unmap(), port)}); ip.IsValid() && port != 0 && !slices.Contains(list, g) {
			list = append(list, g)
		}
	}
	if !a.cfg.PodsReachCluster {
		controllers := a.controllers()
		ports := controllerPorts
		a.mu.Lock()
		if a.cluster != nil {
			controllers = append(controllers, a.cluster.Controllers...)
			if len(a.cluster.ControllerPorts) > 0 {
				ports = nil
			}
			for _, port := range a.cluster.ControllerPorts {
				ports = append(ports, uint16(port))
			}
		}
		a.mu.Unlock()
		for _, text := range controllers {
			if at, err := netip.ParseAddrPort(text); err == nil {
				add(corev1.ProtocolTCP, at.Addr(), at.Port())
				for _, port := range ports {
					add(corev1.ProtocolTCP, at.Addr(), port)
					add(corev1.ProtocolUDP, at.Addr(), port)
				}
			}
		}
		port := uint16(0)
		if _, text, err := net.SplitHostPort(a.cfg.GossipAddress); err == nil {
			n, _ := strconv.ParseUint(text, 10, 16)
			port = uint16(n)
		}
		addresses := []string{}
		for n := range a.known.View().Nodes() {
			addresses = append(addresses, n.GetNodeAddress())
		}
		for _, ip := range a.cfg.NodeIPs {
			addresses = append(addresses, ip.String())
		}
		for _, text := range addresses {
			if ip, err := netip.ParseAddr(text); err == nil {
				add(corev1.ProtocolTCP, ip, port)
				add(corev1.ProtocolUDP, ip, port)
			}
		}
	}
	if a.cfg.BlockMetadata {
		for _, at := range metadata {
			add(corev1.ProtocolTCP, at.Addr(), at.Port())
		}
	}
	a.policies.SetGuarded(list)
}

// policyEvent tells users why a pod is cut off.
func (a *Agent) policyEvent(p policy.Pod, reason, message string) {
	a.event(corev1.ObjectReference{APIVersion: "v1", Kind: "Pod", Namespace: p.Namespace, Name: p.Name, UID: types.UID(p.UID)}, corev1.EventTypeWarning, reason, message)
}
