package feed

import (
	"iter"
	"strings"

	"github.com/tidwall/btree"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"

	pb "timonel/proto/timonel/v1"
)

// Name names a namespaced object, or a cluster's with an empty namespace.
type Name struct{ Namespace, Name string }

// String is namespace/name.
func (n Name) String() string { return n.Namespace + "/" + n.Name }

// nul is in no name, and sorts before all that is: so keys sort as their parts do.
const nul = "\x00"

func (n Name) key() string { return n.Namespace + nul + n.Name }

func nameOf(key string) Name {
	namespace, name, _ := strings.Cut(key, nul)
	return Name{namespace, name}
}

// View is what this node knows of the cluster's network at one moment. It never
// changes, and getting one costs nothing. Its objects are stripped of what no room
// needs, and shared: they are never changed in place.
type View struct {
	revision uint64
	synced   bool
	nodeName string
	zone     string
	epoch    string // id of the cluster that all of it is of, when synced

	nodes     btree.Map[string, *pb.NodeRoute]
	addresses btree.Map[string, *pb.AddressHolder]
	services  btree.Map[string, *corev1.Service]
	slices    btree.Map[string, *discoveryv1.EndpointSlice] // by namespace, Service and name
	policies  btree.Map[string, *pb.NetworkPolicyItem]
	groups    btree.Map[string, *pb.NetworkGroup] // by names of their parts
	pods      btree.Map[string, *pb.NetworkPod]
	told      int64 // revision of the state as of which the last three are
}

// Revision grows with each change on this node. It is this process' own.
func (v *View) Revision() uint64 { return v.revision }

// Synced says whether the view is, or was at some time, all that the controllers
// knew. A view that was kept on disk counts as such.
func (v *View) Synced() bool { return v.synced }

// NodeName is this node's name.
func (v *View) NodeName() string { return v.nodeName }

// Zone is this node's zone; empty when it has none.
func (v *View) Zone() string { return v.zone }

// Node is the pod ranges and the address of a node, nil when there is none of that
// name. What is not the node's own by the cluster's word is left out.
func (v *View) Node(name string) *pb.NodeRoute {
	n, _ := v.nodes.Get(name)
	return n
}

// Nodes are those of all nodes, this one included, in the order of their names.
func (v *View) Nodes() iter.Seq[*pb.NodeRoute] {
	return func(yield func(*pb.NodeRoute) bool) {
		v.nodes.Scan(func(_ string, n *pb.NodeRoute) bool { return yield(n) })
	}
}

// Addresses are those of Services of type LoadBalancer that some node announces, or none.
func (v *View) Addresses() iter.Seq[*pb.AddressHolder] {
	return func(yield func(*pb.AddressHolder) bool) {
		v.addresses.Scan(func(_ string, a *pb.AddressHolder) bool { return yield(a) })
	}
}

// Service returns a Service, nil when there is none of that name.
func (v *View) Service(n Name) *corev1.Service {
	s, _ := v.services.Get(n.key())
	return s
}

// Services are all Services in the order of their names.
func (v *View) Services() iter.Seq2[Name, *corev1.Service] {
	return func(yield func(Name, *corev1.Service) bool) {
		v.services.Scan(func(key string, s *corev1.Service) bool { return yield(nameOf(key), s) })
	}
}

// Slices are the EndpointSlices of a Service in the order of their names, whether the
// Service is there or not.
func (v *View) Slices(service Name) []*discoveryv1.EndpointSlice {
	var out []*discoveryv1.EndpointSlice
	prefix := service.key() + nul
	v.slices.Ascend(prefix, func(key string, s *discoveryv1.EndpointSlice) bool {
		if !strings.HasPrefix(key, prefix) {
			return false
		}
		out = append(out, s)
		return true
	})
	return out
}
