package apiserver

import (
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"net/http"
	"testing"
	"testing/synctest"
	"time"

	"k8s.io/apiserver/pkg/authentication/authenticator"
	"k8s.io/apiserver/pkg/authentication/user"
)

func TestCertificateCache(t *testing.T) {
	certificate := func(lifetime time.Duration) *x509.Certificate {
		return &x509.Certificate{Subject: pkix.Name{CommonName: "u"}, NotAfter: time.Now().Add(lifetime)}
	}
	for _, test := range []struct {
		name     string
		lifetime time.Duration
		header   string
		as       string
		err      error
		wait     time.Duration // between two requests
		want     int           // calls of the real authenticator
	}{
		{"again", time.Hour, "", "u", nil, time.Second, 1},
		{"later", time.Hour, "", "u", nil, certificateTTL + time.Second, 2},
		{"expired meanwhile", 2 * time.Second, "", "u", nil, 3 * time.Second, 2},
		{"token", time.Hour, "Authorization", "u", nil, time.Second, 2},
		{"front proxy", time.Hour, "X-Remote-User", "u", nil, time.Second, 2},
		{"anonymous", time.Hour, "", user.Anonymous, nil, time.Second, 2},
		{"refused", time.Hour, "", "u", errors.New("refused"), time.Second, 2},
	} {
		t.Run(test.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				calls := 0
				c := newCertificateCache(authenticator.RequestFunc(func(*http.Request) (*authenticator.Response, bool, error) {
					calls++
					return &authenticator.Response{User: &user.DefaultInfo{Name: test.as}}, test.err == nil, test.err
				}))
				r := &http.Request{Header: http.Header{}, TLS: &tls.ConnectionState{PeerCertificates: []*x509.Certificate{certificate(test.lifetime)}}}
				if test.header != "" {
					r.Header.Set(test.header, "x")
				}
				for range 2 {
					response, ok, err := c.AuthenticateRequest(r)
					if !errors.Is(err, test.err) || ok != (test.err == nil) || response.User.GetName() != test.as {
						t.Errorf("%v, %v, %v", response, ok, err)
					}
					time.Sleep(test.wait)
				}
				if calls != test.want {
					t.Errorf("%d verifications, want %d", calls, test.want)
				}
			})
		})
	}
}
