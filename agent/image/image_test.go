package image

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/stretchr/testify/require"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	runtimev1 "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// registry stands for CRI's image service.
type registry struct {
	runtimev1.ImageServiceClient
	mu      sync.Mutex
	present map[string]bool
	fail    error
	pulls   int
	auths   []string
}

func (r *registry) ImageStatus(_ context.Context, in *runtimev1.ImageStatusRequest, _ ...grpc.CallOption) (*runtimev1.ImageStatusResponse, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if !r.present[in.Image.Image] {
		return &runtimev1.ImageStatusResponse{}, nil
	}
	return &runtimev1.ImageStatusResponse{Image: &runtimev1.Image{Id: "sha256:" + in.Image.Image}}, nil
}

func (r *registry) PullImage(_ context.Context, in *runtimev1.PullImageRequest, _ ...grpc.CallOption) (*runtimev1.PullImageResponse, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.pulls++
	r.auths = append(r.auths, in.Auth.GetUsername())
	if r.fail != nil {
		return nil, r.fail
	}
	r.present[in.Image.Image] = true
	return &runtimev1.PullImageResponse{}, nil
}

func TestEnsure(t *testing.T) {
	t.Parallel()
	r := &registry{present: map[string]bool{"docker.io/library/here:latest": true}}
	now := time.Unix(1000, 0)
	m := New(r, nil, func() time.Time { return now }, slog.New(slog.DiscardHandler))
	changed := make(chan struct{}, 10)
	pod := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{UID: "u"}}
	ensure := func(name string, policy corev1.PullPolicy) Result {
		return m.Ensure(t.Context(), Request{
			Pod: pod, Container: &corev1.Container{Name: "c", Image: name, ImagePullPolicy: policy},
			Changed: func() { changed <- struct{}{} }, Event: func(_, _, _ string) {},
		})
	}
	require.Equal(t, Ready, ensure("here", corev1.PullIfNotPresent).State)
	require.Equal(t, Ready, ensure("here", corev1.PullNever).State)
	require.Equal(t, ReasonNeverPull, ensure("nowhere", corev1.PullNever).Reason)
	require.Equal(t, ReasonInvalidName, ensure("Not A Name", corev1.PullNever).Reason)

	require.Equal(t, Pulling, ensure("here", corev1.PullAlways).State)
	<-changed
	require.Equal(t, Ready, ensure("here", corev1.PullAlways).State)
	require.Equal(t, Pulling, ensure("here", corev1.PullAlways).State, "each start pulls anew")
	<-changed

	r.mu.Lock()
	r.fail = errors.New("no route to registry")
	r.mu.Unlock()
	require.Equal(t, Pulling, ensure("absent", corev1.PullIfNotPresent).State)
	<-changed
	got := ensure("absent", corev1.PullIfNotPresent)
	require.Equal(t, Result{State: Failed, Reason: ReasonPull, Message: "no route to registry", Retry: now.Add(errorShown)}, got)
	now = now.Add(3 * time.Second)
	got = ensure("absent", corev1.PullIfNotPresent)
	require.Equal(t, ReasonBackOff, got.Reason)
	require.Equal(t, now.Add(7*time.Second), got.Retry)
	now = got.Retry
	require.Equal(t, ReasonBackOff, ensure("absent", corev1.PullIfNotPresent).Reason, "pulling again")
	<-changed
	now = now.Add(3 * time.Second)
	require.Equal(t, now.Add(17*time.Second), ensure("absent", corev1.PullIfNotPresent).Retry, "twice as long")

	r.mu.Lock()
	r.present["docker.io/library/absent:latest"] = true
	r.mu.Unlock()
	m.Appeared("docker.io/library/absent:latest")
	require.Equal(t, Ready, ensure("absent", corev1.PullIfNotPresent).State, "an import ends the back-off")
}

// While images are being imported one that is not here may be among them: nobody pulls it
// or gives it up before all have been tried.
func TestEnsureWaitsForImports(t *testing.T) {
	t.Parallel()
	r := &registry{present: map[string]bool{}, fail: errors.New("no route to registry")}
	coming := true
	m := New(r, func() bool { return coming }, time.Now, slog.New(slog.DiscardHandler))
	var events []string
	changed := make(chan struct{}, 10)
	ensure := func(name string, policy corev1.PullPolicy) Result {
		return m.Ensure(t.Context(), Request{
			Pod: &corev1.Pod{ObjectMeta: metav1.ObjectMeta{UID: "u"}}, Container: &corev1.Container{Name: name, Image: name, ImagePullPolicy: policy},
			Changed: func() { changed <- struct{}{} }, Event: func(_, reason, _ string) { events = append(events, reason) },
		})
	}
	require.Equal(t, Result{State: Pulling}, ensure("app", corev1.PullIfNotPresent))
	require.Equal(t, Result{State: Pulling}, ensure("own", corev1.PullNever))
	require.Empty(t, events)
	require.Zero(t, r.pulls)
	require.Equal(t, Pulling, ensure("newest", corev1.PullAlways).State)
	<-changed
	r.mu.Lock()
	require.Equal(t, 1, r.pulls, "what is always pulled waits for nothing")
	r.present["docker.io/library/app:latest"] = true
	r.mu.Unlock()
	require.Equal(t, Ready, ensure("app", corev1.PullIfNotPresent).State, "it has come while others are to come")
	coming = false
	require.Equal(t, ReasonNeverPull, ensure("own", corev1.PullNever).Reason)
	require.Equal(t, Pulling, ensure("other", corev1.PullIfNotPresent).State)
	<-changed
	require.Equal(t, ReasonPull, ensure("other", corev1.PullIfNotPresent).Reason)
}

func TestCredentials(t *testing.T) {
	t.Parallel()
	secret := func(kind corev1.SecretType, key, data string) *corev1.Secret {
		return &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: "s"}, Type: kind, Data: map[string][]byte{key: []byte(data)}}
	}
	auth := base64.StdEncoding.EncodeToString([]byte("ann:pw"))
	for _, tc := range []struct {
		name, image string
		secrets     []*corev1.Secret
		want        []string
		err         string
	}{
		{"by host", "reg.example:5000/a/b:1", []*corev1.Secret{secret(corev1.SecretTypeDockerConfigJson, corev1.DockerConfigJsonKey, fmt.Sprintf(`{"auths":{"https://reg.example:5000":{"auth":%q}}}`, auth))}, []string{"ann/pw"}, ""},
		{"the more specific first", "reg.example/team/b:1", []*corev1.Secret{
			secret(corev1.SecretTypeDockercfg, corev1.DockerConfigKey, `{"reg.example":{"username":"all","password":"1"},"reg.example/team":{"username":"team","password":"2"}}`),
		}, []string{"team/2", "all/1"}, ""},
		{"another host", "other.example/a:1", []*corev1.Secret{secret(corev1.SecretTypeDockercfg, corev1.DockerConfigKey, `{"reg.example":{"username":"all","password":"1"}}`)}, nil, ""},
		{"the hub", "nginx", []*corev1.Secret{secret(corev1.SecretTypeDockercfg, corev1.DockerConfigKey, `{"https://index.docker.io/v1/":{"username":"hub","password":"1"}}`)}, []string{"hub/1"}, ""},
		{"no JSON", "nginx", []*corev1.Secret{secret(corev1.SecretTypeDockerConfigJson, corev1.DockerConfigJsonKey, "{")}, nil, "pull secret ns/s"},
		{"another type", "nginx", []*corev1.Secret{secret(corev1.SecretTypeOpaque, "x", "y")}, nil, `has type "Opaque"`},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			normal, err := Normalize(tc.image)
			require.NoError(t, err)
			got, err := Credentials(tc.secrets, normal)
			if tc.err != "" {
				require.ErrorContains(t, err, tc.err)
				return
			}
			require.NoError(t, err)
			var text []string
			for _, a := range got {
				text = append(text, a.Username+"/"+a.Password)
			}
			require.Equal(t, tc.want, text)
		})
	}
}

func TestWhatARegistrySaysHasALimit(t *testing.T) {
	t.Parallel()
	text := errText(status.Error(codes.Unknown, strings.Repeat("é", 1<<20)+"\xff"))
	require.LessOrEqual(t, len(text), maxErrText+4)
	require.True(t, utf8.ValidString(text))
	require.Equal(t, "short", errText(errors.New("short")))
}
