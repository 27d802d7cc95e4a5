package apiserver

import (
	"context"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"sync/atomic"
	"time"

	apiextensionsapiserver "k8s.io/apiextensions-apiserver/pkg/apiserver"
	"k8s.io/apimachinery/pkg/api/meta"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/util/sets"
	"k8s.io/apiserver/pkg/endpoints/discovery/aggregated"
	openapinamer "k8s.io/apiserver/pkg/endpoints/openapi"
	registry "k8s.io/apiserver/pkg/registry/generic"
	genericapiserver "k8s.io/apiserver/pkg/server"
	genericfilters "k8s.io/apiserver/pkg/server/filters"
	"k8s.io/apiserver/pkg/server/healthz"
	serverstorage "k8s.io/apiserver/pkg/server/storage"
	"k8s.io/apiserver/pkg/util/openapi"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/cache"
	aggregatorscheme "k8s.io/kube-aggregator/pkg/apiserver/scheme"
	"k8s.io/kubernetes/cmd/kube-apiserver/app/options"
	"k8s.io/kubernetes/pkg/api/legacyscheme"
	"k8s.io/kubernetes/pkg/controlplane"
	controlplaneapiserver "k8s.io/kubernetes/pkg/controlplane/apiserver"
	generatedopenapi "k8s.io/kubernetes/pkg/generated/openapi"
	"k8s.io/kubernetes/pkg/kubeapiserver"

	"timonel/state/storage"
	"timonel/trust"
)

// shared is what the three servers of the chain (built-in APIs, custom
// resources, aggregator) have in common.
type shared struct {
	config  Config
	options options.CompletedOptions
	generic *genericapiserver.Config
	// informers and client reach this server in memory.
	informers informers.SharedInformerFactory
	client    kubernetes.Interface
	storage   *serverstorage.DefaultStorageFactory
	decorator registry.StorageDecorator // one for all: storages share caches
	// network is the loopback client by TLS, for webhooks that this server
	// serves itself by way of an aggregated API.
	network *rest.Config
	hostURL *url.URL // network's
	life    lifecycle
	direct  *directParts
}

// newShared builds what the servers share, but for admission. Requests of the
// loopback client wait in transport for its server.
func newShared(ctx context.Context, c Config, o options.CompletedOptions, transport *inProcess) (*shared, error) {
	generic := genericapiserver.NewConfig(legacyscheme.Codecs)
	generic.MergedResourceConfig = controlplane.DefaultAPIResourceConfigSource()
	if err := o.GenericServerRunOptions.ApplyTo(generic); err != nil {
		return nil, fmt.Errorf("apply run options: %w", err)
	}
	if err := o.SecureServing.ApplyToConfig(generic); err != nil {
		return nil, fmt.Errorf("listen on %s port %d: %w", c.BindAddress, c.Port, err)
	}
	host, err := url.Parse(generic.LoopbackClientConfig.Host)
	if err != nil {
		return nil, fmt.Errorf("find the loopback address: %w", err)
	}
	generic.SecureServing.Listener = guardedListener{generic.SecureServing.Listener}
	var guard *trust.Guard
	if c.Trust != nil {
		guard = trust.NewGuard(c.Trust)
	}
	s := &shared{config: c, hostURL: host, decorator: storage.Decorator(c.Backend, c.Caches), options: o, generic: generic,
		network: generic.LoopbackClientConfig, life: newLifecycle(c.Backend.InTouch, guard, newSlowWatches(c.WatchBytes), newBodies(c.BodyBytes), newNodeStreams(c.TunnelBytes), newAnswers(c.AnswerBytes)),
		direct: &directParts{inTouch: c.Backend.InTouch}}
	generic.BuildHandlerChainFunc = s.life.handlers
	generic.LoopbackClientConfig = transport.loopback(s.network.Host)

	client, err := kubernetes.NewForConfig(generic.LoopbackClientConfig)
	if err != nil {
		return nil, fmt.Errorf("make the loopback client: %w", err)
	}
	s.client = client
	names, err := cache.NewInformerName("kube-apiserver")
	if err != nil {
		names = nil // another server of this process has the name, which is only a metric's label
	}
	s.informers = informers.NewSharedInformerFactoryWithOptions(client, 10*time.Minute,
		informers.WithTransform(dropManagedFields), informers.WithInformerName(names))

	if err := o.Features.ApplyTo(generic, client, s.informers); err != nil {
		return nil, fmt.Errorf("apply feature options: %w", err)
	}
	if err := o.APIEnablement.ApplyTo(generic, generic.MergedResourceConfig, legacyscheme.Scheme); err != nil {
		return nil, fmt.Errorf("choose API versions: %w", err)
	}
	definitions := openapi.GetOpenAPIDefinitionsWithoutDisabledFeatures(generatedopenapi.GetOpenAPIDefinitions)
	namer := openapinamer.NewDefinitionNamer([]*runtime.Scheme{
		legacyscheme.Scheme, apiextensionsapiserver.Scheme, aggregatorscheme.Scheme, metricsScheme()}...)
	generic.OpenAPIConfig = genericapiserver.DefaultOpenAPIConfig(definitions, namer)
	generic.OpenAPIConfig.Info.Title = "Kubernetes"
	generic.OpenAPIV3Config = genericapiserver.DefaultOpenAPIV3Config(definitions, namer)
	generic.OpenAPIV3Config.Info.Title = "Kubernetes"
	// Without these, builders put in functions that keep all definitions, 14 MB,
	// for as long as the configuration lives.
	generic.OpenAPIConfig.GetOperationIDAndTagsFromRoute = operationOfRoute
	generic.OpenAPIV3Config.GetOperationIDAndTagsFromRoute = operationOfRoute
	generic.LongRunningFunc = withLongPaths(genericfilters.BasicLongRunningRequestCheck(
		sets.NewString("watch", "proxy"), sets.NewString("attach", "exec", "proxy", "log", "portforward")), s.config.Paths)
	generic.AggregatedDiscoveryGroupManager = aggregated.NewResourceManager("apis")

	if s.storage, err = newStorageFactory(o, generic); err != nil {
		return nil, err
	}
	generic.RESTOptionsGetter = s.overState(o.Etcd.CreateRESTOptionsGetter(s.storage, nil))

	if err := o.Authentication.ApplyTo(ctx, &generic.Authentication, generic.SecureServing, nil, generic.OpenAPIConfig,
		generic.OpenAPIV3Config, client, s.informers, generic.APIServerID); err != nil {
		return nil, fmt.Errorf("set up authentication: %w", err)
	}
	generic.Authorization.Authorizer, generic.RuleResolver, _, err = controlplaneapiserver.BuildAuthorizer(
		ctx, o.CompletedOptions, nil, generic.APIServerID, s.informers)
	if err != nil {
		return nil, fmt.Errorf("set up authorization: %w", err)
	}
	genericapiserver.AuthorizeClientBearerToken(s.network, &generic.Authentication, &generic.Authorization)
	generic.Authentication.Authenticator = inProcessAuthenticator{trusted(c.Trust, newCertificateCache(generic.Authentication.Authenticator))}

	if err := o.Audit.ApplyTo(generic); err != nil {
		return nil, fmt.Errorf("set up audit: %w", err)
	}
	addHealthChecks(c, generic)
	return s, nil
}

// newStorageFactory makes what knows each resource's stored version, encoding
// and key prefix.
func newStorageFactory(o options.CompletedOptions, generic *genericapiserver.Config) (*serverstorage.DefaultStorageFactory, error) {
	config := kubeapiserver.NewStorageFactoryConfigEffectiveVersion(generic.EffectiveVersion)
	config.APIResourceConfig = generic.MergedResourceConfig
	config.DefaultResourceEncoding.SetEffectiveVersion(generic.EffectiveVersion)
	factory, err := config.Complete(o.Etcd).New()
	if err != nil {
		return nil, fmt.Errorf("choose storage versions: %w", err)
	}
	factory.StorageConfig.StorageObjectCountTracker = generic.StorageObjectCountTracker
	return factory, nil
}

// addHealthChecks adds the caller's checks.
func addHealthChecks(c Config, generic *genericapiserver.Config) {
	for name, check := range c.Health {
		checker := healthz.NamedCheck(name, func(r *http.Request) error { return check(r.Context()) })
		if slices.Contains(c.ReadyOnly, name) {
			generic.AddReadyzChecks(checker)
			continue
		}
		generic.AddHealthChecks(checker) // livez, readyz and healthz
	}
	for name, says := range c.Warnings {
		generic.AddReadyzChecks(&warning{name: name, says: says})
	}
}

// warning is a check that passes and says in its name what will be a problem.
type warning struct {
	name    string
	says    func() string
	mounted atomic.Bool // its path has been made, of the name alone
}

func (w *warning) Name() string {
	if says := w.says(); says != "" && !w.mounted.CompareAndSwap(false, true) {
		return w.name + " (warning: " + says + ")"
	}
	w.mounted.Store(true)
	return w.name
}

func (w *warning) Check(*http.Request) error { return nil }

// dropManagedFields keeps what nobody in this process reads out of the
// informers' memory.
func dropManagedFields(object any) (any, error) {
	if accessor, err := meta.Accessor(object); err == nil && accessor.GetManagedFields() != nil {
		accessor.SetManagedFields(nil)
	}
	return object, nil
}
