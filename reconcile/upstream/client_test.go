package upstream

import (
	"context"
	"net/http"
	"testing"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/rest"
)

type key string

// transport notes the requests that it is given and answers none.
type transport func(*http.Request) (*http.Response, error)

func (t transport) RoundTrip(r *http.Request) (*http.Response, error) { return t(r) }

// Each controller is its own service account, and what it asks with a context of
// nothing is asked in the term all the same.
func TestRequestsAreOfTheTermAndTheAccount(t *testing.T) {
	t.Parallel()
	var user string
	var groups []string
	var term, own any
	builder := clients{context.WithValue(t.Context(), key("term"), 7), func(u string, g ...string) *rest.Config {
		user, groups = u, g
		return &rest.Config{Host: "x", Transport: transport(func(r *http.Request) (*http.Response, error) {
			term, own = r.Context().Value(key("term")), r.Context().Value(key("own"))
			return nil, http.ErrHandlerTimeout
		})}
	}}
	client, err := builder.Client("ttl-controller")
	if err != nil {
		t.Fatal(err)
	}
	if user != "system:serviceaccount:kube-system:ttl-controller" || len(groups) != 2 || groups[0] != "system:serviceaccounts" || groups[1] != "system:serviceaccounts:kube-system" {
		t.Errorf("the client is %s of %v", user, groups)
	}
	if _, err := client.CoreV1().Nodes().Get(context.WithValue(context.Background(), key("own"), "mine"), "n", metav1.GetOptions{}); err == nil {
		t.Error("a request without an answer has no error")
	}
	if term != 7 || own != "mine" {
		t.Errorf("the request has the term %v and of its own %v, want 7 and mine", term, own)
	}
}
