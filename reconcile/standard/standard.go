// Package standard says which reconcilers every cluster runs.
package standard

import (
	"crypto"
	"fmt"
	"net/netip"

	"timonel/internal/podrange"
	"timonel/reconcile"
	"timonel/reconcile/cleanup"
	"timonel/reconcile/node"
	"timonel/reconcile/policy"
	"timonel/reconcile/scheduler"
	"timonel/reconcile/service"
	"timonel/reconcile/storage"
	"timonel/reconcile/workload"
	"timonel/reconcile/workload/job"
	"timonel/sched"
)

// Config configures the reconcilers that every cluster runs.
type Config struct {
	// Scheduler says how pods are placed. Default sched.DefaultConfig().
	Scheduler sched.Config
	// Health holds the times after which a silent Node is declared unreachable.
	Health node.HealthConfig
	// Pods are the networks of all pods' addresses. Without any, Nodes get no range from
	// here.
	Pods podrange.Ranges
	// Services are those of cluster addresses.
	Services []netip.Prefix
	// RootCA is the cluster's CA bundle in PEM, published in every namespace.
	RootCA []byte
	// ServiceAccountKey signs the tokens in Secrets of type kubernetes.io/service-account-token.
	// Without one they stay empty.
	ServiceAccountKey crypto.Signer
	// TerminatedPods is how many pods that have ended may stay. Default 12500; negative: any number.
	TerminatedPods int
}

// Reconcilers returns the reconcilers that every cluster runs, the scheduler included.
// More can be added to the slice: each needs a name of its own and nothing else.
func Reconcilers(c Config) ([]reconcile.Reconciler, error) {
	if len(c.Scheduler.Profiles) == 0 {
		c.Scheduler = sched.DefaultConfig()
	}
	scheduler, err := scheduler.New(c.Scheduler)
	if err != nil {
		return nil, fmt.Errorf("standard: Config.Scheduler: %w", err)
	}
	reserved := service.Reserved{Pods: c.Pods.Networks, Services: c.Services}
	out := []reconcile.Reconciler{
		scheduler,
		node.NodeLifecycle{Health: c.Health},
		node.TaintEviction{Health: c.Health},
		workload.ReplicaSet{},
		workload.Deployment{},
		workload.StatefulSet{},
		workload.ReplicationController{},
		workload.DaemonSet{},
		job.Job{},
		job.CronJob{},
		job.TTL{},
		service.EndpointSlice{},
		service.Endpoints{},
		service.EndpointSliceMirroring{},
		service.LoadBalancer{Reserved: reserved},
		service.AddressHolder{Reserved: reserved},
		policy.NamespaceDefaults{RootCA: c.RootCA},
		policy.Disruption{},
		storage.Binder{},
		storage.Class{},
		storage.ClaimProtection{},
		storage.VolumeProtection{},
		storage.AttributesProtection{},
		storage.Ephemeral{},
		cleanup.Namespace{},
		cleanup.GarbageCollector{},
		cleanup.PodGC{},
		cleanup.TerminatedPodGC{Threshold: c.TerminatedPods},
	}
	if c.Pods.Known() {
		out = append(out, node.NodeIPAM{Pods: c.Pods})
	}
	if c.ServiceAccountKey != nil {
		signer, err := policy.NewTokenSigner(c.ServiceAccountKey)
		if err != nil {
			return nil, fmt.Errorf("standard: Config.ServiceAccountKey: %w", err)
		}
		out = append(out, policy.Tokens{Signer: signer, RootCA: c.RootCA})
	}
	return out, nil
}
