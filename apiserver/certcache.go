package apiserver

import (
	"crypto/x509"
	"net/http"
	"time"

	"k8s.io/apimachinery/pkg/util/cache"
	"k8s.io/apiserver/pkg/authentication/authenticator"
)

// certificateTTL is how long a client certificate counts as verified. Within it
// a connection's requests are not verified again, which would cost a signature
// check each: a tenth of a small write.
const certificateTTL = 10 * time.Second

// certificateCache remembers who a verified client certificate belongs to, for
// requests that say nothing else about their user.
type certificateCache struct {
	next     authenticator.Request
	verified *cache.Expiring // *x509.Certificate, one object a connection, to *authenticator.Response
}

func newCertificateCache(next authenticator.Request) certificateCache {
	return certificateCache{next: next, verified: cache.NewExpiring()}
}

// AuthenticateRequest implements authenticator.Request.
func (c certificateCache) AuthenticateRequest(r *http.Request) (*authenticator.Response, bool, error) {
	leaf := certificateAlone(r)
	if leaf == nil {
		return c.next.AuthenticateRequest(r)
	}
	if response, ok := c.verified.Get(leaf); ok {
		return response.(*authenticator.Response), true, nil
	}
	response, ok, err := c.next.AuthenticateRequest(r)
	// Who was not let in by the certificate (but as anonymous) has no entry.
	if ok && err == nil && response.User.GetName() == leaf.Subject.CommonName {
		if ttl := min(certificateTTL, time.Until(leaf.NotAfter)); ttl > 0 {
			c.verified.Set(leaf, response, ttl)
		}
	}
	return response, ok, err
}

// certificateAlone returns the request's client certificate if that alone says
// who makes it: no token, and no headers of a front proxy.
func certificateAlone(r *http.Request) *x509.Certificate {
	if r.TLS == nil || len(r.TLS.PeerCertificates) == 0 {
		return nil
	}
	for _, header := range []string{"Authorization", "Sec-Websocket-Protocol", "X-Remote-User"} {
		if len(r.Header[header]) > 0 {
			return nil
		}
	}
	return r.TLS.PeerCertificates[0]
}
