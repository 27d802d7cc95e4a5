package service

import (
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	"sigs.k8s.io/knftables"

	"timonel/network/feed"
	"timonel/network/tables"
)

// Primary is what of --node-port-addresses means the node's own addresses.
const Primary = "primary"

// DefaultLook is how often it is looked whether the tables are as they were left.
const DefaultLook = 5 * time.Second

// Config describes one Proxy.
type Config struct {
	// Node is this node's name.
	Node string
	// NodeIPs are its addresses.
	NodeIPs []netip.Addr
	// Table is the name of both tables.
	Table string
	// Store is where the cluster's Services are known from.
	Store *feed.Store
	// NodePortAddresses are the networks of the addresses of this node where node ports
	// are, or "primary". Default: primary, NodeIPs.
	NodePortAddresses []string
	// ClusterPorts are those at which nodes and controllers talk to each other, by UDP and
	// TCP, at all of their addresses: no Service is given what is for them, whatever addresses
	// it claims.
	ClusterPorts []uint16
	// NameClients are networks beside the pods' from which the addresses that this node answers
	// itself (Networks.Local) may be asked; from the node itself they always may.
	NameClients []netip.Prefix
	// Look is how often it is looked whether the tables are as they were left. Default
	// DefaultLook.
	Look time.Duration
	// Event is called with what users should know of a Service; may be nil.
	Event func(service *corev1.Service, reason, message string)
	// Watcher is that of all who write to nftables here. Default: one of its own.
	Watcher *tables.Watcher
	// Logger gets the rest.
	Logger *slog.Logger

	// nft makes the way to one table; tests put what fails there.
	nft func(family knftables.Family, table string) (knftables.Interface, error)
}

func (c *Config) validate() error {
	switch {
	case c.Node == "":
		return errors.New("service config: Node is empty")
	case c.Table == "":
		return errors.New("service config: Table is empty")
	case c.Store == nil:
		return errors.New("service config: Store is nil")
	}
	if err := CheckNodePortAddresses(c.NodePortAddresses); err != nil {
		return fmt.Errorf("service config: NodePortAddresses: %w", err)
	}
	return nil
}

// CheckNodePortAddresses says what is wrong with a list of networks.
func CheckNodePortAddresses(list []string) error {
	for _, text := range list {
		if text == Primary && len(list) == 1 {
			continue
		}
		if _, err := netip.ParsePrefix(strings.TrimSpace(text)); err != nil {
			return fmt.Errorf("%q is not a network such as 192.0.2.0/24; to have node ports at the node's own addresses alone, say %q", text, Primary)
		}
	}
	return nil
}

// Networks are what a node knows of the cluster's addresses. It may change.
type Networks struct {
	// Pods are the networks of all pods, Own those of this node's.
	Pods, Own []netip.Prefix
	// Services is the networks of cluster addresses.
	Services []netip.Prefix
	// Local are cluster addresses that this node answers itself; they get no rules.
	Local []netip.Addr
}
