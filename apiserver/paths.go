package apiserver

import (
	"net/http"
	"strings"

	"k8s.io/apiserver/pkg/endpoints/request"
	"k8s.io/apiserver/pkg/server/mux"
)

// installPaths serves Config.Paths. They come after authentication and
// authorization, as everything in the mux does.
func installPaths(m *mux.PathRecorderMux, paths map[string]http.Handler) {
	for path, handler := range paths {
		if strings.HasSuffix(path, "/") {
			m.HandlePrefix(path, handler)
		} else {
			m.Handle(path, handler)
		}
	}
}

// withLongPaths says of requests for Config.Paths that they may take long: they
// have no deadline and do not count as in flight.
func withLongPaths(next request.LongRunningRequestCheck, paths map[string]http.Handler) request.LongRunningRequestCheck {
	return func(r *http.Request, info *request.RequestInfo) bool {
		if info != nil && !info.IsResourceRequest && paths[info.Path] != nil {
			return true
		}
		return next(r, info)
	}
}
