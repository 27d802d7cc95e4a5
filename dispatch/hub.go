package dispatch

import (
	"context"
	"errors"
	"net/netip"
	"slices"
	"sync"
	"time"

	"google.golang.org/protobuf/proto"
	certificatesv1 "k8s.io/api/certificates/v1"
	corev1 "k8s.io/api/core/v1"
	nodev1 "k8s.io/api/node/v1"
	storagev1 "k8s.io/api/storage/v1"

	"timonel/dispatch/network"
	pb "timonel/proto/timonel/v1"
	"timonel/state/objects"
)

// hub knows the sessions here, and wakes those that a change concerns.
type hub struct {
	d *Dispatcher

	mu       sync.Mutex
	sessions map[string]*session
	users    map[objKey]map[*session]struct{} // who is to hear of an object
	cluster  *pb.Cluster
	older    *pb.Cluster   // for agents that do not call Network; nil: not made yet
	nodes    chan struct{} // some changed, or older is wanted
	// controllers are their addresses when they were last looked at; followCluster
	// alone uses them.
	controllers []netip.Addr
	keys        *nodesKeys
	feeds       map[*feed]struct{}
}

func newHub(d *Dispatcher) *hub {
	return &hub{
		d: d, sessions: make(map[string]*session), users: make(map[objKey]map[*session]struct{}),
		nodes: make(chan struct{}, 1), feeds: make(map[*feed]struct{}),
	}
}

// run follows the objects until ctx ends.
func (h *hub) run(ctx context.Context) error {
	var wait sync.WaitGroup
	defer wait.Wait()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	wait.Go(func() { h.followCluster(ctx) })

	var after, progress int64
	for {
		changes, err := h.d.config.Objects.Changes(ctx, after)
		if err != nil {
			return err
		}
		after = changes.Snapshot.Revision()
		if changes.Reset || after-progress >= progressEvery {
			progress = after
			h.wakeAll()
			notify(h.nodes)
		}
		h.wakeFor(changes.Changed)
	}
}

// wakeFor wakes the sessions that changes concern.
func (h *hub) wakeFor(changes []objects.Changed) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, c := range changes {
		for _, m := range []*objects.Meta{c.Old, c.New} {
			if m == nil {
				continue
			}
			switch o := m.Object.(type) {
			case *corev1.Pod:
				if s := h.sessions[o.Spec.NodeName]; s != nil {
					notify(s.wake)
				}
			case *corev1.Node:
				notify(h.nodes)
				if s := h.sessions[o.Name]; s != nil && m == c.New {
					s.nodeChanged(o)
					notify(s.wake) // sends nothing when no pod is held against what changed
				}
			case *corev1.ConfigMap:
				h.wakeUsers(objKey{kindConfigMap, o.Namespace, o.Name})
			case *corev1.Secret:
				h.wakeUsers(objKey{kindSecret, o.Namespace, o.Name})
			case *corev1.ServiceAccount:
				h.wakeUsers(objKey{kindServiceAccount, o.Namespace, o.Name})
			case *corev1.PersistentVolumeClaim:
				h.wakeUsers(objKey{kindClaim, o.Namespace, o.Name})
			case *storagev1.CSIDriver:
				h.wakeUsers(objKey{kindDriver, "", o.Name})
			case *storagev1.VolumeAttachment:
				h.wakeUsers(objKey{kindAttachment, "", o.Name})
			case *certificatesv1.ClusterTrustBundle:
				h.wakeUsers(objKey{kindTrustBundle, "", o.Name})
				h.wakeUsers(objKey{kindSigner, "", o.Spec.SignerName})
			case *nodev1.RuntimeClass:
				h.wakeUsers(objKey{kindRuntimeClass, "", o.Name})
			case *certificatesv1.PodCertificateRequest:
				h.wakeUsers(objKey{kindPodCertificate, o.Namespace, o.Name})
				h.wakeUsers(objKey{kindCertified, o.Namespace, string(o.Spec.PodUID)})
			case *corev1.PersistentVolume:
				h.wakeUsers(objKey{kindVolume, "", o.Name})
				if s := h.sessions[o.Annotations[objects.NodeAnnotation]]; s != nil && o.DeletionTimestamp != nil {
					notify(s.wake)
				}
			}
		}
	}
}

func (h *hub) wakeUsers(k objKey) {
	for s := range h.users[k] {
		notify(s.wake)
	}
}

func (h *hub) wakeAll() {
	all := h.d.config.Objects.Snapshot().Nodes()
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, s := range h.sessions {
		notify(s.wake)
		if live, ok := all.Get("", s.node); ok {
			s.nodeChanged(live)
		}
	}
}

// notify wakes who waits on a channel of capacity 1.
func notify(wake chan<- struct{}) {
	select {
	case wake <- struct{}{}:
	default:
	}
}

// followCluster keeps the message Cluster up to date: when nodes change, and
// when gossip sees other controllers.
func (h *hub) followCluster(ctx context.Context) {
	events := h.d.config.Gossip.Subscribe(ctx)
	for {
		h.updateCluster()
		select {
		case <-ctx.Done():
			return
		case <-h.nodes:
		case _, ok := <-events:
			if !ok {
				events = nil
			}
		}
		timer := time.NewTimer(clusterDelay)
	merge:
		for {
			select {
			case <-ctx.Done():
				timer.Stop()
				return
			case _, ok := <-events:
				if !ok {
					events = nil
				}
			case <-timer.C:
				break merge
			}
		}
	}
}

func (h *hub) updateCluster() {
	config := h.d.config.Network
	next := &pb.Cluster{Controllers: slices.Sorted(slices.Values(h.d.config.Controllers())), RoutesInNetwork: true}
	for _, p := range config.Pods.Networks {
		next.PodNetworks = append(next.PodNetworks, p.String())
	}
	if config.Pods.Known() {
		first := config.Pods.Networks[0]
		next.PodNetwork, next.NodeBits = first.String(), uint32(config.Pods.Bits(first))
		next.NodeBits4, next.NodeBits6 = uint32(config.Pods.Bits4), uint32(config.Pods.Bits6)
	}
	for _, p := range config.Services {
		next.ServiceNetworks = append(next.ServiceNetworks, p.String())
	}
	if len(config.Services) > 0 {
		next.ServiceNetwork = next.ServiceNetworks[0]
	}
	next.ClusterDomain = config.Domain
	for _, ip := range config.DNS {
		next.ClusterDns = append(next.ClusterDns, ip.String())
	}
	for _, port := range config.Ports {
		next.ControllerPorts = append(next.ControllerPorts, uint32(port))
	}
	if addresses := config.controllers(); !slices.Equal(addresses, h.controllers) {
		h.controllers = addresses
		h.d.network.Recheck()
	}
	var older *pb.Cluster
	if h.hasOlder() {
		older = proto.CloneOf(next)
		older.RoutesInNetwork = false
		older.Routes, _ = network.AllRoutes(config, h.d.config.Objects.Snapshot().Nodes().All())
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	same, sameOlder := proto.Equal(next, h.cluster), proto.Equal(older, h.older)
	if !same {
		h.cluster = next
	}
	if !sameOlder {
		h.older = older
	}
	if same && sameOlder {
		return
	}
	for _, s := range h.sessions {
		notify(s.wake)
	}
}

// hasOlder says whether an agent is here that does not call Network.
func (h *hub) hasOlder() bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, s := range h.sessions {
		if !s.network {
			return true
		}
	}
	return false
}

// currentCluster is what a session's agent is told of the cluster; nil: nothing yet.
func (h *hub) currentCluster(s *session) *pb.Cluster {
	h.mu.Lock()
	defer h.mu.Unlock()
	if s.network {
		return h.cluster
	}
	return h.older
}

var errReplaced = errors.New("the agent opened a newer stream")

// add makes s its node's session; an older one ends.
func (h *hub) add(s *session) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.d.config.Trust.Instance(s.node) != s.instance {
		s.cancel(errSuperseded) // another was admitted since, and may be served here already
		return
	}
	if old := h.sessions[s.node]; old != nil {
		old.cancel(errReplaced)
	}
	h.sessions[s.node] = s
	if !s.network {
		notify(h.nodes)
	}
	h.publish(s.node, up)
}

// remove forgets s. It is told to the others unless a newer stream is here.
func (h *hub) remove(s *session, goodbye bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	s.removed = true
	for k := range s.refs {
		h.dropUser(k, s)
	}
	if h.sessions[s.node] != s {
		return
	}
	delete(h.sessions, s.node)
	if goodbye {
		h.publish(s.node, left)
	} else {
		h.publish(s.node, down)
	}
}

func (h *hub) session(node string) *session {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.sessions[node]
}

func (h *hub) connected() []string {
	h.mu.Lock()
	defer h.mu.Unlock()
	out := make([]string, 0, len(h.sessions))
	for node := range h.sessions {
		out = append(out, node)
	}
	slices.Sort(out)
	return out
}

// setRefs makes s hear of the objects in refs, and of no other. Whatever of them
// is looked up afterwards is not missed when it changes.
func (h *hub) setRefs(s *session, refs map[objKey]struct{}) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if s.removed {
		return
	}
	for k := range refs {
		if _, ok := s.refs[k]; !ok {
			if h.users[k] == nil {
				h.users[k] = make(map[*session]struct{})
			}
			h.users[k][s] = struct{}{}
		}
	}
	for k := range s.refs {
		if _, ok := refs[k]; !ok {
			h.dropUser(k, s)
		}
	}
	s.refs = refs
}

func (h *hub) dropUser(k objKey, s *session) {
	delete(h.users[k], s)
	if len(h.users[k]) == 0 {
		delete(h.users, k)
	}
}

// presence is how a node's stream is.
type presence int

const (
	down presence = iota
	up
	left // down after a Goodbye
)

// feed is one follower of the sessions here. Of a node only the newest is kept.
type feed struct {
	mu      sync.Mutex
	pending map[string]presence
	wake    chan struct{}
}

// subscribe returns the nodes that are connected now, and a feed of what changes
// afterwards.
func (h *hub) subscribe() ([]string, *feed) {
	f := &feed{pending: make(map[string]presence), wake: make(chan struct{}, 1)}
	h.mu.Lock()
	defer h.mu.Unlock()
	var nodes []string
	for node := range h.sessions {
		nodes = append(nodes, node)
	}
	h.feeds[f] = struct{}{}
	return nodes, f
}

func (h *hub) unsubscribe(f *feed) {
	h.mu.Lock()
	defer h.mu.Unlock()
	delete(h.feeds, f)
}

func (h *hub) publish(node string, p presence) {
	for f := range h.feeds {
		f.mu.Lock()
		f.pending[node] = p
		f.mu.Unlock()
		notify(f.wake)
	}
}

func (f *feed) take() map[string]presence {
	f.mu.Lock()
	defer f.mu.Unlock()
	out := f.pending
	f.pending = make(map[string]presence)
	return out
}
