package apiserver

import (
	"crypto/tls"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	admissionv1 "k8s.io/api/admission/v1"
	registrationv1 "k8s.io/api/admissionregistration/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	apiregistrationv1 "k8s.io/kube-aggregator/pkg/apis/apiregistration/v1"
	aggregator "k8s.io/kube-aggregator/pkg/client/clientset_generated/clientset"
)

// TestAggregates serves a group by an extension server, which must see the front
// proxy's certificate and the user's name.
func TestAggregates(t *testing.T) {
	f := shareServer(t)
	ctx := within(t, 60*time.Second)
	extension := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		var by string
		if certificates := r.TLS.PeerCertificates; len(certificates) > 0 {
			by = certificates[0].Subject.CommonName
		}
		w.Header().Set("Content-Type", "application/json")
		fmt.Fprintf(w, `{"kind":"APIResourceList","groupVersion":"extension.example.com/v1","resources":[],"by":%q,"user":%q}`,
			by, r.Header.Get("X-Remote-User"))
	}))
	extension.TLS = &tls.Config{ClientAuth: tls.RequestClientCert}
	extension.StartTLS()
	t.Cleanup(extension.Close)

	c := client(t, f.admin())
	ns := namespace(t, c)
	port := int32(extension.Listener.Addr().(*net.TCPAddr).Port)
	_, err := c.CoreV1().Services(ns).Create(ctx, &corev1.Service{
		ObjectMeta: metav1.ObjectMeta{Name: "extension"},
		Spec: corev1.ServiceSpec{Type: corev1.ServiceTypeExternalName, ExternalName: "localhost",
			Ports: []corev1.ServicePort{{Port: port}}},
	}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	services, err := aggregator.NewForConfig(f.admin())
	if err != nil {
		t.Fatal(err)
	}
	_, err = services.ApiregistrationV1().APIServices().Create(ctx, &apiregistrationv1.APIService{
		ObjectMeta: metav1.ObjectMeta{Name: "v1.extension.example.com"},
		Spec: apiregistrationv1.APIServiceSpec{
			Group: "extension.example.com", Version: "v1", GroupPriorityMinimum: 100, VersionPriority: 100, InsecureSkipTLSVerify: true,
			Service: &apiregistrationv1.ServiceReference{Namespace: ns, Name: "extension", Port: &port},
		},
	}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := services.ApiregistrationV1().APIServices().Delete(within(t, 5*time.Second), "v1.extension.example.com", metav1.DeleteOptions{}); err != nil {
			t.Error(err)
		}
	})
	caller := client(t, f.network(t, "alice", "system:masters"))
	eventually(t, 30*time.Second, func() error {
		raw, err := caller.RESTClient().Get().AbsPath("/apis/extension.example.com/v1").DoRaw(ctx)
		if err == nil && !strings.Contains(string(raw), `"by":"front-proxy-client","user":"alice"`) {
			err = fmt.Errorf("answer %s", raw)
		}
		return err
	})
}

// TestCallsWebhooks has a webhook label what it admits.
func TestCallsWebhooks(t *testing.T) {
	f := shareServer(t)
	ctx := within(t, 30*time.Second)
	hook := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		var review admissionv1.AdmissionReview
		if err := json.NewDecoder(r.Body).Decode(&review); err != nil {
			t.Error(err)
			return
		}
		kind := admissionv1.PatchTypeJSONPatch
		review.Response = &admissionv1.AdmissionResponse{UID: review.Request.UID, Allowed: true, PatchType: &kind,
			Patch: []byte(`[{"op":"add","path":"/metadata/labels","value":{"seen":"yes"}}]`)}
		w.Header().Set("Content-Type", "application/json")
		if err := json.NewEncoder(w).Encode(review); err != nil {
			t.Error(err)
		}
	}))
	t.Cleanup(hook.Close)

	c := client(t, f.admin())
	ns := namespace(t, c)
	none := registrationv1.SideEffectClassNone
	_, err := c.AdmissionregistrationV1().MutatingWebhookConfigurations().Create(ctx, &registrationv1.MutatingWebhookConfiguration{
		ObjectMeta: metav1.ObjectMeta{Name: ns},
		Webhooks: []registrationv1.MutatingWebhook{{
			Name: "label.example.com", SideEffects: &none, AdmissionReviewVersions: []string{"v1"},
			ClientConfig: registrationv1.WebhookClientConfig{
				URL:      &hook.URL,
				CABundle: pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: hook.Certificate().Raw}),
			},
			NamespaceSelector: &metav1.LabelSelector{MatchLabels: map[string]string{corev1.LabelMetadataName: ns}},
			Rules: []registrationv1.RuleWithOperations{{
				Operations: []registrationv1.OperationType{registrationv1.Create},
				Rule:       registrationv1.Rule{APIGroups: []string{""}, APIVersions: []string{"v1"}, Resources: []string{"configmaps"}},
			}},
		}},
	}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := c.AdmissionregistrationV1().MutatingWebhookConfigurations().Delete(within(t, 5*time.Second), ns, metav1.DeleteOptions{}); err != nil {
			t.Error(err)
		}
	})
	eventually(t, 10*time.Second, func() error {
		created, err := c.CoreV1().ConfigMaps(ns).Create(ctx, &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{GenerateName: "m-"}}, metav1.CreateOptions{})
		if err == nil && created.Labels["seen"] != "yes" {
			err = fmt.Errorf("labels %v", created.Labels)
		}
		return err
	})
}
