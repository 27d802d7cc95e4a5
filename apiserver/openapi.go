package apiserver

import (
	"context"
	"fmt"
	"log/slog"
	"maps"
	"net/http"
	"strings"
	"sync"

	"github.com/emicklei/go-restful/v3"
	openapinamer "k8s.io/apiserver/pkg/endpoints/openapi"
	genericapiserver "k8s.io/apiserver/pkg/server"
	"k8s.io/kube-openapi/pkg/builder"
	"k8s.io/kube-openapi/pkg/builder3"
	"k8s.io/kube-openapi/pkg/cached"
	"k8s.io/kube-openapi/pkg/common"
	"k8s.io/kube-openapi/pkg/common/restfuladapter"
	"k8s.io/kube-openapi/pkg/handler"
	"k8s.io/kube-openapi/pkg/handler3"
	"k8s.io/kube-openapi/pkg/spec3"
	"k8s.io/kube-openapi/pkg/validation/spec"
)

const (
	openAPIv2 = "/openapi/v2"
	openAPIv3 = "/openapi/v3"

	// gvkExtension lists the group-version-kinds that a schema is of.
	gvkExtension = "x-kubernetes-group-version-kind"
)

// installOpenAPI serves the specifications of the built-in APIs as upstream
// does, in a third of the memory: v2, which few clients still ask for, is built
// when it is asked for, and what was built is dropped once it is rendered.
func installOpenAPI(server *genericapiserver.GenericAPIServer, v2 *common.Config, v3 *common.OpenAPIV3Config) error {
	mux, container := server.Handler.NonGoRestfulMux, server.Handler.GoRestfulContainer

	// Builders write into the definitions that they share, and all specifications
	// are asked for at once.
	var building sync.Mutex

	swagger := &draft[spec.Swagger]{name: openAPIv2, build: func() (*spec.Swagger, error) {
		building.Lock()
		defer building.Unlock()
		built, err := builder.BuildOpenAPISpecFromRoutes(restfuladapter.AdaptWebServices(container.RegisteredWebServices()), v2)
		if err == nil {
			built.Definitions = handler.PruneDefaults(built.Definitions)
		}
		return built, err
	}}
	routes := handlers{}
	handler.NewOpenAPIServiceLazy(swagger).RegisterOpenAPIVersionedService(openAPIv2, routes)
	mux.Handle(openAPIv2, &rendered{path: openAPIv2, whole: routes[openAPIv2], next: routes[openAPIv2], drop: swagger.drop})

	service := handler3.NewOpenAPIService()
	routes = handlers{}
	if err := service.RegisterOpenAPIV3VersionedService(openAPIv3, routes); err != nil {
		return fmt.Errorf("serve OpenAPI v3: %w", err)
	}
	var drafts []*draft[spec3.OpenAPI]
	for _, web := range container.RegisteredWebServices() {
		path := strings.TrimPrefix(web.RootPath(), "/")
		one := &draft[spec3.OpenAPI]{name: path, build: func() (*spec3.OpenAPI, error) {
			building.Lock()
			defer building.Unlock()
			return buildV3(path, web, v3)
		}}
		drafts = append(drafts, one)
		service.UpdateGroupVersionLazy(path, one)
	}
	discovery := &rendered{path: openAPIv3, whole: routes[openAPIv3], next: routes[openAPIv3], drop: func() {
		for _, one := range drafts {
			one.drop()
		}
	}}
	mux.Handle(openAPIv3, discovery)
	mux.HandlePrefix(openAPIv3+"/", http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		discovery.render()
		routes[openAPIv3+"/"].ServeHTTP(w, r)
	}))
	return nil
}

// operationOfRoute names the operation of a route, as upstream does.
func operationOfRoute(route common.Route) (string, []string, error) {
	adapter, ok := route.(*restfuladapter.RouteAdapter)
	if !ok {
		return "", nil, fmt.Errorf("route %s %s is a %T", route.Method(), route.Path(), route)
	}
	return openapinamer.GetOperationIDAndTags(adapter.Route)
}

// buildV3 builds the specification of one group version, or of what is at one
// path.
func buildV3(path string, web *restful.WebService, config *common.OpenAPIV3Config) (*spec3.OpenAPI, error) {
	built, err := builder3.BuildOpenAPISpecFromRoutes(restfuladapter.AdaptWebServices([]*restful.WebService{web}), config)
	if err != nil {
		return nil, err
	}
	if built.Components != nil {
		// The next builder writes into these maps while this is rendered.
		for _, schema := range built.Components.Schemas {
			schema.Extensions = maps.Clone(schema.Extensions)
		}
	}
	group, version, ok := strings.Cut(strings.TrimPrefix(path, "apis/"), "/")
	if path == "api/v1" {
		group, version = "", "v1"
	} else if !ok || !strings.HasPrefix(path, "apis/") || strings.Contains(version, "/") {
		return built, nil
	}
	if built.Components != nil {
		for _, schema := range built.Components.Schemas {
			keepOwnKinds(schema, group, version)
		}
	}
	return built, nil
}

// keepOwnKinds drops, of the kinds that every group has (DeleteOptions and
// WatchEvent), those of other groups: some sixty each, in every group.
func keepOwnKinds(schema *spec.Schema, group, version string) {
	kinds, ok := schema.Extensions[gvkExtension].([]any)
	if !ok || len(kinds) < 2 {
		return
	}
	var own []any
	for _, entry := range kinds {
		kind, ok := entry.(map[string]any)
		if !ok || (kind["kind"] != "DeleteOptions" && kind["kind"] != "WatchEvent") {
			return
		}
		if (kind["group"] == group && kind["version"] == version) || (kind["group"] == "" && kind["version"] == "v1") {
			own = append(own, entry)
		}
	}
	if len(own) > 0 {
		schema.Extensions[gvkExtension] = own
	}
}

// draft is a specification that is built when it is first needed and can be
// dropped when it is rendered: its caches ask for it for ever, but read it again
// only if its version changes, and it does not. It implements cached.Value.
type draft[T any] struct {
	name  string
	build func() (*T, error)

	mu    sync.Mutex
	built *T
}

var _ cached.Value[*spec.Swagger] = (*draft[spec.Swagger])(nil)

// Get implements cached.Value.
func (d *draft[T]) Get() (*T, string, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.built == nil {
		built, err := d.build()
		if err != nil {
			return nil, "", fmt.Errorf("build the OpenAPI specification of %s: %w", d.name, err)
		}
		d.built = built
	}
	return d.built, d.name, nil
}

// drop empties what was built, which must be rendered.
func (d *draft[T]) drop() {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.built != nil {
		var none T
		*d.built = none
	}
}

// rendered is a handler in front of which everything that it serves from is
// rendered once, and the drafts dropped.
type rendered struct {
	path  string       // of whole
	whole http.Handler // answering a request for JSON renders all
	next  http.Handler
	drop  func()

	mu   sync.Mutex
	done bool
}

// ServeHTTP implements http.Handler.
func (h *rendered) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	h.render()
	h.next.ServeHTTP(w, r)
}

// render renders, unless that is done. If it fails the drafts stay and the next
// request tries again.
func (h *rendered) render() {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.done {
		return
	}
	request, err := http.NewRequestWithContext(context.Background(), http.MethodHead, h.path, nil)
	if err != nil {
		return // the path is a constant
	}
	request.Header.Set("Accept", "application/json")
	var status statusOnly
	if h.whole.ServeHTTP(&status, request); status.code != 0 && status.code != http.StatusOK {
		slog.Error("OpenAPI specification cannot be rendered", "path", h.path, "status", status.code)
		return
	}
	h.drop()
	h.done = true
}

// statusOnly is a response of which only the status matters.
type statusOnly struct {
	header http.Header
	code   int
}

// Header implements http.ResponseWriter.
func (s *statusOnly) Header() http.Header {
	if s.header == nil {
		s.header = http.Header{}
	}
	return s.header
}

// Write implements http.ResponseWriter.
func (s *statusOnly) Write(p []byte) (int, error) { return len(p), nil }

// WriteHeader implements http.ResponseWriter.
func (s *statusOnly) WriteHeader(code int) { s.code = code }

// handlers takes the handlers that upstream registers, to be wrapped.
type handlers map[string]http.Handler

// Handle implements common.PathHandler.
func (h handlers) Handle(path string, handler http.Handler) { h[path] = handler }

// HandlePrefix implements common.PathHandlerByGroupVersion.
func (h handlers) HandlePrefix(path string, handler http.Handler) { h[path] = handler }
