package apiserver

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"time"

	"k8s.io/apiserver/pkg/registry/generic"
	"k8s.io/apiserver/pkg/registry/rest"
	genericapiserver "k8s.io/apiserver/pkg/server"
	serverstorage "k8s.io/apiserver/pkg/server/storage"
	"k8s.io/client-go/kubernetes"
	"k8s.io/kubernetes/pkg/apis/core"
	controlplaneapiserver "k8s.io/kubernetes/pkg/controlplane/apiserver"
	kubeletclient "k8s.io/kubernetes/pkg/kubelet/client"
	"k8s.io/kubernetes/pkg/probe"
	"k8s.io/kubernetes/pkg/registry/core/componentstatus"
	endpointsstore "k8s.io/kubernetes/pkg/registry/core/endpoint/storage"
	limitrangestore "k8s.io/kubernetes/pkg/registry/core/limitrange/storage"
	nodestore "k8s.io/kubernetes/pkg/registry/core/node/storage"
	pvstore "k8s.io/kubernetes/pkg/registry/core/persistentvolume/storage"
	pvcstore "k8s.io/kubernetes/pkg/registry/core/persistentvolumeclaim/storage"
	podstore "k8s.io/kubernetes/pkg/registry/core/pod/storage"
	podtemplatestore "k8s.io/kubernetes/pkg/registry/core/podtemplate/storage"
	controllerstore "k8s.io/kubernetes/pkg/registry/core/replicationcontroller/storage"
	corerest "k8s.io/kubernetes/pkg/registry/core/rest"
	"k8s.io/kubernetes/pkg/registry/core/service/ipallocator"
	iprepair "k8s.io/kubernetes/pkg/registry/core/service/ipallocator/controller"
	"k8s.io/kubernetes/pkg/registry/core/service/portallocator"
	portrepair "k8s.io/kubernetes/pkg/registry/core/service/portallocator/controller"
	servicestore "k8s.io/kubernetes/pkg/registry/core/service/storage"
	serviceaccountstore "k8s.io/kubernetes/pkg/registry/core/serviceaccount/storage"
	netutils "k8s.io/utils/net"
)

// repairInterval is how often the leader compares what the allocators gave out
// with what Services have.
const repairInterval = 3 * time.Minute

// coreProvider serves the core API group. The kinds that need nothing special
// are upstream's generic provider's; what is added here are those that reach
// nodes, and Services, whose allocators are over the state.
type coreProvider struct {
	shared  *shared
	generic *corerest.GenericConfig
	control *controlplaneapiserver.CompletedConfig
	client  *kubernetes.Clientset

	clusterIPs map[core.IPFamily]ipallocator.Interface
	family     core.IPFamily // of the first service network
	nodePorts  *portallocator.PortAllocator
	ports      *portRegistry
}

func newCoreProvider(s *shared, c *controlplaneapiserver.CompletedConfig, client *kubernetes.Clientset) (*coreProvider, error) {
	p := &coreProvider{shared: s, generic: c.NewCoreGenericConfig(), control: c, client: client,
		clusterIPs: map[core.IPFamily]ipallocator.Interface{}}

	for _, network := range []net.IPNet{s.options.PrimaryServiceClusterIPRange, s.options.SecondaryServiceClusterIPRange} {
		if network.IP == nil {
			continue // there is no second
		}
		ips, err := ipallocator.NewMetaAllocator(client.NetworkingV1(), s.informers.Networking().V1().ServiceCIDRs(),
			s.informers.Networking().V1().IPAddresses(), netutils.IsIPv6CIDR(&network), nil)
		if err != nil {
			return nil, fmt.Errorf("allocate cluster IPs of %s: %w", network.String(), err)
		}
		ips.EnableMetrics()
		p.clusterIPs[ips.IPFamily()] = ips
		if p.family == "" {
			p.family = ips.IPFamily()
		}
	}

	var err error
	if p.ports, err = newPortRegistry(s); err != nil {
		return nil, err
	}
	if p.nodePorts, err = portallocator.New(s.options.ServiceNodePortRange, p.ports.allocator); err != nil {
		return nil, fmt.Errorf("allocate node ports of %s: %w", s.options.ServiceNodePortRange.String(), err)
	}
	p.nodePorts.EnableMetrics()
	return p, nil
}

// GroupName implements controlplaneapiserver.RESTStorageProvider.
func (p *coreProvider) GroupName() string { return core.GroupName }

// NewRESTStorage implements controlplaneapiserver.RESTStorageProvider.
func (p *coreProvider) NewRESTStorage(enabled serverstorage.APIResourceConfigSource, options generic.RESTOptionsGetter) (genericapiserver.APIGroupInfo, error) {
	group, err := p.generic.NewRESTStorage(enabled, options)
	if err != nil {
		return group, err
	}
	resources := group.VersionedResourcesStorageMap["v1"]
	for _, add := range []func(map[string]rest.Storage, generic.RESTOptionsGetter) error{
		p.addPlain, p.addNodesAndPods,
	} {
		if err := add(resources, options); err != nil {
			return group, err
		}
	}
	return group, nil
}

// addPlain adds kinds that are storage and no more.
func (p *coreProvider) addPlain(resources map[string]rest.Storage, options generic.RESTOptionsGetter) error {
	templates, err := podtemplatestore.NewREST(options)
	if err != nil {
		return err
	}
	limits, err := limitrangestore.NewREST(options)
	if err != nil {
		return err
	}
	volumes, volumesStatus, err := pvstore.NewREST(options)
	if err != nil {
		return err
	}
	claims, claimsStatus, err := pvcstore.NewREST(options)
	if err != nil {
		return err
	}
	endpoints, err := endpointsstore.NewREST(options)
	if err != nil {
		return err
	}
	controllers, err := controllerstore.NewStorage(options)
	if err != nil {
		return err
	}
	maps.Copy(resources, map[string]rest.Storage{
		"podtemplates":                  templates,
		"limitranges":                   limits,
		"persistentvolumes":             volumes,
		"persistentvolumes/status":      volumesStatus,
		"persistentvolumeclaims":        claims,
		"persistentvolumeclaims/status": claimsStatus,
		"endpoints":                     endpoints,
		"replicationcontrollers":        controllers.Controller,
		"replicationcontrollers/status": controllers.Status,
		"replicationcontrollers/scale":  controllers.Scale,
		"componentstatuses":             componentstatus.NewStorage(p.components),
	})
	return nil
}

// addNodesAndPods adds nodes, pods, Services and service accounts, which know of
// one another.
func (p *coreProvider) addNodesAndPods(resources map[string]rest.Storage, options generic.RESTOptionsGetter) error {
	transport := p.control.ProxyTransport
	nodes, err := nodestore.NewStorage(options, kubeletclient.KubeletClientConfig{}, transport)
	if err != nil {
		return err
	}
	kubelets := &kubelets{dial: p.shared.config.DialKubelet, nodes: nodes.Node}
	nodes.Proxy.Connection = kubelets

	pods, err := podstore.NewStorage(options, kubelets, transport, p.client.PolicyV1(), p.control.Generic.Authorization.Authorizer)
	if err != nil {
		return err
	}
	p.shared.direct.pods, p.shared.direct.bindings = pods.Pod, pods.Binding
	p.shared.direct.events, _ = resources["events"].(rest.Creater)
	services, serviceStatus, serviceProxy, err := servicestore.NewREST(options, p.family, p.clusterIPs, p.nodePorts,
		p.control.EndpointSliceGetter, pods.Pod, transport)
	if err != nil {
		return err
	}
	accounts, err := p.serviceAccounts(resources, options, nodes, pods)
	if err != nil {
		return err
	}
	maps.Copy(resources, map[string]rest.Storage{
		"nodes":        nodes.Node,
		"nodes/proxy":  nodes.Proxy,
		"nodes/status": nodes.Status,

		"pods":                     pods.Pod,
		"pods/attach":              tied{pods.Attach},
		"pods/binding":             pods.Binding,
		"pods/ephemeralcontainers": pods.EphemeralContainers,
		"pods/eviction":            pods.Eviction,
		"pods/exec":                tied{pods.Exec},
		"pods/log":                 pods.Log,
		"pods/portforward":         pods.PortForward,
		"pods/proxy":               pods.Proxy,
		"pods/resize":              pods.Resize,
		"pods/status":              pods.Status,
		"bindings":                 pods.LegacyBinding,

		"services":        services,
		"services/proxy":  serviceProxy,
		"services/status": serviceStatus,

		"serviceaccounts":       accounts,
		"serviceaccounts/token": accounts.Token,
	})
	return nil
}

// serviceAccounts returns service accounts whose tokens can be bound to pods,
// nodes and secrets, in place of the generic provider's, which are closed.
func (p *coreProvider) serviceAccounts(resources map[string]rest.Storage, options generic.RESTOptionsGetter, nodes *nodestore.NodeStorage, pods podstore.PodStorage) (*serviceaccountstore.REST, error) {
	secrets, ok := resources["secrets"].(rest.Getter)
	if !ok {
		return nil, errors.New("secrets cannot be read by the service account registry")
	}
	for _, name := range []string{"serviceaccounts", "serviceaccounts/token"} {
		if storage := resources[name]; storage != nil {
			storage.Destroy()
		}
	}
	g := p.generic
	webhooks := p.client.AdmissionregistrationV1()
	return serviceaccountstore.NewREST(options, g.ServiceAccountIssuer, g.APIAudiences, p.control.Generic.Authorization.Authorizer,
		g.ServiceAccountMaxExpiration, pods.Pod.Store, secrets, nodes.Node.Store,
		webhooks.ValidatingWebhookConfigurations(), webhooks.MutatingWebhookConfigurations(), g.ExtendExpiration, g.MaxExtendedExpiration)
}

// components are the checks shown as componentstatuses.
func (p *coreProvider) components() map[string]componentstatus.Server {
	servers := map[string]componentstatus.Server{}
	for name, check := range p.shared.config.Health {
		servers[name] = component(check)
	}
	return servers
}

// component is a check as upstream's componentstatuses take it.
type component func(context.Context) error

// DoServerCheck implements componentstatus.Server.
func (c component) DoServerCheck() (probe.Result, string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	if err := c(ctx); err != nil {
		return probe.Failure, "", err
	}
	return probe.Success, "ok", nil
}

// PostStartHook implements genericapiserver.PostStartHookProvider. The leader
// repairs what the allocators gave out; this replica is ready when the node port
// allocator works, which the first leader's first repair sees to.
func (p *coreProvider) PostStartHook() (string, genericapiserver.PostStartHookFunc, error) {
	return "start-service-ip-repair-controllers", func(ctx genericapiserver.PostStartHookContext) error {
		leading := p.shared.config.IsLeader
		go whileLeading(ctx, leading, func(stop chan struct{}) {
			portrepair.NewRepair(repairInterval, p.client.CoreV1(), p.client.EventsV1(), p.shared.options.ServiceNodePortRange,
				p.ports).RunUntil(func() {}, stop)
		})
		go whileLeading(ctx, leading, func(stop chan struct{}) {
			iprepair.NewRepairIPAddress(repairInterval, p.client, p.shared.informers.Core().V1().Services(),
				p.shared.informers.Networking().V1().ServiceCIDRs(), p.shared.informers.Networking().V1().IPAddresses(),
			).RunUntil(func() {}, stop)
		})
		return p.ports.waitReady(ctx)
	}, nil
}
