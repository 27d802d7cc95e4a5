package apiserver

import (
	"context"
	"encoding/base64"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/remotecommand"

	"timonel/state"
	"timonel/state/storage/storagetest"
	"timonel/trust"
)

// http1 makes a client use HTTP/1.1.
func http1(config *rest.Config) *rest.Config {
	config = rest.CopyConfig(config)
	config.NextProtos = []string{"http/1.1"}
	return config
}

func bearer(f *fixture, token string) *rest.Config {
	config := f.anonymous()
	config.BearerToken = token
	return config
}

// nodeToken is a token of a pod on a node.
func nodeToken(t *testing.T, c kubernetes.Interface, pod *corev1.Pod) string {
	t.Helper()
	request := &authenticationv1.TokenRequest{Spec: authenticationv1.TokenRequestSpec{
		BoundObjectRef: &authenticationv1.BoundObjectReference{Kind: "Pod", APIVersion: "v1", Name: pod.Name, UID: pod.UID},
	}}
	token, err := c.CoreV1().ServiceAccounts(pod.Namespace).CreateToken(within(t, 10*time.Second), "default", request, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	return token.Status.Token
}

// held is something that a client has open.
type held struct {
	name  string
	ended chan error
}

// opened is held once it is known to be served.
func opened(t *testing.T, name string, config *rest.Config, serves func(running)) held {
	t.Helper()
	r := running{config: config, begun: make(chan struct{}), ended: make(chan error, 1)}
	go serves(r)
	select {
	case <-r.begun:
	case err := <-r.ended:
		t.Fatalf("%s: %v", name, err)
	case <-time.After(30 * time.Second):
		t.Fatalf("%s does not begin", name)
	}
	return held{name, r.ended}
}

type running struct {
	config *rest.Config
	begun  chan struct{}
	ended  chan error
}

// firstByte closes begun when something is written.
type firstByte struct{ begun chan struct{} }

func (w *firstByte) Write(p []byte) (int, error) {
	if w.begun != nil {
		close(w.begun)
		w.begun = nil
	}
	return len(p), nil
}

func watchPods(r running) {
	c, err := kubernetes.NewForConfig(r.config)
	if err != nil {
		r.ended <- err
		return
	}
	body, err := c.CoreV1().RESTClient().Get().AbsPath("/api/v1/pods").Param("watch", "true").Stream(context.Background())
	if err != nil {
		r.ended <- err
		return
	}
	defer body.Close()
	close(r.begun)
	_, err = io.Copy(io.Discard, body)
	r.ended <- err
}

func followLogs(r running) {
	c, err := kubernetes.NewForConfig(r.config)
	if err != nil {
		r.ended <- err
		return
	}
	body, err := c.CoreV1().Pods("default").GetLogs("p", &corev1.PodLogOptions{Follow: true}).Stream(context.Background())
	if err != nil {
		r.ended <- err
		return
	}
	defer body.Close()
	_, err = io.Copy(&firstByte{r.begun}, body)
	r.ended <- err
}

// execute runs cat, whose input does not end.
func execute(websocket bool) func(running) {
	return func(r running) {
		c, err := kubernetes.NewForConfig(r.config)
		if err != nil {
			r.ended <- err
			return
		}
		method := http.MethodPost
		if websocket {
			method = http.MethodGet
		}
		url := c.CoreV1().RESTClient().Verb(method).Resource("pods").Namespace("default").Name("p").SubResource("exec").
			Param("container", "c").Param("command", "cat").Param("stdin", "true").Param("stdout", "true").URL()
		var run remotecommand.Executor
		if websocket {
			run, err = remotecommand.NewWebSocketExecutor(r.config, method, url.String())
		} else {
			run, err = remotecommand.NewSPDYExecutor(r.config, method, url)
		}
		if err != nil {
			r.ended <- err
			return
		}
		in, out := io.Pipe()
		defer out.Close()
		r.ended <- run.StreamWithContext(context.Background(), remotecommand.StreamOptions{Stdin: in, Stdout: &firstByte{r.begun}})
	}
}

// guardedFixture is a server of a cluster with two nodes, a pod on the first, and
// rights for both and for the pods' account.
func guardedFixture(t *testing.T) (f *fixture, registry *trust.Registry, onFirst *corev1.Pod) {
	t.Helper()
	kubelet := newFakeKubelet(t)
	backend := storagetest.NewLocalBackend(state.Options{})
	registry = trust.New(trust.Config{State: backend})
	f, err := startFixture(backend, nil, func(c *Config) { c.DialKubelet, c.Trust = kubelet.dial, registry })
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := f.stop(); err != nil {
			t.Error(err)
		}
	})
	c, ctx := client(t, f.admin()), within(t, 30*time.Second)
	for _, name := range []string{"a1", "a2"} {
		if _, err := c.CoreV1().Nodes().Create(ctx, &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name}}, metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	account(t, c, "default")
	binding := &rbacv1.ClusterRoleBinding{
		ObjectMeta: metav1.ObjectMeta{Name: "guarded"},
		RoleRef:    rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "ClusterRole", Name: "cluster-admin"},
		Subjects: []rbacv1.Subject{
			{Kind: rbacv1.UserKind, APIGroup: rbacv1.GroupName, Name: "system:node:a1"},
			{Kind: rbacv1.UserKind, APIGroup: rbacv1.GroupName, Name: "system:node:a2"},
			{Kind: rbacv1.ServiceAccountKind, Namespace: "default", Name: "default"},
		},
	}
	if _, err := c.RbacV1().ClusterRoleBindings().Create(ctx, binding, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	bound := pod("p")
	bound.Spec.NodeName = "a1"
	eventually(t, 5*time.Second, func() error {
		onFirst, err = c.CoreV1().Pods("default").Create(ctx, bound, metav1.CreateOptions{})
		return err
	})
	return f, registry, onFirst
}

// What somebody has open ends when he is revoked; what others have goes on.
func TestRevocationEndsWhatIsOpen(t *testing.T) {
	f, registry, onFirst := guardedFixture(t)
	admin := client(t, f.admin())
	other := pod("q")
	other.Spec.NodeName = "a2"
	onSecond, err := admin.CoreV1().Pods("default").Create(within(t, 10*time.Second), other, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	revoked := map[string]*rest.Config{
		"certificate": f.network(t, "system:node:a1", "system:nodes"),
		"token":       bearer(f, nodeToken(t, admin, onFirst)),
	}
	var ends, stays []held
	for by, config := range revoked {
		eventually(t, 10*time.Second, func() error { // RBAC has heard of the binding
			_, err := client(t, config).CoreV1().Pods("default").List(within(t, 5*time.Second), metav1.ListOptions{})
			return err
		})
		ends = append(ends,
			opened(t, by+": watch by HTTP/2", config, watchPods),
			opened(t, by+": watch by HTTP/1", http1(config), watchPods),
			opened(t, by+": logs by HTTP/2", config, followLogs),
			opened(t, by+": logs by HTTP/1", http1(config), followLogs),
			opened(t, by+": exec by SPDY", config, execute(false)),
			opened(t, by+": exec by WebSocket", config, execute(true)),
		)
	}
	for by, config := range map[string]*rest.Config{
		"another node's certificate": f.network(t, "system:node:a2", "system:nodes"),
		"another node's token":       bearer(f, nodeToken(t, admin, onSecond)),
		"an administrator":           f.network(t, "admin", "system:masters"),
	} {
		stays = append(stays, opened(t, by+": watch", config, watchPods), opened(t, by+": exec", config, execute(false)))
	}

	if _, err := registry.RevokeNode(within(t, 10*time.Second), "a1", trust.By{User: "admin", Reason: "stolen"}); err != nil {
		t.Fatal(err)
	}
	limit := within(t, 20*time.Second)
	for _, h := range ends {
		select {
		case <-h.ended:
		case <-limit.Done():
			t.Errorf("%s goes on", h.name)
		}
	}
	for by, config := range revoked {
		if _, err := client(t, config).CoreV1().Pods("default").List(within(t, 10*time.Second), metav1.ListOptions{}); !apierrors.IsUnauthorized(err) {
			t.Errorf("%s: a new request is answered %v", by, err)
		}
	}
	for _, h := range stays {
		select {
		case err := <-h.ended:
			t.Errorf("%s ended: %v", h.name, err)
		default:
		}
	}
}

// A token of before a node was reset ends with that, even one that is shown in
// company; one of afterwards is good, also by WebSocket.
func TestResetEndsTheTokensOfBefore(t *testing.T) {
	f, registry, onFirst := guardedFixture(t)
	admin := client(t, f.admin())
	before := nodeToken(t, admin, onFirst)
	watch := opened(t, "watch", bearer(f, before), watchPods)
	if _, err := registry.ResetNode(within(t, 10*time.Second), "a1", trust.By{User: "admin"}); err != nil {
		t.Fatal(err)
	}
	select {
	case <-watch.ended:
	case <-time.After(20 * time.Second):
		t.Error("a watch goes on")
	}
	var after string
	eventually(t, 10*time.Second, func() error { // a time has whole seconds in tokens
		after = nodeToken(t, admin, onFirst)
		_, err := client(t, bearer(f, after)).CoreV1().Pods("default").List(within(t, 5*time.Second), metav1.ListOptions{})
		return err
	})
	forged := "x." + base64.RawURLEncoding.EncodeToString([]byte(`{"iat":9999999999}`)) + ".x"
	socket := func(token string) string {
		return "base64url.bearer.authorization.k8s.io." + base64.RawURLEncoding.EncodeToString([]byte(token))
	}
	for name, c := range map[string]struct {
		authorization, protocols string
		want                     int
	}{
		"before":                      {"Bearer " + before, "", http.StatusUnauthorized},
		"before, by WebSocket":        {"", socket(before) + ", v5.channel.k8s.io", http.StatusUnauthorized},
		"before, beside a forged one": {"Bearer " + forged, socket(before) + ", v5.channel.k8s.io", http.StatusUnauthorized},
		"after":                       {"Bearer " + after, "", http.StatusSwitchingProtocols},
		"after, by WebSocket":         {"", "v5.channel.k8s.io, " + socket(after), http.StatusSwitchingProtocols},
	} {
		t.Run(name, func(t *testing.T) {
			transport, err := rest.TransportFor(http1(f.anonymous()))
			if err != nil {
				t.Fatal(err)
			}
			r, err := http.NewRequestWithContext(within(t, 20*time.Second), http.MethodGet,
				"https://"+f.server.Addr().String()+"/api/v1/namespaces/default/pods/p/exec?container=c&command=cat&stdin=true&stdout=true", nil)
			if err != nil {
				t.Fatal(err)
			}
			r.Header = http.Header{"Connection": {"Upgrade"}, "Upgrade": {"websocket"}, "Sec-Websocket-Version": {"13"}, "Sec-Websocket-Key": {"AAAAAAAAAAAAAAAAAAAAAA=="}}
			if c.authorization != "" {
				r.Header.Set("Authorization", c.authorization)
			}
			r.Header.Set("Sec-Websocket-Protocol", strings.TrimPrefix(c.protocols+", v5.channel.k8s.io", ", "))
			answer, err := transport.RoundTrip(r)
			if err != nil {
				t.Fatal(err)
			}
			defer answer.Body.Close()
			if answer.StatusCode != c.want {
				t.Errorf("answered %s", answer.Status)
			}
		})
	}
}

func TestIssuedAtIsTheEarliest(t *testing.T) {
	t.Parallel()
	token := func(claims string) string {
		return "h." + base64.RawURLEncoding.EncodeToString([]byte(claims)) + ".s"
	}
	early, late := token(`{"iat":1000}`), token(`{"iat":2000}`)
	for name, c := range map[string]struct {
		tokens []string
		want   int64
	}{
		"one":             {[]string{late}, 2000},
		"two":             {[]string{late, early}, 1000},
		"none":            {nil, 0},
		"without a time":  {[]string{late, token(`{}`)}, 0},
		"a negative time": {[]string{token(`{"iat":-1}`)}, 0},
		"no token":        {[]string{late, "x"}, 0},
		"not JSON":        {[]string{token(`x`), late}, 0},
		"not base64":      {[]string{"a.*.b", late}, 0},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			want := time.Time{}
			if c.want != 0 {
				want = time.Unix(c.want, 0)
			}
			for range 2 { // in any order
				if got := issuedAt(c.tokens); !got.Equal(want) {
					t.Errorf("%s, want %s", got, want)
				}
				slices.Reverse(c.tokens)
			}
		})
	}
	r := &http.Request{Header: http.Header{"Authorization": {"Bearer a.b.c"}, "Sec-Websocket-Protocol": {"v5, " + webSocketToken + "eA", webSocketToken + "*"}}}
	if got := fmt.Sprint(tokensOf(r)); got != "[a.b.c x ]" {
		t.Errorf("%s", got)
	}
}
