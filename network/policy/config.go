package policy

import (
	"errors"
	"log/slog"
	"net"
	"net/netip"
	"time"

	corev1 "k8s.io/api/core/v1"
	"sigs.k8s.io/knftables"

	"timonel/network/feed"
	"timonel/network/tables"
)

// DefaultLook is how often it is looked whether the tables are as they were left.
const DefaultLook = 5 * time.Second

// Config describes the policies of one node.
type Config struct {
	// Table is the name of both tables.
	Table string
	// Bridge is the device that pods hang on.
	Bridge string
	// Store is where policies are known from.
	Store *feed.Store
	// Look is how often it is looked whether the tables are as they were left. Default
	// DefaultLook.
	Look time.Duration
	// Changed is called when Ready may have another answer than it had; may be nil.
	Changed func()
	// Event is called with what users should know of a pod; may be nil.
	Event func(pod Pod, reason, message string)
	// Watcher is that of all who write to nftables here. Default: one of its own.
	Watcher *tables.Watcher
	// Logger gets the rest.
	Logger *slog.Logger

	// nft makes the way to one table; tests put what fails there.
	nft func(family knftables.Family, table string) (knftables.Interface, error)
}

func (c *Config) validate() error {
	switch {
	case c.Table == "":
		return errors.New("policy config: Table is empty")
	case c.Bridge == "":
		return errors.New("policy config: Bridge is empty")
	case c.Store == nil:
		return errors.New("policy config: Store is nil")
	case c.Logger == nil:
		return errors.New("policy config: Logger is nil")
	}
	return nil
}

// Pod is one that runs on this node, in a network namespace of its own.
type Pod struct {
	UID, Namespace, Name string
	// Addresses are the pod's. One without any has no rules.
	Addresses []netip.Addr
	// Ports are those of its containers, for rules that name them.
	Ports []corev1.ContainerPort
	// Device is the node's end of the pod's link, and MAC the address of the pod's end.
	// Without them the pod is not held to its addresses.
	Device string
	MAC    net.HardwareAddr
}

// Guarded is a port that pods do not reach.
type Guarded struct {
	Protocol corev1.Protocol
	At       netip.AddrPort
}

// Reasons of the events.
const (
	ReasonRefused = "NetworkPolicyRefused"
)
