package reconcile

import (
	"context"
	"encoding/json"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/kubernetes/scheme"
	"k8s.io/client-go/rest"
)

// TestRESTWriter checks the requests that changes become.
func TestRESTWriter(t *testing.T) {
	t.Parallel()
	pod := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "p", UID: "u1"}}
	ns := &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "shop"}}
	zero := int64(0)
	background := metav1.DeletePropagationBackground
	finalize := Update(NamespacesResource, ns)
	finalize.Subresource = "finalize"
	deletion := Delete(PodsResource, pod)
	deletion.GracePeriodSeconds, deletion.Propagation = &zero, &background
	binding := Request{Verb: VerbCreate, Resource: PodsResource, Subresource: "binding", Namespace: "shop", Name: "p",
		Object: &corev1.Binding{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "p"}, Target: corev1.ObjectReference{Kind: "Node", Name: "a1"}}}
	for _, tc := range []struct {
		name, request, body string
		change              Request
	}{
		{"create", "POST /api/v1/namespaces/shop/pods application/vnd.kubernetes.protobuf", "Pod p", Create(PodsResource, pod)},
		{"bind", "POST /api/v1/namespaces/shop/pods/p/binding application/vnd.kubernetes.protobuf", "Binding p", binding},
		{"status", "PUT /api/v1/namespaces/shop/pods/p/status application/vnd.kubernetes.protobuf", "Pod p", UpdateStatus(PodsResource, pod)},
		{"cluster-wide", "PUT /api/v1/namespaces/shop/finalize application/vnd.kubernetes.protobuf", "Namespace shop", finalize},
		{"patch", "PATCH /api/v1/namespaces/shop/pods/p/status application/strategic-merge-patch+json", `{"metadata":{"uid":"u1"},"status":{"phase":"Failed"}}`,
			PatchPodStatus(pod, map[string]any{"phase": "Failed"})},
		{"custom resource", "PATCH /apis/ships.example.org/v1/namespaces/shop/boats/p application/merge-patch+json", `{"a":1}`,
			MergePatch(schema.GroupVersionResource{Group: "ships.example.org", Version: "v1", Resource: "boats"}, pod, "", map[string]any{"a": 1})},
		{"delete", "DELETE /api/v1/namespaces/shop/pods/p application/json",
			`{"kind":"DeleteOptions","apiVersion":"v1","gracePeriodSeconds":0,"preconditions":{"uid":"u1"},"propagationPolicy":"Background"}`, deletion},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			var request, body string
			server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				raw, _ := io.ReadAll(r.Body)
				request = r.Method + " " + r.URL.Path + " " + r.Header.Get("Content-Type")
				body = string(raw)
				if strings.HasSuffix(request, "protobuf") {
					obj, gvk, err := scheme.Codecs.UniversalDeserializer().Decode(raw, nil, nil)
					if err != nil {
						t.Errorf("the body is no object: %v", err)
						return
					}
					body = gvk.Kind + " " + Accessor(obj).GetName()
				}
				w.Header().Set("Content-Type", "application/json")
				_, _ = w.Write([]byte(`{"kind":"Status","apiVersion":"v1","status":"Success"}`))
			}))
			defer server.Close()
			w, err := newRESTWriter(&rest.Config{Host: server.URL}, nil)
			if err != nil {
				t.Fatal(err)
			}
			if err := w.Write(context.Background(), tc.change); err != nil {
				t.Fatal(err)
			}
			if request != tc.request || body != tc.body {
				t.Errorf("got  %s\n%s\nwant %s\n%s", request, body, tc.request, tc.body)
			}
		})
	}
}

// TestRESTWriterErrors checks that the API's errors stay what they are, whatever they are encoded in.
func TestRESTWriterErrors(t *testing.T) {
	t.Parallel()
	for _, contentType := range []string{runtime.ContentTypeJSON, runtime.ContentTypeProtobuf} {
		server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			status := apierrors.NewConflict(PodsResource.GroupResource(), "p", io.EOF).ErrStatus
			status.Kind, status.APIVersion = "Status", "v1"
			raw, _ := json.Marshal(status)
			if contentType == runtime.ContentTypeProtobuf {
				info, _ := runtime.SerializerInfoForMediaType(scheme.Codecs.SupportedMediaTypes(), contentType)
				raw, _ = runtime.Encode(info.Serializer, &status)
			}
			w.Header().Set("Content-Type", contentType)
			w.WriteHeader(http.StatusConflict)
			_, _ = w.Write(raw)
		}))
		w, err := newRESTWriter(&rest.Config{Host: server.URL}, nil)
		if err != nil {
			t.Fatal(err)
		}
		err = w.Write(context.Background(), Request{Verb: VerbPatch, Resource: PodsResource, Namespace: "shop", Name: "p", Patch: []byte("{}")})
		if !apierrors.IsConflict(err) || Classify(err) != Stale {
			t.Errorf("%s: got %v, want a conflict", contentType, err)
		}
		server.Close()
	}
}

// directOnce makes the second request and all later ones itself.
type directOnce struct {
	learnt    []string
	took      []string
	knowsMore bool
}

func (d *directOnce) Create(_ context.Context, obj runtime.Object) (bool, error) {
	if !d.knowsMore {
		return false, nil
	}
	d.took = append(d.took, Accessor(obj).GetName())
	return true, apierrors.NewForbidden(PodsResource.GroupResource(), "p", io.EOF)
}

func (d *directOnce) Created(sent, created runtime.Object) {
	d.knowsMore = true
	d.learnt = append(d.learnt, Accessor(sent).GetName()+" "+string(Accessor(created).GetUID()))
}

// TestRESTWriterDirect checks that what can be made without HTTP is, and that what was
// created by HTTP is shown to whoever may learn from it.
func TestRESTWriterDirect(t *testing.T) {
	t.Parallel()
	requests := 0
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		requests++
		w.Header().Set("Content-Type", "application/json")
		_, _ = w.Write([]byte(`{"kind":"Pod","apiVersion":"v1","metadata":{"name":"p","uid":"u9"}}`))
	}))
	defer server.Close()
	d := &directOnce{}
	w, err := newRESTWriter(&rest.Config{Host: server.URL}, d)
	if err != nil {
		t.Fatal(err)
	}
	pod := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "p"}}
	if err := w.Write(t.Context(), Create(PodsResource, pod)); err != nil || requests != 1 || strings.Join(d.learnt, ",") != "p u9" {
		t.Fatalf("the first: %v, %d requests, learnt %v", err, requests, d.learnt)
	}
	if err := w.Write(t.Context(), Create(PodsResource, pod)); !apierrors.IsForbidden(err) || requests != 1 || len(d.took) != 1 {
		t.Errorf("the second: %v, %d requests, made without %v; want the direct one's refusal", err, requests, d.took)
	}
	if err := w.Write(t.Context(), Delete(PodsResource, pod)); err != nil || requests != 2 || len(d.took) != 1 {
		t.Errorf("a delete: %v, %d requests, made without %v; want one by HTTP", err, requests, d.took)
	}
}
