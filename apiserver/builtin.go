package apiserver

import (
	"fmt"
	"net"
	"strconv"
	"time"

	"github.com/emicklei/go-restful/v3"
	apiextensionsapiserver "k8s.io/apiextensions-apiserver/pkg/apiserver"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/util/wait"
	"k8s.io/apiserver/pkg/endpoints/discovery"
	genericapiserver "k8s.io/apiserver/pkg/server"
	"k8s.io/client-go/kubernetes"
	"k8s.io/klog/v2"
	aggregator "k8s.io/kube-aggregator/pkg/client/clientset_generated/clientset/typed/apiregistration/v1"
	controlplaneapiserver "k8s.io/kubernetes/pkg/controlplane/apiserver"
	"k8s.io/kubernetes/pkg/controlplane/controller/defaultservicecidr"
	"k8s.io/kubernetes/pkg/controlplane/controller/kubernetesservice"
	admissionregistrationrest "k8s.io/kubernetes/pkg/registry/admissionregistration/rest"
	apiserverinternalrest "k8s.io/kubernetes/pkg/registry/apiserverinternal/rest"
	appsrest "k8s.io/kubernetes/pkg/registry/apps/rest"
	authenticationrest "k8s.io/kubernetes/pkg/registry/authentication/rest"
	authorizationrest "k8s.io/kubernetes/pkg/registry/authorization/rest"
	autoscalingrest "k8s.io/kubernetes/pkg/registry/autoscaling/rest"
	batchrest "k8s.io/kubernetes/pkg/registry/batch/rest"
	certificatesrest "k8s.io/kubernetes/pkg/registry/certificates/rest"
	coordinationrest "k8s.io/kubernetes/pkg/registry/coordination/rest"
	discoveryrest "k8s.io/kubernetes/pkg/registry/discovery/rest"
	eventsrest "k8s.io/kubernetes/pkg/registry/events/rest"
	flowcontrolrest "k8s.io/kubernetes/pkg/registry/flowcontrol/rest"
	lifecyclerest "k8s.io/kubernetes/pkg/registry/lifecycle/rest"
	networkingrest "k8s.io/kubernetes/pkg/registry/networking/rest"
	noderest "k8s.io/kubernetes/pkg/registry/node/rest"
	policyrest "k8s.io/kubernetes/pkg/registry/policy/rest"
	rbacrest "k8s.io/kubernetes/pkg/registry/rbac/rest"
	resourcerest "k8s.io/kubernetes/pkg/registry/resource/rest"
	schedulingrest "k8s.io/kubernetes/pkg/registry/scheduling/rest"
	storagerest "k8s.io/kubernetes/pkg/registry/storage/rest"
	svmrest "k8s.io/kubernetes/pkg/registry/storagemigration/rest"
)

const (
	// servicePort is the kubernetes Service's.
	servicePort = 443
	// endpointInterval is how often the kubernetes Service and its endpoints are
	// compared with the controllers alive; nothing is written while they agree.
	endpointInterval = 2 * time.Second
)

// newBuiltin builds the server of the built-in APIs, with what it does after its
// start.
func newBuiltin(s *shared, config *controlplaneapiserver.Config, extensions *apiextensionsapiserver.CustomResourceDefinitions) (*controlplaneapiserver.Server, error) {
	completed := config.Complete()
	addresses := discovery.DefaultAddresses{DefaultAddress: completed.Generic.ExternalAddress}
	addresses.CIDRRules = append(addresses.CIDRRules, discovery.CIDRRule{
		IPRange: s.options.PrimaryServiceClusterIPRange,
		Address: net.JoinHostPort(s.options.APIServerServiceIP.String(), strconv.Itoa(servicePort)),
	})
	completed.Generic.DiscoveryAddresses = addresses

	server, err := completed.New(controlplaneapiserver.KubeAPIServer, extensions.GenericAPIServer)
	if err != nil {
		return nil, err
	}
	client, err := kubernetes.NewForConfig(completed.Generic.LoopbackClientConfig)
	if err != nil {
		return nil, err
	}
	providers, err := restProviders(s, &completed, client)
	if err != nil {
		return nil, err
	}
	if err := server.InstallAPIs(providers...); err != nil {
		return nil, err
	}
	server.GenericAPIServer.Handler.GoRestfulContainer.Router(newRouteCache(restful.CurlyRouter{}))
	if err := addServiceHooks(s, &completed, server.GenericAPIServer, client); err != nil {
		return nil, err
	}
	if err := installOpenAPI(server.GenericAPIServer, completed.Generic.OpenAPIConfig, completed.Generic.OpenAPIV3Config); err != nil {
		return nil, err
	}
	return server, nil
}

// restProviders lists the API groups in the order of discovery, which decides
// what group an unqualified resource name means.
func restProviders(s *shared, c *controlplaneapiserver.CompletedConfig, client *kubernetes.Clientset) ([]controlplaneapiserver.RESTStorageProvider, error) {
	authorizer := c.Generic.Authorization.Authorizer
	core, err := newCoreProvider(s, c, client)
	if err != nil {
		return nil, fmt.Errorf("core API group: %w", err)
	}
	barrier := s.config.Backend.ReadBarrier
	providers := []controlplaneapiserver.RESTStorageProvider{
		patient{core, core, barrier},
		apiserverinternalrest.StorageProvider{},
		authenticationrest.RESTStorageProvider{Authenticator: c.Generic.Authentication.Authenticator, APIAudiences: c.Generic.Authentication.APIAudiences},
		authorizationrest.RESTStorageProvider{Authorizer: authorizer, RuleResolver: c.Generic.RuleResolver},
		autoscalingrest.RESTStorageProvider{},
		batchrest.RESTStorageProvider{},
		certificatesrest.RESTStorageProvider{Authorizer: authorizer},
		coordinationrest.RESTStorageProvider{},
		discoveryrest.StorageProvider{},
		lifecyclerest.RESTStorageProvider{},
		networkingrest.RESTStorageProvider{},
		noderest.RESTStorageProvider{},
		policyrest.RESTStorageProvider{},
		newPatient(rbacrest.RESTStorageProvider{Authorizer: authorizer}, barrier),
		newPatient(schedulingrest.RESTStorageProvider{}, barrier),
		storagerest.RESTStorageProvider{},
		svmrest.RESTStorageProvider{},
		newPatient(flowcontrolrest.RESTStorageProvider{InformerFactory: c.Generic.SharedInformerFactory}, barrier),
		appsrest.StorageProvider{},
		admissionregistrationrest.RESTStorageProvider{Authorizer: authorizer, DiscoveryClient: client.Discovery()},
		eventsrest.RESTStorageProvider{TTL: c.EventTTL},
		resourcerest.RESTStorageProvider{NamespaceClient: client.CoreV1().Namespaces(), Authorizer: authorizer},
	}
	if s.config.Usage != nil {
		objects := s.informers.Core().V1()
		providers = append(providers, metricsProvider{s.config.Usage, objects.Nodes().Lister(), objects.Pods().Lister()})
	}
	return providers, nil
}

// addServiceHooks starts what looks after the kubernetes Service and the default
// ServiceCIDR.
func addServiceHooks(s *shared, c *controlplaneapiserver.CompletedConfig, server *genericapiserver.GenericAPIServer, client *kubernetes.Clientset) error {
	_, port, err := c.Generic.SecureServing.HostPort()
	if err != nil {
		return fmt.Errorf("find the port listened on: %w", err)
	}
	endpoints := newControllerEndpoints(s.config, client)
	if err := endpoints.ValidateIP(c.Generic.PublicAddress); err != nil {
		klog.Background().Info("WARNING: the kubernetes Service has no endpoint here, pods cannot reach the API by it: no endpoint may have this replica's advertised address", "address", c.Generic.PublicAddress, "reason", err)
	}
	service := kubernetesservice.New(kubernetesservice.Config{
		PublicIP:           c.Generic.PublicAddress,
		EndpointReconciler: endpoints,
		EndpointInterval:   endpointInterval,
		ServiceIP:          s.options.APIServerServiceIP,
		ServicePort:        servicePort,
		PublicServicePort:  port,
	}, client, s.informers.Core().V1().Services())
	server.AddPostStartHookOrDie("bootstrap-controller", func(ctx genericapiserver.PostStartHookContext) error {
		service.Start(ctx.Done())
		return nil
	})
	server.AddPreShutdownHookOrDie("stop-kubernetes-service-controller", func() error {
		service.Stop()
		return nil
	})
	if len(s.config.DNSAddresses) > 0 {
		names := &dnsService{client: client, lister: s.informers.Core().V1().Services().Lister(), addresses: s.config.DNSAddresses}
		server.AddPostStartHookOrDie("cluster-dns-service", func(ctx genericapiserver.PostStartHookContext) error {
			go whileLeading(ctx, s.config.IsLeader, func(stop chan struct{}) { names.keep(wait.ContextForChannel(stop)) })
			return nil
		})
	}
	if s.config.Usage != nil {
		services, err := aggregator.NewForConfig(c.Generic.LoopbackClientConfig)
		if err != nil {
			return fmt.Errorf("client of APIServices: %w", err)
		}
		server.AddPostStartHookOrDie("metrics-apiservice", func(ctx genericapiserver.PostStartHookContext) error {
			go whileLeading(ctx, s.config.IsLeader, func(stop chan struct{}) {
				(&metricsService{services}).keep(wait.ContextForChannel(stop))
			})
			return nil
		})
	}
	server.AddPostStartHookOrDie("start-kubernetes-service-cidr-controller", func(ctx genericapiserver.PostStartHookContext) error {
		defaultservicecidr.NewController(s.options.PrimaryServiceClusterIPRange, s.options.SecondaryServiceClusterIPRange,
			client).Start(ctx) // returns when the ServiceCIDR exists
		return nil
	})
	return nil
}

// groupPriorities orders groups and versions in discovery, as upstream does; the
// generic groups' order is upstream's own list.
func groupPriorities() map[schema.GroupVersion]controlplaneapiserver.APIServicePriority {
	priorities := controlplaneapiserver.DefaultGenericAPIServicePriorities()
	for _, p := range []struct {
		group, version          string
		groupOrder, versionRank int32
	}{
		{"apps", "v1", 17800, 15},
		{"autoscaling", "v2", 17500, 30},
		{"autoscaling", "v1", 17500, 15},
		{"batch", "v1", 17400, 15},
		{"networking.k8s.io", "v1", 17200, 15},
		{"policy", "v1", 17100, 15},
		{"storage.k8s.io", "v1", 16800, 15},
		{"scheduling.k8s.io", "v1", 16600, 15},
		{"node.k8s.io", "v1", 16300, 15},
		{"resource.k8s.io", "v1", 16200, 21},
	} {
		priorities[schema.GroupVersion{Group: p.group, Version: p.version}] = controlplaneapiserver.APIServicePriority{
			Group: p.groupOrder, Version: p.versionRank,
		}
	}
	return priorities
}
