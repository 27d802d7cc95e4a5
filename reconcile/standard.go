package reconcile

import (
	"fmt"
	"net/netip"

	"timonel/sched"
)

// StandardConfig configures the reconcilers that every cluster runs.
type StandardConfig struct {
	// Scheduler says how pods are placed. Default sched.DefaultConfig().
	Scheduler sched.Config
	// Health holds the times after which a silent Node is declared unreachable.
	Health HealthConfig
	// ClusterCIDR is the range of all pods' addresses, NodeBits the prefix length of
	// one Node's part. Without a range Nodes get none from here.
	ClusterCIDR netip.Prefix
	NodeBits    int
	// RootCA is the cluster's CA bundle in PEM, published in every namespace.
	RootCA []byte
	// TerminatedPods is how many pods that have ended may stay. Default 12500; negative: any number.
	TerminatedPods int
}

// Standard returns the reconcilers that every cluster runs, the scheduler included.
// More can be added to the slice: each needs a name of its own and nothing else.
func Standard(c StandardConfig) ([]Reconciler, error) {
	if c.Scheduler.SchedulerName == "" {
		c.Scheduler = sched.DefaultConfig()
	}
	scheduler, err := NewScheduler(c.Scheduler)
	if err != nil {
		return nil, fmt.Errorf("reconcile: StandardConfig.Scheduler: %w", err)
	}
	out := []Reconciler{
		scheduler,
		NodeLifecycle{Health: c.Health},
		TaintEviction{Health: c.Health},
		ReplicaSet{},
		Deployment{},
		EndpointSlice{},
		NamespaceDefaults{RootCA: c.RootCA},
		Namespace{},
		GarbageCollector{},
		PodGC{},
		TerminatedPodGC{Threshold: c.TerminatedPods},
	}
	if c.ClusterCIDR.IsValid() {
		out = append(out, NodeIPAM{ClusterCIDR: c.ClusterCIDR, NodeBits: c.NodeBits})
	}
	return out, nil
}
