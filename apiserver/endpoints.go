package apiserver

import (
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apiserver/pkg/storage"
	"k8s.io/client-go/kubernetes"
	"k8s.io/kubernetes/pkg/controlplane/reconcilers"
)

// endpointRecheck is how often endpoints are read although the controllers alive
// are the same, in case that somebody else changed them.
const endpointRecheck = time.Minute

// controllerEndpoints keeps the kubernetes Service's endpoints equal to the
// controllers that are alive. Upstream's API servers each renew a lease for
// that; here gossip knows, and the leader alone writes, when there is a change.
type controllerEndpoints struct {
	reconcilers.EndpointReconciler // upstream's, over gossip instead of leases
	config                         Config
	stopped                        atomic.Bool

	mu      sync.Mutex
	written []string // what the endpoints were at the time of checked
	checked time.Time
}

func newControllerEndpoints(c Config, client kubernetes.Interface) *controllerEndpoints {
	adapter := reconcilers.NewEndpointsAdapter(client.CoreV1(), client.DiscoveryV1())
	return &controllerEndpoints{
		EndpointReconciler: reconcilers.NewLeaseEndpointReconciler(adapter, aliveControllers{c.Controllers}),
		config:             c,
	}
}

// ReconcileEndpoints implements reconcilers.EndpointReconciler.
func (e *controllerEndpoints) ReconcileEndpoints(service string, ip net.IP, ports []corev1.EndpointPort, reconcilePorts bool) error {
	if e.stopped.Load() || !e.config.IsLeader() {
		e.forget()
		return nil
	}
	alive, err := aliveControllers{e.config.Controllers}.ListLeases()
	if err != nil {
		return err
	}
	if len(alive) == 0 {
		return nil // a controller on loopback: no endpoint may have such an address
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	if slices.Equal(alive, e.written) && time.Since(e.checked) < endpointRecheck {
		return nil
	}
	if err := e.EndpointReconciler.ReconcileEndpoints(service, ip, ports, reconcilePorts); err != nil {
		return err
	}
	e.written, e.checked = alive, time.Now()
	return nil
}

// forget makes the next reconciliation read the endpoints again.
func (e *controllerEndpoints) forget() {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.written = nil
}

// RemoveEndpoints implements reconcilers.EndpointReconciler. There is nothing to
// do: this replica leaves the gossip pool, and who leads then notices.
func (e *controllerEndpoints) RemoveEndpoints(service string, _ net.IP, _ []corev1.EndpointPort) error {
	if e.stopped.Load() {
		return nil
	}
	return storage.NewKeyNotFoundError(service, 0) // nothing was left from before
}

// StopReconciling implements reconcilers.EndpointReconciler.
func (e *controllerEndpoints) StopReconciling() {
	e.stopped.Store(true)
	e.EndpointReconciler.StopReconciling()
}

// aliveControllers implements reconcilers.Leases from gossip.
type aliveControllers struct{ list func() []net.IP }

// ListLeases returns the addresses of the controllers alive that an endpoint may
// have, sorted.
func (a aliveControllers) ListLeases() ([]string, error) {
	var addresses []string
	for _, ip := range a.list() {
		if !ip.IsLoopback() && !ip.IsLinkLocalUnicast() && !ip.IsUnspecified() {
			addresses = append(addresses, ip.String())
		}
	}
	slices.Sort(addresses)
	return slices.Compact(addresses), nil
}

// UpdateLease does nothing: gossip is the lease.
func (aliveControllers) UpdateLease(string) error { return nil }

// RemoveLease does nothing.
func (aliveControllers) RemoveLease(string) error { return nil }

// Destroy does nothing.
func (aliveControllers) Destroy() {}
