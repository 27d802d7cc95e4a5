package agent

import (
	"io"

	"timonel/network/address"
)

// newAddresses makes what answers for the addresses of Services of type LoadBalancer that
// this node is to announce.
func (a *Agent) newAddresses() error {
	network := a.cfg.network()
	var err error
	a.addresses, err = address.New(address.Config{
		Node: a.cfg.Name, NodeIPs: network.NodeIPs, Skip: []string{network.Bridge}, Store: a.known,
		Alone: func() bool {
			_, _, connected := a.stream.Connected()
			return !connected
		},
		Event: a.serviceEvent, Logger: a.cfg.Logger,
	})
	return err
}

// writeMetrics writes the figures of the network's rooms as Prometheus reads them.
func (a *Agent) writeMetrics(w io.Writer) {
	a.services.WriteMetrics(w)
	a.policies.WriteMetrics(w)
	a.addresses.WriteMetrics(w)
}
