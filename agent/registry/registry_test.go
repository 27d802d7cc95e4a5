package registry

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/remotes"
	"github.com/containerd/containerd/v2/plugins/content/local"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/stretchr/testify/require"
	runtimev1 "k8s.io/cri-api/pkg/apis/runtime/v1"
)

func descriptor(mediaType string, raw []byte) ocispec.Descriptor {
	return ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(raw), Size: int64(len(raw))}
}

// liar is a registry whose image "x:1" is as its fields make it.
type liar struct {
	config, layer []byte
	change        func(*ocispec.Manifest)
	index         func(ocispec.Descriptor, func(any) ocispec.Descriptor) ocispec.Descriptor
	// serve answers in its place; kind is manifests or blobs.
	serve func(w http.ResponseWriter, r *http.Request, kind string) bool
}

func (l liar) start(t *testing.T) *httptest.Server {
	t.Helper()
	if l.config == nil {
		l.config = []byte(`{"os":"linux"}`)
	}
	if l.layer == nil {
		l.layer = bytes.Repeat([]byte("layer"), 1000)
	}
	blobs := map[string][]byte{}
	types := map[string]string{}
	add := func(mediaType string, raw []byte) ocispec.Descriptor {
		d := descriptor(mediaType, raw)
		blobs[d.Digest.String()], types[d.Digest.String()] = raw, mediaType
		return d
	}
	m := ocispec.Manifest{MediaType: ocispec.MediaTypeImageManifest, Config: add(ocispec.MediaTypeImageConfig, l.config), Layers: []ocispec.Descriptor{add(ocispec.MediaTypeImageLayer, l.layer)}}
	m.SchemaVersion = 2
	if l.change != nil {
		l.change(&m)
	}
	raw, err := json.Marshal(m)
	require.NoError(t, err)
	top := add(m.MediaType, raw)
	if l.index != nil {
		top = l.index(top, func(v any) ocispec.Descriptor {
			raw, err := json.Marshal(v)
			require.NoError(t, err)
			return add(ocispec.MediaTypeImageIndex, raw)
		})
	}
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		parts := strings.Split(r.URL.Path, "/") // "", v2, x, kind, name
		if len(parts) == 5 && parts[4] == "1" {
			parts[4] = top.Digest.String()
		}
		if l.serve != nil && l.serve(w, r, parts[min(3, len(parts)-1)]) {
			return
		}
		if len(parts) != 5 || blobs[parts[4]] == nil {
			http.NotFound(w, r)
			return
		}
		w.Header().Set("Content-Type", types[parts[4]])
		w.Header().Set("Docker-Content-Digest", parts[4])
		w.Header().Set("Content-Length", strconv.Itoa(len(blobs[parts[4]])))
		if r.Method != http.MethodHead {
			_, _ = w.Write(blobs[parts[4]])
		}
	}))
	t.Cleanup(s.CloseClientConnections)
	t.Cleanup(s.Close)
	return s
}

// fetch has all of an image fetched, as a pull does.
func fetch(t *testing.T, cfg Config, server string) error {
	t.Helper()
	ctx, cancel := context.WithTimeout(Quiet(t.Context()), time.Minute)
	defer cancel()
	r := New(cfg)
	defer r.Close()
	name, desc, err := r.Resolve(ctx, strings.TrimPrefix(server, "http://")+"/x:1")
	if err != nil {
		return err
	}
	fetcher, err := r.Fetcher(ctx, name)
	require.NoError(t, err)
	store, err := local.NewStore(t.TempDir())
	require.NoError(t, err)
	return images.Dispatch(ctx, Check(store)(images.Handlers(remotes.FetchHandler(store, fetcher), images.ChildrenHandler(store))), nil, desc)
}

// flood writes until nobody reads.
func flood(w http.ResponseWriter, begin string, sent *atomic.Int64) {
	fmt.Fprint(w, begin)
	chunk := bytes.Repeat([]byte("a"), 64<<10)
	for {
		n, err := w.Write(chunk)
		sent.Add(int64(n))
		if err != nil {
			return
		}
	}
}

func TestLies(t *testing.T) {
	t.Parallel()
	only := func(kind string, f func(w http.ResponseWriter, r *http.Request)) func(http.ResponseWriter, *http.Request, string) bool {
		return func(w http.ResponseWriter, r *http.Request, k string) bool {
			if k != kind || r.Method == http.MethodHead {
				return false
			}
			f(w, r)
			return true
		}
	}
	redirect := func(to string) func(http.ResponseWriter, *http.Request, string) bool {
		return only("blobs", func(w http.ResponseWriter, r *http.Request) { http.Redirect(w, r, to, http.StatusTemporaryRedirect) })
	}
	var other, sent atomic.Int64
	inside := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { other.Add(1) }))
	t.Cleanup(inside.Close)
	t.Cleanup(func() { require.Zero(t, other.Load(), "asked where a registry led to on this machine") })
	for name, c := range map[string]struct {
		liar  liar
		fails string // "": it does not
	}{
		"an honest one":           {},
		"a redirect to itself":    {liar: liar{serve: only("nothing", nil)}},
		"a layer that is smaller": {liar: liar{change: func(m *ocispec.Manifest) { m.Layers[0].Size++ }}, fails: "short read"},
		"a layer that is larger":  {liar: liar{change: func(m *ocispec.Manifest) { m.Layers[0].Size-- }}, fails: "size"},
		"other bytes than the digest's": {liar: liar{serve: only("blobs", func(w http.ResponseWriter, _ *http.Request) {
			fmt.Fprint(w, strings.Repeat("x", len(`{"os":"linux"}`)))
		})}, fails: "unexpected"},
		"an endless layer":        {liar: liar{serve: only("blobs", func(w http.ResponseWriter, _ *http.Request) { flood(w, "", &sent) })}, fails: "size"},
		"an endless manifest":     {liar: liar{serve: only("manifests", func(w http.ResponseWriter, _ *http.Request) { flood(w, "{", &sent) })}, fails: "size"},
		"an endless error":        {liar: liar{serve: only("blobs", func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(500); flood(w, `{"errors":["`, &sent) })}, fails: "500"},
		"a redirect inside":       {liar: liar{serve: redirect(inside.URL + "/secret")}, fails: "this machine, is not followed"},
		"a redirect to the cloud": {liar: liar{serve: redirect("http://169.254.169.254/latest/meta-data/iam")}, fails: "no image is fetched from 169.254.169.254"},
		"a redirect to a file":    {liar: liar{serve: redirect("file:///etc/shadow")}, fails: "unsupported protocol scheme"},
		"a redirect to itself again and again": {liar: liar{serve: only("blobs", func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, r.URL.Path, http.StatusFound)
		})}, fails: "10 redirects"},
		"tokens from inside": {liar: liar{serve: only("blobs", func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("WWW-Authenticate", `Bearer realm="`+inside.URL+`/token",service="x"`)
			w.WriteHeader(http.StatusUnauthorized)
		})}, fails: "this machine, is not followed"},
		"a layer that is inside": {liar: liar{change: func(m *ocispec.Manifest) { m.Layers[0].URLs = []string{inside.URL} }}},
		"a long header": {liar: liar{serve: only("blobs", func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("X", strings.Repeat("x", 1<<20))
			fmt.Fprint(w, "x")
		})}, fails: "header"},
		"a configuration said to be large": {liar: liar{change: func(m *ocispec.Manifest) { m.Config.Size = MaxDocument + 1 }}, fails: "no more than"},
		"one that calls itself a layer": {liar: liar{change: func(m *ocispec.Manifest) {
			m.Config.Size, m.Config.MediaType = MaxDocument+1, ocispec.MediaTypeImageLayer
		}}, fails: "no more than"},
		"a configuration that is none": {liar: liar{config: []byte("x")}, fails: "decode configuration"},
		"a user's name of many bytes":  {liar: liar{config: fmt.Appendf(nil, `{"config":{"User":%q}}`, strings.Repeat("u", maxUser+1))}, fails: "user whose name"},
		"many layers": {liar: liar{change: func(m *ocispec.Manifest) {
			for range maxLayers {
				m.Layers = append(m.Layers, m.Layers[0])
			}
		}}, fails: "layers"},
		"indexes of indexes": {liar: liar{index: func(d ocispec.Descriptor, add func(any) ocispec.Descriptor) ocispec.Descriptor {
			for range 2 * maxDocuments {
				d = add(ocispec.Index{MediaType: ocispec.MediaTypeImageIndex, Manifests: []ocispec.Descriptor{d}})
			}
			return d
		}}, fails: "leads to more than"},
		"an index of an index": {liar: liar{index: func(d ocispec.Descriptor, add func(any) ocispec.Descriptor) ocispec.Descriptor {
			return add(ocispec.Index{Manifests: []ocispec.Descriptor{add(ocispec.Index{Manifests: []ocispec.Descriptor{d}})}})
		}}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			err := fetch(t, Config{}, c.liar.start(t).URL)
			if c.fails == "" {
				require.NoError(t, err)
				return
			}
			require.ErrorContains(t, err, c.fails)
		})
	}
}

// A token that has no end is not taken to memory.
func TestEndlessTokens(t *testing.T) {
	t.Parallel()
	var sent atomic.Int64
	var url string
	s := liar{serve: func(w http.ResponseWriter, r *http.Request, kind string) bool {
		if kind == "token" {
			flood(w, `{"token":"`, &sent)
			return true
		}
		w.Header().Set("WWW-Authenticate", `Bearer realm="`+url+`/a/b/token",service="x"`)
		w.WriteHeader(http.StatusUnauthorized)
		return true
	}}.start(t)
	url = s.URL
	require.Error(t, fetch(t, Config{}, s.URL))
	require.Positive(t, sent.Load())
	require.Less(t, sent.Load(), int64(32<<20), "what is in buffers of connections")
}

// A registry that stands still, and one that sends a byte now and then, hold nobody for long.
func TestSlowRegistries(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		every time.Duration
		fails string
	}{"still": {time.Hour, "said nothing for|is given up"}, "slow": {100 * time.Millisecond, "is given up"}} {
		for _, kind := range []string{"manifests", "blobs"} {
			t.Run(name+" "+kind, func(t *testing.T) {
				t.Parallel()
				s := liar{serve: func(w http.ResponseWriter, r *http.Request, k string) bool {
					if k != kind || r.Method == http.MethodHead {
						return false
					}
					for {
						fmt.Fprint(w, "{")
						w.(http.Flusher).Flush()
						select {
						case <-r.Context().Done():
							return true
						case <-time.After(c.every):
						}
					}
				}}.start(t)
				began := time.Now()
				err := fetch(t, Config{Stall: 500 * time.Millisecond}, s.URL)
				require.Error(t, err)
				require.Regexp(t, c.fails, err.Error())
				require.Less(t, time.Since(began), 30*time.Second)
			})
		}
	}
	t.Run("no answer", func(t *testing.T) {
		t.Parallel()
		s := liar{serve: func(_ http.ResponseWriter, r *http.Request, _ string) bool { <-r.Context().Done(); return true }}.start(t)
		require.ErrorContains(t, fetch(t, Config{Stall: 300 * time.Millisecond}, s.URL), "said nothing for")
	})
}

// A password goes to the registry and its mirrors, whoever else asks for it.
func TestWhoGetsThePassword(t *testing.T) {
	t.Parallel()
	auth := func(got *atomic.Value, then http.HandlerFunc) http.HandlerFunc {
		return func(w http.ResponseWriter, r *http.Request) {
			if user, secret, ok := r.BasicAuth(); ok {
				got.Store(user + ":" + secret)
				then(w, r)
				return
			}
			w.Header().Set("WWW-Authenticate", `Basic realm="x"`)
			w.WriteHeader(http.StatusUnauthorized)
		}
	}
	var stolen, given atomic.Value
	thief := httptest.NewServer(auth(&stolen, http.NotFound))
	t.Cleanup(thief.Close)
	s := liar{serve: func(w http.ResponseWriter, r *http.Request, kind string) bool {
		passed := false
		auth(&given, func(http.ResponseWriter, *http.Request) { passed = true })(w, r)
		if passed && kind == "blobs" {
			http.Redirect(w, r, thief.URL+"/x", http.StatusTemporaryRedirect)
		}
		return !passed || kind == "blobs"
	}}.start(t)
	dir := t.TempDir() // the administrator's: redirects of it are followed anywhere
	u, err := url.Parse(s.URL)
	require.NoError(t, err)
	require.NoError(t, os.MkdirAll(filepath.Join(dir, u.Host), 0o755))
	require.NoError(t, os.WriteFile(filepath.Join(dir, u.Host, "hosts.toml"), fmt.Appendf(nil, "server = %q\n", s.URL), 0o644))
	require.Error(t, fetch(t, Config{HostsDir: dir, User: "pat", Secret: "s3cret"}, s.URL))
	require.Equal(t, "pat:s3cret", given.Load())
	require.Nil(t, stolen.Load())
}

func TestReachable(t *testing.T) {
	t.Parallel()
	for address, want := range map[string][3]bool{ // elsewhere, own, admin
		"192.0.2.7:443":               {true, true, true},
		"10.0.0.7:443":                {true, true, true},
		"127.0.0.1:5000":              {false, true, true},
		"[::1]:5000":                  {false, true, true},
		"[::ffff:127.0.0.1]:5000":     {false, true, true},
		"0.0.0.0:5000":                {false, true, true},
		"169.254.169.254:80":          {false, false, true},
		"[::ffff:169.254.169.254]:80": {false, false, true},
		"[fe80::1%eth0]:80":           {false, false, true},
		"[fd00:ec2::254]:80":          {false, false, true},
		"224.0.0.1:80":                {false, false, true},
	} {
		for i, from := range []place{elsewhere, own, admin} {
			require.Equal(t, want[i], reachable(address, from) == nil, "%s from %d", address, from)
		}
	}
}

func TestCredentials(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		auth         *runtimev1.AuthConfig
		user, secret string
	}{
		{nil, "", ""},
		{&runtimev1.AuthConfig{Username: "u", Password: "p"}, "u", "p"},
		{&runtimev1.AuthConfig{IdentityToken: "t"}, "", "t"},
		{&runtimev1.AuthConfig{Auth: "dTpwOnE="}, "u", "p:q"},
	} {
		user, secret, err := Credentials(c.auth)
		require.NoError(t, err)
		require.Equal(t, c.user+"/"+c.secret, user+"/"+secret)
	}
	_, _, err := Credentials(&runtimev1.AuthConfig{Auth: "dQ=="})
	require.Error(t, err)
}

// A fetch that was broken off goes on where it was.
func TestFetchGoesOn(t *testing.T) {
	t.Parallel()
	raw := bytes.Repeat([]byte("0123456789"), 1000)
	var ranges atomic.Value
	s := liar{layer: raw, serve: func(w http.ResponseWriter, r *http.Request, kind string) bool {
		if !strings.HasSuffix(r.URL.Path, fmt.Sprintf("%x", sha256.Sum256(raw))) {
			return false
		}
		if got := r.Header.Get("Range"); got != "" {
			ranges.Store(got)
		}
		http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(raw))
		return true
	}}.start(t)
	r := New(Config{})
	defer r.Close()
	name, _, err := r.Resolve(t.Context(), strings.TrimPrefix(s.URL, "http://")+"/x:1")
	require.NoError(t, err)
	fetcher, err := r.Fetcher(t.Context(), name)
	require.NoError(t, err)
	store, err := local.NewStore(t.TempDir())
	require.NoError(t, err)
	desc := descriptor(ocispec.MediaTypeImageLayer, raw)
	w, err := store.Writer(t.Context(), content.WithRef(remotes.MakeRefKey(t.Context(), desc)), content.WithDescriptor(desc))
	require.NoError(t, err)
	_, err = w.Write(raw[:4321])
	require.NoError(t, err)
	require.NoError(t, w.Close())
	require.NoError(t, remotes.Fetch(t.Context(), store, fetcher, desc))
	require.Equal(t, "bytes=4321-", ranges.Load())
	got, err := content.ReadBlob(t.Context(), store, desc)
	require.NoError(t, err)
	require.Equal(t, raw, got)
}
