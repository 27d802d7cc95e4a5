package dispatch

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync"
	"time"

	authenticationv1 "k8s.io/api/authentication/v1"
	certificatesv1 "k8s.io/api/certificates/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/runtime/serializer/protobuf"
	"k8s.io/client-go/kubernetes/scheme"
	"k8s.io/client-go/rest"

	"timonel/gossip"
	"timonel/state"
)

// fakeAPI answers the calls that agents need, as user system:node:NAME.
type fakeAPI struct {
	c     *cluster
	mu    sync.Mutex
	asked []*certificatesv1.PodCertificateRequest
	log   []string                                               // "a1 PUT /api/v1/nodes/a1/status"
	fail  func(node, method, path string) *apierrors.StatusError // nil answers normally
}

func (a *fakeAPI) config(node string) *rest.Config {
	return &rest.Config{
		Host: "http://api", Transport: fakeTransport{a, node}, QPS: -1,
		ContentConfig: rest.ContentConfig{ContentType: runtime.ContentTypeProtobuf},
	}
}

func (a *fakeAPI) calls(part string) int {
	a.mu.Lock()
	defer a.mu.Unlock()
	n := 0
	for _, line := range a.log {
		if strings.Contains(line, part) {
			n++
		}
	}
	return n
}

func (a *fakeAPI) setFail(f func(node, method, path string) *apierrors.StatusError) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.fail = f
}

type fakeTransport struct {
	a    *fakeAPI
	node string
}

func (f fakeTransport) RoundTrip(r *http.Request) (*http.Response, error) {
	f.a.mu.Lock()
	f.a.log = append(f.a.log, f.node+" "+r.Method+" "+r.URL.Path)
	fail := f.a.fail
	f.a.mu.Unlock()
	var answer runtime.Object
	code := http.StatusOK
	if fail != nil {
		if err := fail(f.node, r.Method, r.URL.Path); err != nil {
			st := err.Status()
			answer, code = &st, int(st.Code)
		}
	}
	if answer == nil {
		var err *apierrors.StatusError
		if answer, err = f.a.serve(r); err != nil {
			st := err.Status()
			answer, code = &st, int(st.Code)
		}
	}
	gv := schema.GroupVersion{Version: "v1"}
	if _, ok := answer.(*authenticationv1.TokenRequest); ok {
		gv = authenticationv1.SchemeGroupVersion
	} else if _, ok := answer.(*certificatesv1.PodCertificateRequest); ok {
		gv = certificatesv1.SchemeGroupVersion
	}
	s := protobuf.NewSerializer(scheme.Scheme, scheme.Scheme)
	var body bytes.Buffer
	if err := scheme.Codecs.EncoderForVersion(s, gv).Encode(answer, &body); err != nil {
		return nil, err
	}
	return &http.Response{
		StatusCode: code, Header: http.Header{"Content-Type": {runtime.ContentTypeProtobuf}},
		Body: io.NopCloser(&body), Request: r,
	}, nil
}

func (a *fakeAPI) serve(r *http.Request) (runtime.Object, *apierrors.StatusError) {
	var sent runtime.Object
	if r.Body != nil {
		body, err := io.ReadAll(r.Body)
		if err != nil {
			return nil, apierrors.NewBadRequest(err.Error())
		}
		if len(body) > 0 {
			if sent, _, err = scheme.Codecs.UniversalDeserializer().Decode(body, nil, nil); err != nil {
				return nil, apierrors.NewBadRequest(err.Error())
			}
		}
	}
	parts := strings.Split(strings.TrimPrefix(strings.TrimPrefix(r.URL.Path, "/api/v1/"), "/apis/certificates.k8s.io/v1/"), "/")
	var o runtime.Object
	name, sub, namespace := "", "", ""
	if parts[0] == "namespaces" {
		namespace, parts = parts[1], parts[2:]
	}
	if len(parts) > 1 {
		name = parts[1]
	}
	if len(parts) > 2 {
		sub = parts[2]
	}
	meta := metav1.ObjectMeta{Namespace: namespace, Name: name}
	switch parts[0] {
	case "nodes":
		o = &corev1.Node{ObjectMeta: meta}
	case "pods":
		o = &corev1.Pod{ObjectMeta: meta}
	case "events":
		o = &corev1.Event{ObjectMeta: meta}
	case "podcertificaterequests":
		a.mu.Lock()
		defer a.mu.Unlock()
		a.asked = append(a.asked, sent.(*certificatesv1.PodCertificateRequest))
		return sent, nil
	case "serviceaccounts":
		token := sent.(*authenticationv1.TokenRequest).DeepCopy()
		token.Status.Token = "token of " + namespace + "/" + name
		return token, nil
	}
	resource := schema.GroupResource{Resource: parts[0]}

	a.c.mu.Lock()
	defer a.c.mu.Unlock()
	if r.Method == http.MethodPost {
		m := sent.(metav1.Object)
		if _, ok := a.c.store.View().Get(keyOf(sent)); ok {
			return nil, apierrors.NewAlreadyExists(resource, m.GetName())
		}
		m.SetUID("uid-of-new")
		rev := a.c.apply(state.Change{Key: keyOf(sent), Value: encode(a.c.t, sent)})
		m.SetResourceVersion(fmt.Sprint(rev))
		return sent, nil
	}
	kv, ok := a.c.store.View().Get(keyOf(o))
	if !ok {
		return nil, apierrors.NewNotFound(resource, name)
	}
	live, _, err := scheme.Codecs.UniversalDeserializer().Decode(kv.Value, nil, nil)
	if err != nil {
		return nil, apierrors.NewInternalError(err)
	}
	m := live.(metav1.Object)
	m.SetResourceVersion(fmt.Sprint(kv.ModRevision))
	switch r.Method {
	case http.MethodPut:
		s := sent.(metav1.Object)
		if s.GetResourceVersion() != m.GetResourceVersion() || s.GetUID() != m.GetUID() {
			return nil, apierrors.NewConflict(resource, name, errors.New("changed meanwhile"))
		}
		switch next := sent.(type) {
		case *corev1.Pod:
			live.(*corev1.Pod).Status = next.Status
		case *corev1.Node:
			if sub == "status" {
				live.(*corev1.Node).Status = next.Status
			} else {
				live.(*corev1.Node).Labels, live.(*corev1.Node).Annotations = next.Labels, next.Annotations
			}
		}
		rev := a.c.apply(state.Change{Key: keyOf(live), Value: encode(a.c.t, live)})
		m.SetResourceVersion(fmt.Sprint(rev))
	case http.MethodDelete:
		if o, ok := sent.(*metav1.DeleteOptions); ok && o.Preconditions != nil && *o.Preconditions.UID != m.GetUID() {
			return nil, apierrors.NewConflict(resource, name, errors.New("another uid"))
		}
		a.c.apply(state.Change{Key: keyOf(live), Delete: true})
	}
	return live, nil
}

// fakeGossip is a pool whose members the test sets.
type fakeGossip struct {
	mu       sync.Mutex
	members  map[string]gossip.Member
	wake     map[chan struct{}]struct{}
	silent   map[string]bool // members that do not answer probes
	probes   map[string]int
	probedAt map[string]string // where a member was that is not known
}

func newFakeGossip() *fakeGossip {
	return &fakeGossip{members: map[string]gossip.Member{}, wake: map[chan struct{}]struct{}{}, silent: map[string]bool{}, probes: map[string]int{}, probedAt: map[string]string{}}
}

func (g *fakeGossip) set(m gossip.Member) {
	g.mu.Lock()
	defer g.mu.Unlock()
	m.Since = time.Now()
	g.members[m.Name] = m
	for w := range g.wake {
		notify(w)
	}
}

func (g *fakeGossip) setSilent(name string, silent bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.silent[name] = silent
}

func (g *fakeGossip) probed(name string) int {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.probes[name]
}

func (g *fakeGossip) Members() (out []gossip.Member) {
	g.mu.Lock()
	defer g.mu.Unlock()
	for _, m := range g.members {
		out = append(out, m)
	}
	return out
}

func (g *fakeGossip) Subscribe(ctx context.Context) <-chan gossip.Event {
	out, wake := make(chan gossip.Event), make(chan struct{}, 1)
	notify(wake)
	g.mu.Lock()
	g.wake[wake] = struct{}{}
	g.mu.Unlock()
	go func() {
		defer close(out)
		for {
			select {
			case <-ctx.Done():
				return
			case <-wake:
			}
			for _, m := range g.Members() {
				select {
				case out <- gossip.Event{Member: m}:
				case <-ctx.Done():
					return
				}
			}
		}
	}()
	return out
}

func (g *fakeGossip) Probe(ctx context.Context, name string) (time.Duration, error) {
	g.mu.Lock()
	_, ok := g.members[name]
	g.mu.Unlock()
	if !ok {
		return 0, gossip.ErrUnknownMember
	}
	return g.ProbeAddr(ctx, name, "")
}

func (g *fakeGossip) ProbeAddr(_ context.Context, name, addr string) (time.Duration, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.probes[name]++
	g.probedAt[name] = addr
	if g.silent[name] {
		return 0, gossip.ErrNoAnswer
	}
	return time.Millisecond, nil
}
