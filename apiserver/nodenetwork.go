package apiserver

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"slices"

	"k8s.io/apiserver/pkg/admission"
	"k8s.io/kubernetes/cmd/kube-apiserver/app/options"
	"k8s.io/kubernetes/pkg/apis/core"
	"k8s.io/kubernetes/pkg/auth/nodeidentifier"
	"k8s.io/kubernetes/plugin/pkg/admission/noderestriction"
)

// nodeNetworkName is the plugin's name, as in the flags of upstream's API server.
const nodeNetworkName = "NodeNetwork"

// nodeNetwork is an admission plugin beside NodeRestriction: what other nodes make
// routes, endpoints and policies of is not a node's to say. A node may not set or change
// its pod ranges, which the cluster gives it, and its addresses, and those of its pods, must
// be ones that it can have; and it may make no pods, which would be the endpoints of any
// Service whose labels they have.
type nodeNetwork struct {
	*admission.Handler
	nodes nodeidentifier.NodeIdentifier
	// address says why a node cannot have an address.
	address func(node string, ip netip.Addr) error
	// podAddress says why a pod of a node cannot have an address.
	podAddress func(node string, hostNetwork bool, ip netip.Addr) error
}

// addNodeNetwork registers the plugin behind NodeRestriction and turns it on.
func addNodeNetwork(o *options.ServerRunOptions, c Config) {
	generic := o.Admission.GenericAdmission
	generic.Plugins.Register(nodeNetworkName, func(io.Reader) (admission.Interface, error) {
		return newNodeNetwork(c), nil
	})
	at := slices.Index(generic.RecommendedPluginOrder, noderestriction.PluginName) + 1
	generic.RecommendedPluginOrder = slices.Insert(slices.Clone(generic.RecommendedPluginOrder), at, nodeNetworkName)
	generic.EnablePlugins = append(generic.EnablePlugins, nodeNetworkName)
}

func newNodeNetwork(c Config) *nodeNetwork {
	return &nodeNetwork{
		Handler:    admission.NewHandler(admission.Create, admission.Update),
		nodes:      nodeidentifier.NewDefaultNodeIdentifier(),
		podAddress: c.PodAddress,
		address: func(node string, ip netip.Addr) error {
			for _, services := range c.ServiceCIDRs {
				if services.Contains(ip) {
					return fmt.Errorf("%s is of the Services' network %s", ip, services)
				}
			}
			if c.NodeAddress != nil {
				return c.NodeAddress(node, ip)
			}
			return nil
		},
	}
}

// Validate implements admission.ValidationInterface: it sees what would be stored,
// whatever verb and subresource it came by.
func (p *nodeNetwork) Validate(_ context.Context, a admission.Attributes, _ admission.ObjectInterfaces) error {
	resource := a.GetResource().GroupResource()
	if resource != core.Resource("nodes") && resource != core.Resource("pods") {
		return nil
	}
	name, isNode := p.nodes.NodeIdentity(a.GetUserInfo())
	if !isNode {
		return nil
	}
	if resource == core.Resource("pods") {
		return p.validatePod(a, name)
	}
	node, ok := a.GetObject().(*core.Node)
	if !ok {
		return nil // a subresource that is no Node, such as proxy
	}
	var old core.Node
	if before, ok := a.GetOldObject().(*core.Node); ok && before != nil {
		old = *before
	}
	if !slices.Equal(node.Spec.PodCIDRs, old.Spec.PodCIDRs) {
		return admission.NewForbidden(a, fmt.Errorf("node %q is not allowed to set spec.podCIDR or spec.podCIDRs: the cluster gives each node its range", name))
	}
	var errs []error
	for i, address := range node.Status.Addresses {
		if address.Type != core.NodeInternalIP && address.Type != core.NodeExternalIP || slices.Contains(old.Status.Addresses, address) {
			continue
		}
		if err := p.checkAddress(name, address.Address); err != nil {
			errs = append(errs, fmt.Errorf("status.addresses[%d]: node %q cannot have the %s %q: %w", i, name, address.Type, address.Address, err))
		}
	}
	if err := errors.Join(errs...); err != nil {
		return admission.NewForbidden(a, err)
	}
	return nil
}

// validatePod refuses pods that a node makes: upstream lets kubelets show their static pods
// that way, of any namespace and with any labels, and agents have none. And it checks the
// addresses that a node says one of its pods has, but for those that the pod had before.
// They become endpoints of Services, and what policies let through, on all other nodes.
func (p *nodeNetwork) validatePod(a admission.Attributes, node string) error {
	if a.GetOperation() == admission.Create && a.GetSubresource() == "" {
		return admission.NewForbidden(a, fmt.Errorf("node %q is not allowed to create pods: agents have no static pods", node))
	}
	if a.GetSubresource() != "status" || p.podAddress == nil {
		return nil // whatever else a node may write of a pod leaves its status as it is
	}
	pod, ok := a.GetObject().(*core.Pod)
	if !ok {
		return nil
	}
	var old core.PodStatus
	if before, ok := a.GetOldObject().(*core.Pod); ok && before != nil {
		old = before.Status
	}
	var errs []error
	check := func(field, address string, hostNetwork bool) {
		ip, err := netip.ParseAddr(address)
		if err == nil {
			err = p.podAddress(node, hostNetwork, ip)
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("%s: pod %s/%s of node %q cannot have the address %q: %w", field, pod.Namespace, pod.Name, node, address, err))
		}
	}
	for i, ip := range pod.Status.PodIPs {
		if !slices.Contains(old.PodIPs, ip) {
			check(fmt.Sprintf("status.podIPs[%d]", i), ip.IP, pod.Spec.HostNetwork)
		}
	}
	for i, ip := range pod.Status.HostIPs {
		if !slices.Contains(old.HostIPs, ip) {
			check(fmt.Sprintf("status.hostIPs[%d]", i), ip.IP, true)
		}
	}
	if ip := pod.Status.HostIP; ip != "" && ip != old.HostIP && !slices.Contains(pod.Status.HostIPs, core.HostIP{IP: ip}) {
		check("status.hostIP", ip, true)
	}
	if err := errors.Join(errs...); err != nil {
		return admission.NewForbidden(a, err)
	}
	return nil
}

func (p *nodeNetwork) checkAddress(node, text string) error {
	ip, err := netip.ParseAddr(text)
	if err != nil {
		return errors.New("it is not an IP address")
	}
	if ip.Zone() != "" || ip.Is4In6() {
		return errors.New("it is not an address that others can route to")
	}
	if !ip.IsGlobalUnicast() { // unspecified, loopback, multicast, link-local, broadcast
		return errors.New("it is not a unicast address that others can reach")
	}
	return p.address(node, ip)
}
