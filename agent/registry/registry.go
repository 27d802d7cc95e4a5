package registry

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"net/http"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/core/remotes"
	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/containerd/containerd/v2/core/remotes/docker/config"
	"github.com/containerd/containerd/v2/core/transfer"
	"github.com/containerd/log"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/sirupsen/logrus"
	runtimev1 "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// Config says how registries are reached.
type Config struct {
	// HostsDir has the administrator's HOST/hosts.toml.
	HostsDir string
	// User and Secret open the registry; without User, Secret is an identity token.
	User, Secret string
	// Stall is for how long an answer may stand still. Default: a minute.
	Stall time.Duration
}

// Credentials are the user and secret of CRI's form, which has three ways to say them.
func Credentials(auth *runtimev1.AuthConfig) (user, secret string, err error) {
	switch {
	case auth == nil:
		return "", "", nil
	case auth.Username != "":
		return auth.Username, auth.Password, nil
	case auth.IdentityToken != "":
		return "", auth.IdentityToken, nil
	case auth.Auth != "":
		raw, err := base64.StdEncoding.DecodeString(auth.Auth)
		if err != nil {
			return "", "", errors.New("the pull secret's auth is not base64")
		}
		user, secret, ok := strings.Cut(string(raw), ":")
		if !ok {
			return "", "", errors.New("the pull secret's auth has no colon between user and password")
		}
		return user, strings.Trim(secret, "\x00"), nil
	}
	return "", "", nil
}

// Resolver is containerd's, of one pull.
type Resolver struct {
	remotes.Resolver
	cfg Config

	mu    sync.Mutex
	known []string // hosts that the image's name or the administrator names
	admin bool     // who configured this registry, by its name
	idle  []*http.Client

	turn sync.Mutex // see inTurn
}

// New returns a resolver for one image.
func New(cfg Config) *Resolver {
	if cfg.Stall <= 0 {
		cfg.Stall = time.Minute
	}
	r := &Resolver{cfg: cfg}
	r.Resolver = docker.NewResolver(docker.ResolverOptions{Hosts: r.hosts})
	return r
}

// Close ends idle connections.
func (r *Resolver) Close() {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, c := range r.idle {
		c.CloseIdleConnections()
	}
}

// SetOptions implements remotes.ResolverWithOptions.
func (r *Resolver) SetOptions(options ...transfer.ImageResolverOption) {
	if inner, ok := r.Resolver.(remotes.ResolverWithOptions); ok {
		inner.SetOptions(options...)
	}
}

// Quiet has containerd's library tell errors alone: of what it does otherwise, the agent's
// own log and events tell.
func Quiet(ctx context.Context) context.Context {
	l := logrus.New()
	l.SetLevel(logrus.ErrorLevel)
	return log.WithLogger(ctx, logrus.NewEntry(l))
}

// hosts are where a registry is found: its mirrors and itself.
func (r *Resolver) hosts(registry string) ([]docker.RegistryHost, error) {
	byAdmin := false
	options := config.HostOptions{Credentials: r.credentials, UpdateClient: r.bound}
	if r.cfg.HostsDir != "" {
		find := config.HostDirFromRoot(r.cfg.HostsDir)
		options.HostDir = func(host string) (string, error) {
			dir, err := find(host)
			byAdmin = err == nil && dir != "" && filepath.Base(dir) != "_default"
			return dir, err
		}
	}
	hosts, err := config.ConfigureHosts(Quiet(context.Background()), options)(registry)
	if err != nil {
		return nil, fmt.Errorf("how to reach registry %s: %w", registry, err)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.admin = byAdmin
	for i := range hosts {
		h := &hosts[i]
		r.known = append(r.known, h.Host)
		// The authorizer keeps the client that it has: what it asks for is no content.
		c := *h.Client
		c.Transport = asContent{c.Transport}
		h.Client = &c
		h.Authorizer = inTurn{h.Authorizer, &r.turn}
	}
	return hosts, nil
}

// credentials are for hosts that are known. One that a registry redirects to, and that then
// wants a password, gets none.
func (r *Resolver) credentials(host string) (string, string, error) {
	if !r.knows(host) {
		return "", "", nil
	}
	return r.cfg.User, r.cfg.Secret, nil
}

// knows says whether a host is the registry or a mirror of it.
func (r *Resolver) knows(host string) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Contains(r.known, host)
}

// inTurn has one token asked for at a time: containerd's authorizer shares what it learns
// between requests without a lock.
type inTurn struct {
	docker.Authorizer
	turn *sync.Mutex
}

// Authorize implements docker.Authorizer.
func (a inTurn) Authorize(ctx context.Context, req *http.Request) error {
	a.turn.Lock()
	defer a.turn.Unlock()
	return a.Authorizer.Authorize(ctx, req)
}

// AddResponses implements docker.Authorizer.
func (a inTurn) AddResponses(ctx context.Context, responses []*http.Response) error {
	a.turn.Lock()
	defer a.turn.Unlock()
	return a.Authorizer.AddResponses(ctx, responses)
}

// place says who named a host.
func (r *Resolver) place(host string) place {
	r.mu.Lock()
	defer r.mu.Unlock()
	switch {
	case r.admin:
		return admin
	case slices.Contains(r.known, host):
		return own
	}
	return elsewhere
}

// bound has a client ask through a guard.
func (r *Resolver) bound(c *http.Client) error {
	t, ok := c.Transport.(*http.Transport)
	if !ok {
		if _, ok := c.Transport.(*guard); ok {
			return nil // a copy of one that is guarded
		}
		return fmt.Errorf("containerd's client has a transport of type %T, wanted *http.Transport", c.Transport)
	}
	t.DialContext = connect
	t.MaxResponseHeaderBytes = maxHeader
	c.Transport = &guard{next: t, resolver: r, stall: r.cfg.Stall}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.idle = append(r.idle, c)
	return nil
}

// Fetcher implements remotes.Resolver.
func (r *Resolver) Fetcher(ctx context.Context, ref string) (remotes.Fetcher, error) {
	inner, err := r.Resolver.Fetcher(ctx, ref)
	if err != nil {
		return nil, err
	}
	return remotes.FetcherFunc(func(ctx context.Context, desc ocispec.Descriptor) (io.ReadCloser, error) {
		desc.URLs = nil
		body, err := inner.Fetch(ctx, desc)
		if err != nil {
			return nil, err
		}
		return &blob{ReadCloser: body, desc: desc, grace: r.cfg.Stall}, nil
	}), nil
}

// leastRate is how many bytes a second a blob has to come with, seen over all that the
// registry had to say of it.
const leastRate = 1 << 10

// blob is content on its way.
type blob struct {
	io.ReadCloser
	desc  ocispec.Descriptor
	grace time.Duration
	at    int64
	whole bool // read from its first byte on, so that frames are seen
	off   bool
	spent time.Duration // waiting for the registry, not for the disk
	got   int64
	zstd  frames
}

// Read implements io.Reader.
func (b *blob) Read(p []byte) (int, error) {
	began := time.Now()
	n, err := b.ReadCloser.Read(p)
	b.spent += time.Since(began)
	b.got += int64(n)
	if b.at == 0 {
		b.whole = true
	}
	b.at += int64(n)
	if b.at > b.desc.Size {
		return 0, fmt.Errorf("the registry sends more of %s than the %d bytes that it was said to have", b.desc.Digest, b.desc.Size)
	}
	if b.spent > b.grace && b.got < int64(b.spent.Seconds()*leastRate) {
		return 0, fmt.Errorf("the registry sent %d bytes of %s in %s: at less than %d bytes a second it is given up", b.got, b.desc.Digest, b.spent.Round(time.Second), leastRate)
	}
	if b.whole && !b.off {
		if werr := b.zstd.scan(p[:n]); werr != nil {
			return 0, fmt.Errorf("layer %s: %w", b.desc.Digest, werr)
		}
	}
	return n, err
}

// Seek implements io.Seeker: a fetch that was begun goes on where it was.
func (b *blob) Seek(offset int64, whence int) (int64, error) {
	s, ok := b.ReadCloser.(io.Seeker)
	if !ok {
		return 0, errors.New("the registry's answer cannot be read from another place")
	}
	at, err := s.Seek(offset, whence)
	if err == nil && at != b.at {
		b.at, b.off = at, true
	}
	return at, err
}
