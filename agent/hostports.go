package agent

import (
	"timonel/network/hostport"
	"timonel/network/policy"
)

// hostPortsTable is the name of the nftables table of host ports.
const hostPortsTable = "timonel-hostports"

// newHostPorts makes what carries packets to pods' host ports. With another pod network
// that is its own plugins' job.
func (a *Agent) newHostPorts() (err error) {
	if a.cfg.network().Foreign {
		return nil
	}
	a.hostPorts, err = hostport.New(hostport.Config{
		Table: hostPortsTable, Bridge: a.cfg.Bridge, ClusterPorts: a.cfg.clusterPorts(), Watcher: &a.watcher, Logger: a.cfg.Logger,
		Changed: func() { a.pods.WakeAll() },
	})
	if err == nil {
		a.tellHostPorts()
	}
	return err
}

// tellHostPorts says what is known of the cluster's addresses.
func (a *Agent) tellHostPorts() {
	if a.hostPorts != nil {
		a.hostPorts.SetNetworks(hostport.Networks{Own: prefixes(a.network.CIDRs()), Services: a.network.Guard().Services})
	}
}

// links is what is told of pods' links to the network: which policies and host ports go by.
type links struct {
	policies  *policy.Rules
	hostPorts *hostport.Ports // nil: another pod network's
}

func (a *Agent) links() links { return links{a.policies, a.hostPorts} }

// SetPod implements [pod.Policies].
func (l links) SetPod(p policy.Pod) {
	l.policies.SetPod(p)
	if l.hostPorts != nil {
		l.hostPorts.SetPod(hostport.Pod{UID: p.UID, Addresses: p.Addresses, Ports: p.Ports})
	}
}

// RemovePod implements [pod.Policies].
func (l links) RemovePod(uid string) {
	l.policies.RemovePod(uid)
	if l.hostPorts != nil {
		l.hostPorts.RemovePod(uid)
	}
}

// Ready implements [pod.Policies].
func (l links) Ready(uid string, policies int64) error {
	if err := l.policies.Ready(uid, policies); err != nil || l.hostPorts == nil {
		return err
	}
	return l.hostPorts.Ready(uid)
}
