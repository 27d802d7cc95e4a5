package apiserver

import (
	"encoding/base64"
	"encoding/json"
	"net/http"
	"strings"
	"time"

	"k8s.io/apiserver/pkg/authentication/authenticator"

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
	tokens := tokensOf(r) // gone after next
	if r.TLS != nil && len(r.TLS.PeerCertificates) > 0 {
		if err := a.registry.Check(partyOf(r.TLS.PeerCertificates[0])); err != nil {
			return nil, false, err
		}
	}
	response, ok, err := a.next.AuthenticateRequest(r)
	if !ok || err != nil {
		return response, ok, err
	}
	if nodes := response.User.GetExtra()[nodeNameExtra]; len(nodes) > 0 {
		issued := issuedAt(tokens)
		for _, node := range nodes {
			if err := a.registry.Check(trust.Party{Node: node, Since: issued}); err != nil {
				return nil, false, err
			}
		}
	}
	return response, true, nil
}

// webSocketToken begins the WebSocket protocol that carries a bearer token, for
// browsers, which cannot set a header.
const webSocketToken = "base64url.bearer.authorization.k8s.io."

// tokensOf are the bearer tokens that a request shows, one of which may be verified.
func tokensOf(r *http.Request) (out []string) {
	if scheme, token, ok := strings.Cut(strings.TrimSpace(r.Header.Get("Authorization")), " "); ok && strings.EqualFold(scheme, "bearer") {
		out = append(out, strings.TrimSpace(token))
	}
	for _, header := range r.Header["Sec-Websocket-Protocol"] {
		for protocol := range strings.SplitSeq(header, ",") {
			if encoded, ok := strings.CutPrefix(strings.TrimSpace(protocol), webSocketToken); ok {
				token, _ := base64.RawURLEncoding.DecodeString(encoded) // "" is no token either
				out = append(out, string(token))
			}
		}
	}
	return out
}

// issuedAt is when the tokens that a request shows say that they were issued; zero,
// which is before everything, if one of them does not. Which of them was verified is
// not known here, so the earliest counts: a forged one makes none younger.
func issuedAt(tokens []string) (earliest time.Time) {
	for i, token := range tokens {
		at := issueOf(token)
		if i == 0 || at.Before(earliest) {
			earliest = at
		}
	}
	return earliest
}

func issueOf(token string) time.Time {
	parts := strings.Split(token, ".")
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
