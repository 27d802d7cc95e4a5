package apiserver

import (
	"encoding/base64"
	"encoding/json"
	"net/http"
	"strings"
	"time"

	"k8s.io/apiserver/pkg/authentication/authenticator"

	"timonel/pki"
	"timonel/trust"
)

// nodeNameExtra is where a service account token's user says for a pod on which
// node the token was issued.
const nodeNameExtra = "authentication.kubernetes.io/node-name"

// trusted refuses those whom the replicated state has revoked, however good the
// certificate or token is that they show: a client with a revoked key, a node whose
// name is bound to another key, and pods' tokens of a node that was revoked.
func trusted(registry *trust.Registry, next authenticator.Request) authenticator.Request {
	if registry == nil {
		return next
	}
	return trustAuthenticator{registry, next}
}

type trustAuthenticator struct {
	registry *trust.Registry
	next     authenticator.Request
}

// AuthenticateRequest implements authenticator.Request.
func (a trustAuthenticator) AuthenticateRequest(r *http.Request) (*authenticator.Response, bool, error) {
	issued := time.Time{}
	bearer := r.Header.Get("Authorization") // gone after next
	if r.TLS != nil && len(r.TLS.PeerCertificates) > 0 {
		leaf := r.TLS.PeerCertificates[0]
		p := trust.Party{Key: trust.KeyOf(leaf)}
		if id := pki.IdentityOf(leaf); id.Role == pki.RoleNode {
			p.Node = id.Name
		}
		if err := a.registry.Check(p); err != nil {
			return nil, false, err
		}
	}
	response, ok, err := a.next.AuthenticateRequest(r)
	if !ok || err != nil {
		return response, ok, err
	}
	if nodes := response.User.GetExtra()[nodeNameExtra]; len(nodes) > 0 {
		issued = issuedAt(bearer)
		for _, node := range nodes {
			if err := a.registry.Check(trust.Party{Node: node, Since: issued}); err != nil {
				return nil, false, err
			}
		}
	}
	return response, true, nil
}

// issuedAt is when a bearer token that was verified says that it was issued; zero,
// which is before everything, if it does not.
func issuedAt(authorization string) time.Time {
	_, token, _ := strings.Cut(strings.TrimSpace(authorization), " ")
	parts := strings.Split(strings.TrimSpace(token), ".")
	if len(parts) != 3 {
		return time.Time{}
	}
	raw, err := base64.RawURLEncoding.DecodeString(parts[1])
	if err != nil {
		return time.Time{}
	}
	var claims struct {
		IssuedAt float64 `json:"iat"`
	}
	if json.Unmarshal(raw, &claims) != nil || claims.IssuedAt <= 0 {
		return time.Time{}
	}
	return time.Unix(int64(claims.IssuedAt), 0)
}
