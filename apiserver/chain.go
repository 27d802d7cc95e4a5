package apiserver

import (
	"fmt"
	"net/url"

	corev1 "k8s.io/api/core/v1"
	apiextensionsv1 "k8s.io/apiextensions-apiserver/pkg/apis/apiextensions/v1"
	"k8s.io/apiserver/pkg/admission"
	genericapifilters "k8s.io/apiserver/pkg/endpoints/filters"
	genericapiserver "k8s.io/apiserver/pkg/server"
	etcd3metrics "k8s.io/apiserver/pkg/storage/etcd3/metrics"
	"k8s.io/apiserver/pkg/util/compatibility"
	utilfeature "k8s.io/apiserver/pkg/util/feature"
	"k8s.io/apiserver/pkg/util/notfoundhandler"
	"k8s.io/apiserver/pkg/util/proxy"
	"k8s.io/apiserver/pkg/util/webhook"
	"k8s.io/client-go/dynamic"
	corelisters "k8s.io/client-go/listers/core/v1"
	basecompatibility "k8s.io/component-base/compatibility"
	metricsfeatures "k8s.io/component-base/metrics/features"
	aggregatorapiserver "k8s.io/kube-aggregator/pkg/apiserver"
	"k8s.io/kubernetes/pkg/capabilities"
	controlplaneapiserver "k8s.io/kubernetes/pkg/controlplane/apiserver"
	controlplaneadmission "k8s.io/kubernetes/pkg/controlplane/apiserver/admission"
	"k8s.io/kubernetes/pkg/controlplane/controller/clusterauthenticationtrust"
	kubeadmission "k8s.io/kubernetes/pkg/kubeapiserver/admission"
	"k8s.io/kubernetes/pkg/serviceaccount"
)

// newChain builds the three servers: the aggregator, which hands what it does
// not serve to the built-in APIs, and these to the custom resources.
func newChain(s *shared) (*aggregatorapiserver.APIAggregator, error) {
	capabilities.Setup(s.options.AllowPrivileged, s.options.MaxConnectionBytesPerSec)
	metricsfeatures.ApplyFeatureGates(utilfeature.DefaultFeatureGate)
	s.options.Metrics.Apply()
	serviceaccount.RegisterMetrics()

	slices, err := proxy.NewEndpointSliceIndexerGetter(s.informers.Discovery().V1().EndpointSlices())
	if err != nil {
		return nil, fmt.Errorf("index endpoint slices: %w", err)
	}
	resolver := newServiceResolver(s, slices)
	transport := controlplaneapiserver.CreateProxyTransport()
	webhooks := webhook.NewDefaultAuthenticationInfoResolverWrapper(transport, nil, s.network, s.generic.TracerProvider)

	builtin, initializers, err := newControlPlaneConfig(s, slices, resolver)
	if err != nil {
		return nil, err
	}
	builtin.ProxyTransport = transport

	extensions, err := controlplaneapiserver.CreateAPIExtensionsConfig(*s.generic, s.informers, initializers,
		s.options.CompletedOptions, s.options.MasterCount, resolver, webhooks)
	if err != nil {
		return nil, fmt.Errorf("configure custom resources: %w", err)
	}
	extensions.GenericConfig.RESTOptionsGetter = s.overState(extensions.GenericConfig.RESTOptionsGetter)
	extensions.ExtraConfig.CRDRESTOptionsGetter = s.overState(extensions.ExtraConfig.CRDRESTOptionsGetter)

	aggregator, err := controlplaneapiserver.CreateAggregatorConfig(*s.generic, s.options.CompletedOptions, s.informers,
		resolver, transport, nil, initializers)
	if err != nil {
		return nil, fmt.Errorf("configure the aggregator: %w", err)
	}
	aggregator.GenericConfig.RESTOptionsGetter = s.overState(aggregator.GenericConfig.RESTOptionsGetter)

	builtin.Generic.SkipOpenAPIInstallation = true // see installOpenAPI

	// The two configurations above have left a function that would ask etcd for
	// its size when /metrics is read.
	etcd3metrics.SetStorageMonitorGetter(func() ([]etcd3metrics.Monitor, error) { return nil, nil })

	notFound := notfoundhandler.New(s.generic.Serializer, genericapifilters.NoMuxAndDiscoveryIncompleteKey)
	extensionsServer, err := extensions.Complete().New(genericapiserver.NewEmptyDelegateWithCustomHandler(notFound))
	if err != nil {
		return nil, fmt.Errorf("build the custom resource server: %w", err)
	}
	builtinServer, err := newBuiltin(s, builtin, extensionsServer)
	if err != nil {
		return nil, fmt.Errorf("build the server of built-in APIs: %w", err)
	}
	crds := apiextensionsv1.SchemeGroupVersion.WithResource("customresourcedefinitions")
	server, err := controlplaneapiserver.CreateAggregatorServer(aggregator.Complete(), builtinServer.GenericAPIServer,
		extensionsServer.Informers.Apiextensions().V1().CustomResourceDefinitions(),
		extensions.GenericConfig.MergedResourceConfig.ResourceEnabled(crds), groupPriorities())
	if err != nil {
		return nil, fmt.Errorf("build the aggregator: %w", err)
	}
	return server, nil
}

// newServiceResolver finds the servers of aggregated APIs and webhooks by their
// Services' endpoints, for there is no service proxy on a controller, those of
// ExternalName Services by that name, and this server itself without going far.
func newServiceResolver(s *shared, slices proxy.EndpointSliceGetter) aggregatorapiserver.ServiceResolver {
	services := s.informers.Core().V1().Services().Lister()
	return aggregatorapiserver.NewLoopbackServiceResolver(serviceResolver{
		services:  services,
		endpoints: aggregatorapiserver.NewEndpointServiceResolver(services, slices),
		names:     aggregatorapiserver.NewClusterIPServiceResolver(services),
	}, s.hostURL)
}

// serviceResolver chooses how to find a Service's server by its type.
type serviceResolver struct {
	services         corelisters.ServiceLister
	endpoints, names aggregatorapiserver.ServiceResolver
}

// ResolveEndpoint implements aggregatorapiserver.ServiceResolver.
func (r serviceResolver) ResolveEndpoint(namespace, name string, port int32) (*url.URL, error) {
	if service, err := r.services.Services(namespace).Get(name); err == nil && service.Spec.Type == corev1.ServiceTypeExternalName {
		return r.names.ResolveEndpoint(namespace, name, port)
	}
	return r.endpoints.ResolveEndpoint(namespace, name, port)
}

// newControlPlaneConfig configures the built-in APIs and admission, for all
// three servers.
func newControlPlaneConfig(s *shared, slices proxy.EndpointSliceGetter, resolver aggregatorapiserver.ServiceResolver) (*controlplaneapiserver.Config, []admission.PluginInitializer, error) {
	o := s.options
	trust, err := newTrust(s)
	if err != nil {
		return nil, nil, err
	}
	initializers, err := applyAdmission(s, resolver)
	if err != nil {
		return nil, nil, err
	}
	return &controlplaneapiserver.Config{
		Generic: s.generic,
		Extra: controlplaneapiserver.Extra{
			ClusterAuthenticationInfo: trust,
			APIResourceConfigSource:   s.storage.APIResourceConfigSource,
			StorageFactory:            s.storage,
			EventTTL:                  o.EventTTL,
			SystemNamespaces:          o.SystemNamespaces,
			VersionedInformers:        s.informers,
			EndpointSliceGetter:       slices,

			ServiceAccountIssuer:                o.ServiceAccountIssuer,
			ServiceAccountMaxExpiration:         o.ServiceAccountTokenMaxExpiration,
			ServiceAccountExtendedMaxExpiration: o.Authentication.ServiceAccounts.MaxExtendedExpiration,
			ExtendExpiration:                    o.Authentication.ServiceAccounts.ExtendExpiration,
			ServiceAccountPublicKeysGetter:      o.Authentication.ServiceAccounts.ExternalPublicKeysGetter,
			ServiceAccountIssuerURL:             o.Authentication.ServiceAccounts.Issuers[0],
			ServiceAccountJWKSURI:               o.Authentication.ServiceAccounts.JWKSURI,
		},
	}, initializers, nil
}

// newTrust says whose certificates this server accepts, for extension servers,
// which read it from a ConfigMap.
func newTrust(s *shared) (clusterauthenticationtrust.ClusterAuthenticationInfo, error) {
	var info clusterauthenticationtrust.ClusterAuthenticationInfo
	clients, err := s.options.Authentication.ClientCert.GetClientCAContentProvider()
	if err != nil {
		return info, fmt.Errorf("read the cluster's CA: %w", err)
	}
	headers, err := s.options.Authentication.RequestHeader.ToAuthenticationRequestHeaderConfig()
	if err != nil {
		return info, fmt.Errorf("read the front proxy's CA: %w", err)
	}
	return clusterauthenticationtrust.ClusterAuthenticationInfo{
		ClientCA:                         clients,
		RequestHeaderCA:                  headers.CAContentProvider,
		RequestHeaderAllowedNames:        headers.AllowedClientNames,
		RequestHeaderExtraHeaderPrefixes: headers.ExtraHeaderPrefixes,
		RequestHeaderGroupHeaders:        headers.GroupHeaders,
		RequestHeaderUsernameHeaders:     headers.UsernameHeaders,
		RequestHeaderUIDHeaders:          headers.UIDHeaders,
	}, nil
}

// applyAdmission sets up upstream's default plugins, webhooks and policies.
func applyAdmission(s *shared, resolver aggregatorapiserver.ServiceResolver) ([]admission.PluginInitializer, error) {
	config := controlplaneadmission.Config{
		ExternalInformers:    s.informers,
		LoopbackClientConfig: s.network, // used for webhooks only, which add their own CA
		APIResourceConfig:    s.storage.APIResourceConfigSource,
	}
	transport := controlplaneapiserver.CreateProxyTransport()
	generic, err := config.New(transport, nil, resolver, s.generic.TracerProvider)
	if err != nil {
		return nil, fmt.Errorf("set up admission: %w", err)
	}
	kube, err := (&kubeadmission.Config{}).New()
	if err != nil {
		return nil, fmt.Errorf("set up admission: %w", err)
	}
	objects, err := dynamic.NewForConfig(s.generic.LoopbackClientConfig)
	if err != nil {
		return nil, fmt.Errorf("set up admission: %w", err)
	}
	version := compatibility.DefaultComponentGlobalsRegistry.EffectiveVersionFor(basecompatibility.DefaultKubeComponent)
	err = s.options.Admission.ApplyTo(s.generic, s.informers, s.client, objects, utilfeature.DefaultFeatureGate, version,
		append(generic, kube...)...)
	if err != nil {
		return nil, fmt.Errorf("set up admission: %w", err)
	}
	s.direct.admission, s.direct.audited = s.generic.AdmissionControl, s.generic.AuditBackend != nil
	return generic, nil
}
