package agent

import (
	"errors"

	corev1 "k8s.io/api/core/v1"

	"timonel/network/service"
)

// servicesTable is the name of the nftables tables of Services.
const servicesTable = "timonel-services"

// newServices makes what carries packets to Services. It begins with what was known of
// the cluster's addresses before this process.
func (a *Agent) newServices() error {
	var err error
	a.services, err = service.New(service.Config{
		Node: a.cfg.Name, NodeIPs: a.cfg.network().NodeIPs, Table: servicesTable, Store: a.known, Watcher: &a.watcher, NodePortAddresses: a.cfg.NodePortAddresses, NameClients: a.cfg.NameClients,
		ClusterPorts: a.cfg.clusterPorts(), Event: a.serviceEvent, Logger: a.cfg.Logger,
	})
	if err == nil {
		a.tellServices()
	}
	return err
}

// tellServices says what is known of the cluster's addresses.
func (a *Agent) tellServices() {
	var n service.Networks
	guard := a.network.Guard()
	n.Own, n.Pods, n.Services = prefixes(a.network.CIDRs()), guard.Pods.Networks, guard.Services
	n.Local = a.serves().Addresses
	a.services.SetNetworks(n)
}

// servicesIn are the Services of a namespace, or an error while a controller that is
// going to say them has not said them.
func (a *Agent) servicesIn(namespace string) ([]*corev1.Service, error) {
	v := a.known.View()
	a.mu.Lock()
	c := a.cluster
	a.mu.Unlock()
	if !v.Synced() && c != nil && c.RoutesInNetwork {
		return nil, errors.New("services have not yet been read at least once, cannot construct envvars")
	}
	return v.ServicesIn(namespace), nil
}

// serviceEvent tells users what of their Service does not work on this node.
func (a *Agent) serviceEvent(s *corev1.Service, reason, message string) {
	a.event(corev1.ObjectReference{
		APIVersion: "v1", Kind: "Service", Namespace: s.Namespace, Name: s.Name, UID: s.UID, ResourceVersion: s.ResourceVersion,
	}, corev1.EventTypeWarning, reason, message)
}
