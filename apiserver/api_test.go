package apiserver

import (
	"bytes"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	admissionv1 "k8s.io/api/admissionregistration/v1"
	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	apiextensionsv1 "k8s.io/apiextensions-apiserver/pkg/apis/apiextensions/v1"
	apiextensions "k8s.io/apiextensions-apiserver/pkg/client/clientset/clientset"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/apiserver/pkg/authentication/user"
	applycorev1 "k8s.io/client-go/applyconfigurations/core/v1"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/kubernetes"
	"k8s.io/kubernetes/pkg/controlplane"
)

// namespace makes a namespace for the test.
func namespace(t *testing.T, c kubernetes.Interface) string {
	t.Helper()
	ns, err := c.CoreV1().Namespaces().Create(within(t, 10*time.Second),
		&corev1.Namespace{ObjectMeta: metav1.ObjectMeta{GenerateName: "test-"}}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	return ns.Name
}

func configMap(name string, data map[string]string) *corev1.ConfigMap {
	return &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: name}, Data: data}
}

func pod(name string) *corev1.Pod {
	return &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: name},
		Spec:       corev1.PodSpec{Containers: []corev1.Container{{Name: "c", Image: "image"}}},
	}
}

// account makes the service account that pods need, which a reconciler would.
func account(t *testing.T, c kubernetes.Interface, ns string) {
	t.Helper()
	_, err := c.CoreV1().ServiceAccounts(ns).Create(within(t, 10*time.Second),
		&corev1.ServiceAccount{ObjectMeta: metav1.ObjectMeta{Name: "default"}}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
}

func TestServesUpstreamsDefaultGroups(t *testing.T) {
	f := shareServer(t)
	c := client(t, f.network(t, "admin", "system:masters"))
	groups, err := c.Discovery().ServerGroups()
	if err != nil {
		t.Fatal(err)
	}
	var got, want []string
	for _, group := range groups.Groups {
		for _, version := range group.Versions {
			got = append(got, version.GroupVersion)
		}
	}
	for gv, enabled := range controlplane.DefaultAPIResourceConfigSource().GroupVersionConfigs {
		if enabled {
			want = append(want, gv.String())
		}
	}
	want = append(want, "apiextensions.k8s.io/v1", "apiregistration.k8s.io/v1")
	slices.Sort(got)
	slices.Sort(want)
	if !slices.Equal(got, want) {
		t.Errorf("served group versions\n got %v\nwant %v", got, want)
	}
	_, lists, err := c.Discovery().ServerGroupsAndResources()
	if err != nil {
		t.Fatal(err)
	}
	var core []string
	for _, list := range lists {
		if list.GroupVersion == "v1" {
			for _, resource := range list.APIResources {
				core = append(core, resource.Name)
			}
		}
	}
	slices.Sort(core)
	wantCore := strings.Fields(`bindings componentstatuses configmaps endpoints events limitranges namespaces namespaces/finalize
		namespaces/status nodes nodes/proxy nodes/status persistentvolumeclaims persistentvolumeclaims/status persistentvolumes
		persistentvolumes/status pods pods/attach pods/binding pods/ephemeralcontainers pods/eviction pods/exec pods/log
		pods/portforward pods/proxy pods/resize pods/status podtemplates replicationcontrollers replicationcontrollers/scale
		replicationcontrollers/status resourcequotas resourcequotas/status secrets serviceaccounts serviceaccounts/token
		services services/proxy services/status`)
	if !slices.Equal(core, wantCore) {
		t.Errorf("core resources\n got %v\nwant %v", core, wantCore)
	}
	for _, path := range []string{"/openapi/v2", "/openapi/v3", "/openapi/v3/apis/apps/v1", "/version", "/metrics", "/.well-known/openid-configuration"} {
		raw, err := c.RESTClient().Get().AbsPath(path).DoRaw(within(t, 20*time.Second))
		if err != nil || len(raw) == 0 {
			t.Errorf("GET %s: %d bytes, %v", path, len(raw), err)
		}
	}
}

// TestServesOpenAPI asks twice: what was built is dropped after the first time.
func TestServesOpenAPI(t *testing.T) {
	f := shareServer(t)
	c := client(t, f.network(t, "admin", "system:masters"))
	for range 2 {
		for path, want := range map[string][]string{
			"/openapi/v2":              {`"io.k8s.api.apps.v1.Deployment"`, `"/apis/apps/v1/namespaces/{namespace}/deployments"`, `"title":"Kubernetes"`},
			"/openapi/v3":              {`"apis/apps/v1":{"serverRelativeURL":"/openapi/v3/apis/apps/v1?hash=`, `"api/v1"`, `"apis/apiextensions.k8s.io/v1"`},
			"/openapi/v3/apis/apps/v1": {`"io.k8s.api.apps.v1.Deployment"`, `"/apis/apps/v1/namespaces/{namespace}/deployments"`},
			"/openapi/v3/api/v1":       {`"io.k8s.api.core.v1.Pod"`},
			"/openapi/v3/version":      {`"io.k8s.apimachinery.pkg.version.Info"`},
		} {
			raw, err := c.RESTClient().Get().AbsPath(path).SetHeader("Accept", "application/json").DoRaw(within(t, 30*time.Second))
			if err != nil {
				t.Errorf("GET %s: %v", path, err)
				continue
			}
			for _, text := range want {
				if !bytes.Contains(raw, []byte(text)) {
					t.Errorf("GET %s: %d bytes without %s", path, len(raw), text)
				}
			}
		}
		schema, err := c.Discovery().OpenAPISchema() // protobuf
		if err != nil || len(schema.Definitions.AdditionalProperties) < 500 {
			t.Errorf("OpenAPI v2 by protobuf: %v", err)
		}
	}
	raw, err := c.RESTClient().Get().AbsPath("/openapi/v3/apis/apps/v1").SetHeader("Accept", "application/json").DoRaw(within(t, 10*time.Second))
	if err != nil {
		t.Fatal(err)
	}
	var v3 struct {
		Components struct {
			Schemas map[string]struct {
				Kinds []any `json:"x-kubernetes-group-version-kind"`
			}
		}
	}
	if err := json.Unmarshal(raw, &v3); err != nil {
		t.Fatal(err)
	}
	if kinds := v3.Components.Schemas["io.k8s.apimachinery.pkg.apis.meta.v1.DeleteOptions"].Kinds; len(kinds) != 2 {
		t.Errorf("DeleteOptions in apps/v1 is of %v, want the core group's and its own", kinds)
	}
}

func TestWritesAndPatches(t *testing.T) {
	f := shareServer(t)
	c := client(t, f.admin())
	ctx := within(t, 20*time.Second)
	maps := c.CoreV1().ConfigMaps(namespace(t, c))

	created, err := maps.Create(ctx, configMap("a", map[string]string{"k": "1"}), metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := maps.Create(ctx, configMap("a", nil), metav1.CreateOptions{}); !apierrors.IsAlreadyExists(err) {
		t.Errorf("second create: %v, want AlreadyExists", err)
	}
	for _, p := range []struct {
		name string
		kind types.PatchType
		body string
		want string
	}{
		{"json", types.JSONPatchType, `[{"op":"replace","path":"/data/k","value":"2"}]`, "2"},
		{"merge", types.MergePatchType, `{"data":{"k":"3"}}`, "3"},
		{"strategic", types.StrategicMergePatchType, `{"data":{"k":"4"}}`, "4"},
		{"apply", types.ApplyPatchType, `{"apiVersion":"v1","kind":"ConfigMap","data":{"k":"5"}}`, "5"},
	} {
		options := metav1.PatchOptions{}
		if p.kind == types.ApplyPatchType {
			force := true
			options.FieldManager, options.Force = "tester", &force
		}
		got, err := maps.Patch(ctx, "a", p.kind, []byte(p.body), options)
		if err != nil || got.Data["k"] != p.want {
			t.Errorf("%s patch: %v, %v", p.name, got.Data, err)
		}
	}
	if _, err := maps.Update(ctx, created, metav1.UpdateOptions{}); !apierrors.IsConflict(err) {
		t.Errorf("update of an old version: %v, want Conflict", err)
	}
	if _, err := maps.Apply(ctx, applycorev1.ConfigMap("a", "").WithData(map[string]string{"k": "6"}),
		metav1.ApplyOptions{FieldManager: "other"}); !apierrors.IsConflict(err) {
		t.Errorf("apply of another's field: %v, want Conflict", err)
	}
	if err := maps.Delete(ctx, "a", metav1.DeleteOptions{}); err != nil {
		t.Error(err)
	}
	if _, err := maps.Get(ctx, "a", metav1.GetOptions{}); !apierrors.IsNotFound(err) {
		t.Errorf("get after delete: %v, want NotFound", err)
	}
}

func TestListsAndWatches(t *testing.T) {
	f := shareServer(t)
	for name, config := range map[string]func() *kubernetes.Clientset{
		"memory":  func() *kubernetes.Clientset { return client(t, f.admin()) },
		"network": func() *kubernetes.Clientset { return client(t, f.network(t, "admin", "system:masters")) },
	} {
		t.Run(name, func(t *testing.T) {
			c := config()
			ctx := within(t, 30*time.Second)
			ns := namespace(t, c)
			maps := c.CoreV1().ConfigMaps(ns)
			for i := range 5 {
				if _, err := maps.Create(ctx, configMap(fmt.Sprint("m", i), nil), metav1.CreateOptions{}); err != nil {
					t.Fatal(err)
				}
			}
			page, err := maps.List(ctx, metav1.ListOptions{Limit: 2})
			if err != nil || len(page.Items) != 2 || page.Continue == "" || *page.RemainingItemCount != 3 {
				t.Fatalf("first page: %d items, continue %q, %v", len(page.Items), page.Continue, err)
			}
			rest, err := maps.List(ctx, metav1.ListOptions{Continue: page.Continue})
			if err != nil || len(rest.Items) != 3 || rest.ResourceVersion != page.ResourceVersion {
				t.Fatalf("rest: %d items at %s, first page at %s, %v", len(rest.Items), rest.ResourceVersion, page.ResourceVersion, err)
			}

			w, err := maps.Watch(ctx, metav1.ListOptions{ResourceVersion: page.ResourceVersion, AllowWatchBookmarks: true})
			if err != nil {
				t.Fatal(err)
			}
			if _, err := maps.Create(ctx, configMap("late", nil), metav1.CreateOptions{}); err != nil {
				t.Fatal(err)
			}
			if err := maps.Delete(ctx, "late", metav1.DeleteOptions{}); err != nil {
				t.Fatal(err)
			}
			for _, want := range []watch.EventType{watch.Added, watch.Deleted} {
				if event := <-w.ResultChan(); event.Type != want || event.Object.(*corev1.ConfigMap).Name != "late" {
					t.Errorf("event %v, want %s of late", event, want)
				}
			}
			w.Stop()

			// The form of informers: the list as a watch, closed by a bookmark.
			initial := true
			w, err = maps.Watch(ctx, metav1.ListOptions{AllowWatchBookmarks: true, SendInitialEvents: &initial,
				ResourceVersionMatch: metav1.ResourceVersionMatchNotOlderThan})
			if err != nil {
				t.Fatal(err)
			}
			defer w.Stop()
			for i := 0; ; i++ {
				event := <-w.ResultChan()
				if event.Type == watch.Added {
					continue
				}
				if event.Type != watch.Bookmark || i != 5 || event.Object.(*corev1.ConfigMap).Annotations[metav1.InitialEventsAnnotationKey] != "true" {
					t.Errorf("event %d: %v, want the bookmark after 5 objects", i, event)
				}
				break
			}
		})
	}
}

func TestPrintsTables(t *testing.T) {
	f := shareServer(t)
	c := client(t, f.network(t, "admin", "system:masters"))
	var table metav1.Table
	raw, err := c.CoreV1().RESTClient().Get().Resource("namespaces").Name("kube-system").
		SetHeader("Accept", "application/json;as=Table;v=v1;g=meta.k8s.io").DoRaw(within(t, 10*time.Second))
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(raw, &table); err != nil || len(table.Rows) != 1 || table.ColumnDefinitions[1].Name != "Status" {
		t.Errorf("table %s: %v", raw, err)
	}
}

func TestServesCustomResources(t *testing.T) {
	f := shareServer(t)
	ctx := within(t, 60*time.Second)
	crds, err := apiextensions.NewForConfig(f.admin())
	if err != nil {
		t.Fatal(err)
	}
	keep := true
	crd := &apiextensionsv1.CustomResourceDefinition{
		ObjectMeta: metav1.ObjectMeta{Name: "ships.example.com"},
		Spec: apiextensionsv1.CustomResourceDefinitionSpec{
			Group: "example.com", Scope: apiextensionsv1.NamespaceScoped,
			Names: apiextensionsv1.CustomResourceDefinitionNames{Plural: "ships", Singular: "ship", Kind: "Ship", ListKind: "ShipList"},
			Versions: []apiextensionsv1.CustomResourceDefinitionVersion{{
				Name: "v1", Served: true, Storage: true,
				Schema: &apiextensionsv1.CustomResourceValidation{OpenAPIV3Schema: &apiextensionsv1.JSONSchemaProps{
					Type: "object", XPreserveUnknownFields: &keep,
				}},
			}},
		},
	}
	if _, err := crds.ApiextensionsV1().CustomResourceDefinitions().Create(ctx, crd, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	objects, err := dynamic.NewForConfig(f.network(t, "admin", "system:masters"))
	if err != nil {
		t.Fatal(err)
	}
	ships := objects.Resource(schema.GroupVersionResource{Group: "example.com", Version: "v1", Resource: "ships"}).Namespace("default")
	ship := &unstructured.Unstructured{Object: map[string]any{
		"apiVersion": "example.com/v1", "kind": "Ship",
		"metadata": map[string]any{"name": "one", "finalizers": []any{"example.com/anchor"}}, "spec": map[string]any{"masts": int64(3)},
	}}
	eventually(t, 15*time.Second, func() error {
		_, err := ships.Create(ctx, ship, metav1.CreateOptions{})
		return err
	})
	list, err := ships.List(ctx, metav1.ListOptions{})
	if err != nil || len(list.Items) != 1 {
		t.Fatalf("list: %v, %v", list, err)
	}
	w, err := ships.Watch(ctx, metav1.ListOptions{ResourceVersion: list.GetResourceVersion()})
	if err != nil {
		t.Fatal(err)
	}
	defer w.Stop()
	if err := crds.ApiextensionsV1().CustomResourceDefinitions().Delete(ctx, "ships.example.com", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	if event := <-w.ResultChan(); event.Type != watch.Modified || event.Object.(*unstructured.Unstructured).GetDeletionTimestamp() == nil {
		t.Errorf("event %v, want the ship marked for deletion", event)
	}
	if _, err := ships.Patch(ctx, "one", types.MergePatchType, []byte(`{"metadata":{"finalizers":null}}`), metav1.PatchOptions{}); err != nil {
		t.Fatal(err)
	}
	eventually(t, 20*time.Second, func() error {
		_, err := crds.ApiextensionsV1().CustomResourceDefinitions().Get(ctx, "ships.example.com", metav1.GetOptions{})
		if !apierrors.IsNotFound(err) {
			return fmt.Errorf("the definition is still there: %v", err)
		}
		return nil
	})
}

func TestAuthorizes(t *testing.T) {
	f := shareServer(t)
	ctx := within(t, 20*time.Second)
	admin := client(t, f.admin())
	ns := namespace(t, admin)
	t.Run("stranger", func(t *testing.T) {
		_, err := client(t, f.network(t, "eve")).CoreV1().Secrets(ns).List(ctx, metav1.ListOptions{})
		if !apierrors.IsForbidden(err) {
			t.Errorf("list secrets: %v, want Forbidden", err)
		}
	})
	t.Run("anonymous", func(t *testing.T) {
		c := client(t, f.anonymous())
		if _, err := c.CoreV1().Namespaces().List(ctx, metav1.ListOptions{}); !apierrors.IsForbidden(err) {
			t.Errorf("list namespaces: %v, want Forbidden", err)
		}
		for _, path := range []string{"/readyz", "/livez", "/healthz", "/version"} {
			if _, err := c.RESTClient().Get().AbsPath(path).DoRaw(ctx); err != nil {
				t.Errorf("GET %s: %v", path, err)
			}
		}
	})
	t.Run("path of ours", func(t *testing.T) {
		const path = "/timonel/v1/test"
		_, err := client(t, f.network(t, "eve")).RESTClient().Get().AbsPath(path).DoRaw(ctx)
		if !apierrors.IsForbidden(err) {
			t.Errorf("%v, want Forbidden", err)
		}
		answer, err := client(t, f.network(t, "ops", user.SystemPrivilegedGroup)).RESTClient().Post().AbsPath(path).DoRaw(ctx)
		if err != nil || !strings.HasPrefix(string(answer), "POST ") || !strings.HasSuffix(string(answer), "deadline: false") {
			t.Errorf("%q, %v", answer, err)
		}
	})
	t.Run("node restriction", func(t *testing.T) {
		node := client(t, f.network(t, "system:node:n1", "system:nodes"))
		if _, err := node.CoreV1().Nodes().Create(ctx, &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "n1"}}, metav1.CreateOptions{}); err != nil {
			t.Error(err)
		}
		if _, err := node.CoreV1().Nodes().Create(ctx, &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "n2"}}, metav1.CreateOptions{}); !apierrors.IsForbidden(err) {
			t.Errorf("create another node: %v, want Forbidden", err)
		}
	})
	t.Run("service account token", func(t *testing.T) {
		account(t, admin, ns)
		token, err := admin.CoreV1().ServiceAccounts(ns).CreateToken(ctx, "default", &authenticationv1.TokenRequest{}, metav1.CreateOptions{})
		if err != nil {
			t.Fatal(err)
		}
		config := f.anonymous()
		config.BearerToken = token.Status.Token
		c := client(t, config)
		if _, err := c.CoreV1().Pods(ns).List(ctx, metav1.ListOptions{}); !apierrors.IsForbidden(err) {
			t.Errorf("list pods: %v, want Forbidden", err)
		}
		_, err = admin.RbacV1().Roles(ns).Create(ctx, &rbacv1.Role{
			ObjectMeta: metav1.ObjectMeta{Name: "reader"},
			Rules:      []rbacv1.PolicyRule{{APIGroups: []string{""}, Resources: []string{"pods"}, Verbs: []string{"list"}}},
		}, metav1.CreateOptions{})
		if err != nil {
			t.Fatal(err)
		}
		_, err = admin.RbacV1().RoleBindings(ns).Create(ctx, &rbacv1.RoleBinding{
			ObjectMeta: metav1.ObjectMeta{Name: "reader"},
			RoleRef:    rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "Role", Name: "reader"},
			Subjects:   []rbacv1.Subject{{Kind: "ServiceAccount", Name: "default", Namespace: ns}},
		}, metav1.CreateOptions{})
		if err != nil {
			t.Fatal(err)
		}
		eventually(t, 5*time.Second, func() error {
			_, err := c.CoreV1().Pods(ns).List(ctx, metav1.ListOptions{})
			return err
		})
	})
}

func TestAdmits(t *testing.T) {
	f := shareServer(t)
	c := client(t, f.admin())
	ns := namespace(t, c)
	account(t, c, ns)
	ctx := within(t, 30*time.Second)

	t.Run("default tolerations", func(t *testing.T) {
		var created *corev1.Pod
		eventually(t, 5*time.Second, func() (err error) { // admission sees the account a moment later
			created, err = c.CoreV1().Pods(ns).Create(ctx, pod("tolerant"), metav1.CreateOptions{})
			return err
		})
		for _, toleration := range created.Spec.Tolerations {
			if *toleration.TolerationSeconds != DefaultUnreachableTolerationSeconds {
				t.Errorf("%s is tolerated for %d s, want %d", toleration.Key, *toleration.TolerationSeconds, DefaultUnreachableTolerationSeconds)
			}
		}
		if len(created.Spec.Tolerations) != 2 {
			t.Errorf("tolerations %v, want two", created.Spec.Tolerations)
		}
	})
	t.Run("policy", func(t *testing.T) {
		policies := c.AdmissionregistrationV1()
		_, err := policies.ValidatingAdmissionPolicies().Create(ctx, &admissionv1.ValidatingAdmissionPolicy{
			ObjectMeta: metav1.ObjectMeta{Name: ns},
			Spec: admissionv1.ValidatingAdmissionPolicySpec{
				MatchConstraints: &admissionv1.MatchResources{ResourceRules: []admissionv1.NamedRuleWithOperations{{
					RuleWithOperations: admissionv1.RuleWithOperations{
						Operations: []admissionv1.OperationType{admissionv1.Create},
						Rule:       admissionv1.Rule{APIGroups: []string{""}, APIVersions: []string{"v1"}, Resources: []string{"configmaps"}},
					},
				}}},
				Validations: []admissionv1.Validation{{Expression: "object.metadata.name != 'forbidden'", Message: "not this name"}},
			},
		}, metav1.CreateOptions{})
		if err != nil {
			t.Fatal(err)
		}
		_, err = policies.ValidatingAdmissionPolicyBindings().Create(ctx, &admissionv1.ValidatingAdmissionPolicyBinding{
			ObjectMeta: metav1.ObjectMeta{Name: ns},
			Spec: admissionv1.ValidatingAdmissionPolicyBindingSpec{
				PolicyName: ns, ValidationActions: []admissionv1.ValidationAction{admissionv1.Deny},
				MatchResources: &admissionv1.MatchResources{NamespaceSelector: &metav1.LabelSelector{
					MatchLabels: map[string]string{corev1.LabelMetadataName: ns},
				}},
			},
		}, metav1.CreateOptions{})
		if err != nil {
			t.Fatal(err)
		}
		eventually(t, 15*time.Second, func() error {
			_, err := c.CoreV1().ConfigMaps(ns).Create(ctx, configMap("forbidden", nil), metav1.CreateOptions{})
			if err != nil && strings.Contains(err.Error(), "not this name") {
				return nil
			}
			_ = c.CoreV1().ConfigMaps(ns).Delete(ctx, "forbidden", metav1.DeleteOptions{})
			return fmt.Errorf("create against the policy: %v", err)
		})
	})
	t.Run("quota", func(t *testing.T) {
		_, err := c.CoreV1().ResourceQuotas(ns).Create(ctx, &corev1.ResourceQuota{
			ObjectMeta: metav1.ObjectMeta{Name: "q"},
			Spec:       corev1.ResourceQuotaSpec{Hard: corev1.ResourceList{"count/secrets": resource.MustParse("1")}},
		}, metav1.CreateOptions{})
		if err != nil {
			t.Fatal(err)
		}
		// A reconciler would fill in what is used.
		quota, err := c.CoreV1().ResourceQuotas(ns).Get(ctx, "q", metav1.GetOptions{})
		if err != nil {
			t.Fatal(err)
		}
		quota.Status = corev1.ResourceQuotaStatus{Hard: quota.Spec.Hard, Used: corev1.ResourceList{"count/secrets": resource.MustParse("0")}}
		if _, err := c.CoreV1().ResourceQuotas(ns).UpdateStatus(ctx, quota, metav1.UpdateOptions{}); err != nil {
			t.Fatal(err)
		}
		eventually(t, 10*time.Second, func() error {
			_, err := c.CoreV1().Secrets(ns).Create(ctx, &corev1.Secret{ObjectMeta: metav1.ObjectMeta{GenerateName: "s-"}}, metav1.CreateOptions{})
			if err != nil && strings.Contains(err.Error(), "exceeded quota") {
				return nil
			}
			return fmt.Errorf("create a secret beyond the quota: %v", err)
		})
	})
}

func TestAllocatesServices(t *testing.T) {
	f := shareServer(t)
	c := client(t, f.admin())
	ns := namespace(t, c)
	ctx := within(t, 60*time.Second)

	kubernetesService, err := c.CoreV1().Services("default").Get(ctx, "kubernetes", metav1.GetOptions{})
	if err != nil || kubernetesService.Spec.ClusterIP != "10.96.0.1" {
		t.Errorf("the kubernetes Service: %v, %v", kubernetesService, err)
	}
	eventually(t, 10*time.Second, func() error {
		slice, err := c.DiscoveryV1().EndpointSlices("default").Get(ctx, "kubernetes", metav1.GetOptions{})
		if err == nil && (len(slice.Endpoints) != 1 || slice.Endpoints[0].Addresses[0] != advertised.String()) {
			err = fmt.Errorf("endpoints %v", slice.Endpoints)
		}
		return err
	})

	const services = 40
	var wg sync.WaitGroup
	var mu sync.Mutex
	ports, ips := map[int32]string{}, map[string]string{}
	for i := range services {
		wg.Go(func() {
			service, err := c.CoreV1().Services(ns).Create(ctx, &corev1.Service{
				ObjectMeta: metav1.ObjectMeta{Name: fmt.Sprint("s", i)},
				Spec:       corev1.ServiceSpec{Type: corev1.ServiceTypeNodePort, Ports: []corev1.ServicePort{{Port: 80}}},
			}, metav1.CreateOptions{})
			if err != nil {
				t.Error(err)
				return
			}
			mu.Lock()
			defer mu.Unlock()
			port := service.Spec.Ports[0].NodePort
			if other, taken := ports[port]; taken || !DefaultNodePortRange.Contains(int(port)) {
				t.Errorf("%s has node port %d, of %q", service.Name, port, other)
			}
			if other, taken := ips[service.Spec.ClusterIP]; taken {
				t.Errorf("%s has cluster IP %s, of %s", service.Name, service.Spec.ClusterIP, other)
			}
			ports[port], ips[service.Spec.ClusterIP] = service.Name, service.Name
		})
	}
	wg.Wait()
	taken := *kubernetesService
	for port := range ports {
		taken.Spec.Ports = []corev1.ServicePort{{Port: 80, NodePort: port}}
		break
	}
	_, err = c.CoreV1().Services(ns).Create(ctx, &corev1.Service{
		ObjectMeta: metav1.ObjectMeta{Name: "greedy"},
		Spec:       corev1.ServiceSpec{Type: corev1.ServiceTypeNodePort, Ports: taken.Spec.Ports},
	}, metav1.CreateOptions{})
	if !apierrors.IsInvalid(err) {
		t.Errorf("a node port given out twice: %v, want Invalid", err)
	}
}
