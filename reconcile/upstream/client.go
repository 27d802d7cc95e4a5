package upstream

import (
	"context"
	"fmt"
	"net/http"

	"k8s.io/client-go/discovery"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
)

// clients are those of upstream's controllers, each with the identity of its own
// service account. It implements clientbuilder.ControllerClientBuilder.
type clients struct {
	term   context.Context
	client func(user string, groups ...string) *rest.Config
}

// Config implements clientbuilder.ControllerClientBuilder.
func (c clients) Config(name string) (*rest.Config, error) {
	config := rest.CopyConfig(c.client("system:serviceaccount:kube-system:"+name, "system:serviceaccounts", "system:serviceaccounts:kube-system"))
	config.UserAgent = "timonel/" + name
	config.WarningHandler = rest.NoWarnings{}
	config.Wrap(func(next http.RoundTripper) http.RoundTripper { return inTerm{c.term, next} })
	return config, nil
}

// Client implements clientbuilder.ControllerClientBuilder.
func (c clients) Client(name string) (kubernetes.Interface, error) {
	config, err := c.Config(name)
	if err != nil {
		return nil, err
	}
	return kubernetes.NewForConfig(config)
}

// DiscoveryClient implements clientbuilder.ControllerClientBuilder.
func (c clients) DiscoveryClient(name string) (discovery.DiscoveryInterface, error) {
	config, err := c.Config(name)
	if err != nil {
		return nil, err
	}
	return discovery.NewDiscoveryClientForConfig(config)
}

// ConfigOrDie implements clientbuilder.ControllerClientBuilder. It panics, and so do
// those that follow: that ends the controller which is being built, not the process.
func (c clients) ConfigOrDie(name string) *rest.Config { return must(c.Config(name)) }

// ClientOrDie implements clientbuilder.ControllerClientBuilder.
func (c clients) ClientOrDie(name string) kubernetes.Interface { return must(c.Client(name)) }

// DiscoveryClientOrDie implements clientbuilder.ControllerClientBuilder.
func (c clients) DiscoveryClientOrDie(name string) discovery.DiscoveryInterface {
	return must(c.DiscoveryClient(name))
}

func must[T any](t T, err error) T {
	if err != nil {
		panic(fmt.Sprintf("make the client of one of upstream's controllers: %v", err))
	}
	return t
}

// inTerm makes requests in a term: some controllers make them with a context of
// nothing, and a write of a leader that is none any more must be refused all the same.
type inTerm struct {
	term context.Context
	next http.RoundTripper
}

// RoundTrip implements http.RoundTripper.
func (t inTerm) RoundTrip(r *http.Request) (*http.Response, error) {
	return t.next.RoundTrip(r.WithContext(withValues{r.Context(), t.term}))
}

// withValues is a context with the values of another beside its own.
type withValues struct {
	context.Context
	values context.Context
}

// Value implements context.Context.
func (c withValues) Value(key any) any {
	if v := c.Context.Value(key); v != nil {
		return v
	}
	return c.values.Value(key)
}
