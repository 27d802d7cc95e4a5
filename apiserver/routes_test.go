package apiserver

import (
	"fmt"
	"net/http"
	"net/http/httptest"
	"testing"

	"github.com/emicklei/go-restful/v3"
	"k8s.io/apimachinery/pkg/util/sets"
	"k8s.io/apiserver/pkg/endpoints/request"
)

// routed is a container with the kinds of routes that Kubernetes' groups have; each
// answers with its path template and the parameters it took.
func routed(t testing.TB, router restful.RouteSelector) *restful.Container {
	t.Helper()
	c := restful.NewContainer()
	c.Router(router)
	for _, root := range []string{"/api/v1", "/apis/apps/v1"} {
		ws := new(restful.WebService).Path(root)
		for _, r := range []struct {
			method, path string
			consumes     []string
		}{
			{"GET", "/", nil},
			{"GET", "/namespaces", nil},
			{"POST", "/namespaces", nil},
			{"GET", "/namespaces/{name}", nil},
			{"PUT", "/namespaces/{name}/status", nil},
			{"PUT", "/namespaces/{name}/finalize", nil},
			{"GET", "/nodes/{name}", nil},
			{"GET", "/nodes/{name}/proxy/{path:*}", nil},
			{"GET", "/nodes/{name}/proxy", nil},
			{"GET", "/pods", nil},
			{"GET", "/watch/pods", nil},
			{"GET", "/watch/namespaces/{namespace}/pods/{name}", nil},
			{"GET", "/namespaces/{namespace}/pods", nil},
			{"POST", "/namespaces/{namespace}/pods", nil},
			{"DELETE", "/namespaces/{namespace}/pods", nil},
			{"GET", "/namespaces/{namespace}/pods/{name}", nil},
			{"PATCH", "/namespaces/{namespace}/pods/{name}", []string{"application/json-patch+json", "application/apply-patch+yaml"}},
			{"GET", "/namespaces/{namespace}/pods/{name}/log", nil},
			{"POST", "/namespaces/{namespace}/pods/{name}/eviction", nil},
			{"GET", "/namespaces/{namespace}/services/{name}/proxy/{path:*}", nil},
		} {
			template := root + r.path
			builder := ws.Method(r.method).Path(r.path).Produces("application/json", "application/vnd.kubernetes.protobuf").
				To(func(r *restful.Request, w *restful.Response) {
					fmt.Fprint(w, r.Request.Method, " ", template, " ", r.PathParameters())
				})
			if r.consumes != nil {
				builder.Consumes(r.consumes...)
			}
			ws.Route(builder)
		}
		c.Add(ws)
	}
	return c
}

// ask returns what a container answers to a request of a path.
func ask(t testing.TB, c *restful.Container, method, path, contentType, accept string) string {
	t.Helper()
	r, err := http.NewRequest(method, "http://server/", nil)
	if err != nil {
		t.Fatal(err)
	}
	r.URL.Path = path
	for name, value := range map[string]string{"Content-Type": contentType, "Accept": accept} {
		if value != "" {
			r.Header.Set(name, value)
		}
	}
	resolver := request.RequestInfoFactory{APIPrefixes: sets.NewString("api", "apis"), GrouplessAPIPrefixes: sets.NewString("api")}
	if info, err := resolver.NewRequestInfo(r); err == nil {
		r = r.WithContext(request.WithRequestInfo(r.Context(), info))
	}
	w := httptest.NewRecorder()
	c.Dispatch(w, r)
	return fmt.Sprint(w.Code, " ", w.Body.String())
}

// TestRoutesAreUpstreams: whatever was asked before, a request goes where go-restful
// alone would send it.
func TestRoutesAreUpstreams(t *testing.T) {
	t.Parallel()
	cache := newRouteCache(restful.CurlyRouter{})
	ours, theirs := routed(t, cache), routed(t, restful.CurlyRouter{})
	paths := []string{
		"/api/v1", "/api/v1/", "/api/v1/pods", "/api/v1/pods/", "/api/v1//pods", "/api/v1/namespaces", "/api/v1/namespaces/a", "/api/v1/namespaces/pods",
		"/api/v1/namespaces/a/status", "/api/v1/namespaces/a/finalize", "/api/v1/namespaces/a/pods", "/api/v1/namespaces/a/pods/", "/api/v1/namespaces/b/pods",
		"/api/v1/namespaces/a/pods/p", "/api/v1/namespaces/b/pods/q", "/api/v1/namespaces/a/pods/log", "/api/v1/namespaces/a/pods/p/log", "/api/v1/namespaces/a/pods/p/log/more",
		"/api/v1/namespaces/a/pods/p/eviction", "/api/v1/namespaces/a/pods/{name}", "/api/v1/namespaces/a/services/s/proxy", "/api/v1/namespaces/a/services/s/proxy/x/y",
		"/api/v1/nodes/n", "/api/v1/nodes/n/proxy", "/api/v1/nodes/n/proxy/metrics/cadvisor", "/api/v1/proxy/nodes/n", "/api/v1/watch/pods",
		"/api/v1/watch/namespaces/a/pods/p", "/api/v1/namespaces/watch/pods/p", "/apis/apps/v1/namespaces/a/pods/p", "/apis/apps/v1/pods", "/apis/apps/v2/pods",
		"/apis/batch/v1/pods", "/api/v1/secrets", "/api/v1/namespaces/a", "/healthz", "/", "",
	}
	for round := range 3 { // the first remembers what the others are answered with
		for _, method := range []string{"GET", "POST", "PUT", "PATCH", "DELETE", "HEAD"} {
			for _, contentType := range []string{"", "application/json", "application/apply-patch+yaml", "text/plain"} {
				for _, accept := range []string{"", "application/json", "application/vnd.kubernetes.protobuf,application/json", "text/html"} {
					for _, path := range paths {
						want := ask(t, theirs, method, path, contentType, accept)
						if got := ask(t, ours, method, path, contentType, accept); got != want {
							t.Fatalf("round %d: %s %q of %q as %q:\n%s\nwant\n%s", round, method, path, contentType, accept, got, want)
						}
					}
				}
			}
		}
	}
	if len(cache.known) == 0 {
		t.Error("nothing was remembered")
	}
}

func TestRoutesAreBounded(t *testing.T) {
	t.Parallel()
	cache := newRouteCache(restful.CurlyRouter{})
	c := routed(t, cache)
	for i := range 2 * maxRoutes {
		ask(t, c, "GET", "/api/v1/pods", "", fmt.Sprintf("application/json;q=0.%d", i))
	}
	if n := len(cache.known); n == 0 || n > maxRoutes {
		t.Errorf("%d routes are remembered, at most %d should be", n, maxRoutes)
	}
}

func FuzzRoutes(f *testing.F) {
	ours, theirs := routed(f, newRouteCache(restful.CurlyRouter{})), routed(f, restful.CurlyRouter{})
	f.Add("GET", "/api/v1/namespaces/a/pods/p", "", "application/json")
	f.Add("PATCH", "/apis/apps/v1/namespaces/a/pods/p", "application/apply-patch+yaml", "")
	f.Fuzz(func(t *testing.T, method, path, contentType, accept string) {
		if _, err := http.NewRequest(method, "http://server/", nil); err != nil {
			t.Skip()
		}
		want := ask(t, theirs, method, path, contentType, accept)
		for range 2 {
			if got := ask(t, ours, method, path, contentType, accept); got != want {
				t.Errorf("%s %q of %q as %q: %s, want %s", method, path, contentType, accept, got, want)
			}
		}
	})
}
