package apiserver

import (
	"net/http"
	"slices"
	"strings"
	"sync"

	"github.com/emicklei/go-restful/v3"
	"k8s.io/apiserver/pkg/endpoints/request"
)

// maxRoutes bounds what a routeCache remembers: clients choose their headers.
const maxRoutes = 4096

// routeCache remembers which route serves which kind of request. go-restful compares
// a path with each of some hundred routes of its API group, and copies those that
// match: a twentieth of a small request.
//
// A request of a resource is known by what [request.RequestInfo] says of it, as long
// as its path is the one that follows from that; the names in it do not matter.
// Routes are installed before the server runs and stay.
type routeCache struct {
	next restful.RouteSelector

	mu    sync.RWMutex
	known map[routeKey]knownRoute
}

// routeKey is all that decides which route serves a request.
type routeKey struct {
	method, contentType, accept                   string
	prefix, group, version, resource, subresource string
	namespaced, named                             bool
}

type knownRoute struct {
	service *restful.WebService
	route   *restful.Route
}

func newRouteCache(next restful.RouteSelector) *routeCache {
	return &routeCache{next: next, known: map[routeKey]knownRoute{}}
}

// SelectRoute implements restful.RouteSelector.
func (c *routeCache) SelectRoute(services []*restful.WebService, r *http.Request) (*restful.WebService, *restful.Route, error) {
	key, ok := keyOf(r)
	if !ok {
		return c.next.SelectRoute(services, r)
	}
	c.mu.RLock()
	known, ok := c.known[key]
	c.mu.RUnlock()
	if ok && slices.Contains(services, known.service) {
		return known.service, known.route, nil
	}
	service, route, err := c.next.SelectRoute(services, r)
	if err == nil && service != nil && route != nil {
		c.mu.Lock()
		if len(c.known) >= maxRoutes {
			clear(c.known)
		}
		c.known[key] = knownRoute{service, route}
		c.mu.Unlock()
	}
	return service, route, err
}

// keyOf returns what a request's route depends on, false if that is more than a key
// says.
func keyOf(r *http.Request) (routeKey, bool) {
	info, ok := request.RequestInfoFrom(r.Context())
	if !ok || !info.IsResourceRequest || r.Header == nil {
		return routeKey{}, false
	}
	key := routeKey{
		method: r.Method, contentType: r.Header.Get("Content-Type"), accept: r.Header.Get("Accept"),
		prefix: info.APIPrefix, group: info.APIGroup, version: info.APIVersion, resource: info.Resource, subresource: info.Subresource,
		named: info.Name != "",
	}
	// A namespace itself is in no namespace, whatever its RequestInfo says.
	key.namespaced = info.Namespace != "" && info.Resource != "namespaces"
	rest := path(r.URL.Path)
	rest.take(info.APIPrefix)
	if info.APIGroup != "" {
		rest.take(info.APIGroup)
	}
	rest.take(info.APIVersion)
	if key.namespaced {
		rest.take("namespaces")
		rest.take(info.Namespace)
	}
	rest.take(info.Resource)
	if key.named {
		rest.take(info.Name)
	}
	if key.subresource != "" {
		rest.take(info.Subresource)
	}
	return key, rest == "" && len(key.contentType)+len(key.accept) < 512
}

// path is what is left of a path, each element with a slash before it.
type path string

// otherPath is what is left of a path that is not as expected.
const otherPath path = "?"

// take removes the first element, if it is the one given.
func (p *path) take(element string) {
	rest, ok := strings.CutPrefix(string(*p), "/")
	if ok {
		rest, ok = strings.CutPrefix(rest, element)
	}
	if !ok || element == "" || rest != "" && rest[0] != '/' {
		*p = otherPath
		return
	}
	*p = path(rest)
}
