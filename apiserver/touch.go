package apiserver

import (
	"net/http"
	"slices"
	"strings"

	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apiserver/pkg/authentication/user"
	"k8s.io/apiserver/pkg/endpoints/handlers/responsewriters"
	"k8s.io/apiserver/pkg/endpoints/request"

	"timonel/state/storage"
)

// touchFilter refuses requests while this replica is out of touch with the cluster:
// neither what it has, nor what it would allow, is known to hold any more. What tells
// how the replica is goes on, and so do its own caches.
type touchFilter struct {
	inTouch    func() (lost <-chan struct{}, err error)
	serializer runtime.NegotiatedSerializer
}

// ownPaths begins the paths of Config.Paths, with which an administrator repairs a
// cluster that has no leader.
const ownPaths = "/timonel/"

// before is in front of authentication, which reads the state.
func (f touchFilter) before(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if err := f.refusal(r); err != nil && !tellsHealth(r.URL.Path) && !strings.HasPrefix(r.URL.Path, ownPaths) {
			f.refuse(w, r, err)
			return
		}
		next.ServeHTTP(w, r)
	})
}

// after is behind authentication: of who asks for ownPaths, it lets through those
// whose rights do not depend on the state.
func (f touchFilter) after(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if strings.HasPrefix(r.URL.Path, ownPaths) {
			u, ok := request.UserFrom(r.Context())
			if master := ok && slices.Contains(u.GetGroups(), user.SystemPrivilegedGroup); !master {
				if err := f.refusal(r); err != nil {
					f.refuse(w, r, err)
					return
				}
			}
		}
		next.ServeHTTP(w, r)
	})
}

func (f touchFilter) refusal(r *http.Request) error {
	if storage.IsOwn(r.Context()) {
		return nil
	}
	_, err := f.inTouch()
	return err
}

// refuse also asks the client to connect anew: a load balancer then chooses another.
func (f touchFilter) refuse(w http.ResponseWriter, r *http.Request, err error) {
	w.Header().Set("Connection", "close")
	info, ok := request.RequestInfoFrom(r.Context())
	watch := ok && info.IsResourceRequest && info.Verb == "watch"
	var version schema.GroupVersion
	if ok {
		version = schema.GroupVersion{Group: info.APIGroup, Version: info.APIVersion}
	}
	responsewriters.ErrorNegotiated(storage.OutOfTouch(err, watch), f.serializer, version, w, r)
}

// tellsHealth says whether a path tells how this replica is, and nothing of the state.
func tellsHealth(path string) bool {
	for _, p := range []string{"/healthz", "/livez", "/readyz"} {
		if path == p || strings.HasPrefix(path, p+"/") {
			return true
		}
	}
	return path == "/metrics" || path == "/version"
}
