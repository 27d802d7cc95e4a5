package apiserver

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/rest"
	"k8s.io/utils/ptr"

	"timonel/internal/weigh"
	"timonel/pki"
)

// message is a field of a protobuf encoding.
func message(number int, content []byte) []byte {
	b := binary.AppendUvarint(nil, uint64(number<<3|2))
	return append(binary.AppendUvarint(b, uint64(len(content))), content...)
}

func TestEstimate(t *testing.T) {
	const n = 100_000
	pod := func(spec []byte) []byte {
		return append([]byte("k8s\x00"), message(2, message(2, spec))...)
	}
	deep := bytes.Repeat([]byte{0x12, 0}, n)
	for range 200 {
		deep = message(2, deep)
	}
	for name, tt := range map[string]struct {
		body       string
		kind       string
		least, may int64 // values
	}{
		"text with braces":           {`{"data":{"a":"` + strings.Repeat(`{\"x\":[1,2]},\\`, n) + `"}}`, "application/json", 2, 4},
		"objects":                    {`{"x":[` + strings.Repeat(`{},`, n) + `{}]}`, "application/json", 2 * n, 2*n + 9},
		"strings":                    {`{"x":[` + strings.Repeat(`"",`, n) + `""]}`, "application/json", n, n + 9},
		"a patch":                    {`[` + strings.Repeat(`{},`, n) + `{}]`, "application/json-patch+json; charset=utf-8", 2 * n, 2*n + 9},
		"no type":                    {`{"x":[` + strings.Repeat(`{},`, n) + `{}]}`, "", 2 * n, 2*n + 9},
		"JSON as YAML":               {`{"data":{"a":"` + strings.Repeat(`{},`, n) + `"}}`, "application/apply-patch+yaml", 2, 4},
		"flow that hides in a quote": {`{x: '"', y: [` + strings.Repeat(`{},`, n) + `{}], z: '"'}`, "application/yaml", 2 * n, 2*n + 9},
		"blocks":                     {"x:\n" + strings.Repeat("- {}\n", n), "application/yaml", 2 * n, 4 * n},
		"short blocks":               {"x:\n" + strings.Repeat("- \n", n), "application/yaml", n, 2*n + 9},
		"protobuf":                   {string(pod(bytes.Repeat([]byte{0x12, 0}, n))), "application/vnd.kubernetes.protobuf", n, n + 9},
		"behind a strange field":     {string(pod(append(message(90000, nil), bytes.Repeat([]byte{0x12, 0}, n)...))), "application/vnd.kubernetes.protobuf", n, n + 9},
		"very deep":                  {string(pod(deep)), "application/vnd.kubernetes.protobuf", n, n + 2000},
		"nothing":                    {"", "application/json", 0, 0},
		"open quote":                 {`{"a`, "application/json", 1, 1},
		"quote that ends in escape":  {`{"a\`, "application/json", 1, 1},
	} {
		t.Run(name, func(t *testing.T) {
			values, cost := estimate([]byte(tt.body), tt.kind)
			if values < tt.least || values > tt.may {
				t.Errorf("%d values, want %d to %d", values, tt.least, tt.may)
			}
			if cost < int64(len(tt.body)) {
				t.Errorf("%d bytes for %d", cost, len(tt.body))
			}
		})
	}
}

func FuzzEstimate(f *testing.F) {
	f.Add([]byte(`{"a":"\\","b":[{},1]}`), "application/json")
	f.Add([]byte("k8s\x00\x12\x04\x12\x00\x12\x00"), "application/vnd.kubernetes.protobuf")
	f.Add([]byte("a: [{}]\n"), "application/yaml")
	f.Fuzz(func(t *testing.T, body []byte, kind string) {
		values, cost := estimate(body, kind)
		if values < 0 || values > int64(len(body))*(weigh.MostDepth+2) || cost < 0 {
			t.Errorf("%d values, %d bytes", values, cost)
		}
	})
}

// tenant is a service account that may do anything in a namespace of its own.
func tenant(t *testing.T, f *fixture, namespace string) *rest.Config {
	t.Helper()
	ctx := within(t, 30*time.Second)
	admin := client(t, f.admin())
	if _, err := admin.CoreV1().Namespaces().Create(ctx, &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: namespace}}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	name := "system:serviceaccount:" + namespace + ":mallory"
	_, err := admin.RbacV1().RoleBindings(namespace).Create(ctx, &rbacv1.RoleBinding{
		ObjectMeta: metav1.ObjectMeta{Name: "all"},
		RoleRef:    rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "ClusterRole", Name: "cluster-admin"},
		Subjects:   []rbacv1.Subject{{Kind: rbacv1.UserKind, APIGroup: rbacv1.GroupName, Name: name}},
	}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	return f.network(t, name)
}

// TestBodiesOfManyValues are requests each of which would keep a processor and gigabytes
// of memory for long.
func TestBodiesOfManyValues(t *testing.T) {
	f := shareServer(t)
	c := client(t, tenant(t, f, "many-values"))
	const n = 400_000
	for name, tt := range map[string]struct{ resource, kind, body string }{
		"containers": {"pods", "application/json", `{"apiVersion":"v1","kind":"Pod","metadata":{"name":"x"},"spec":{"containers":[` + strings.Repeat("{},", n) + `{}]}}`},
		"finalizers": {"configmaps", "application/json", `{"apiVersion":"v1","kind":"ConfigMap","metadata":{"name":"x","finalizers":[` + strings.Repeat(`"",`, n) + `""]}}`},
		"in YAML":    {"pods", "application/yaml", `{apiVersion: v1, kind: Pod, metadata: {name: x}, spec: {containers: [` + strings.Repeat("{},", n) + `{}]}}`},
		"in protobuf": {"pods", "application/vnd.kubernetes.protobuf", "k8s\x00" + string(append(message(1, append(message(1, []byte("v1")), message(2, []byte("Pod"))...)),
			message(2, append(message(1, message(1, []byte("x"))), message(2, bytes.Repeat([]byte{0x12, 0}, n))...))...))},
	} {
		t.Run(name, func(t *testing.T) {
			began := time.Now()
			var code int
			err := c.CoreV1().RESTClient().Post().Namespace("many-values").Resource(tt.resource).SetHeader("Content-Type", tt.kind).
				Body([]byte(tt.body)).Do(within(t, time.Minute)).StatusCode(&code).Error()
			if code != http.StatusRequestEntityTooLarge || !strings.Contains(fmt.Sprint(err), "values") {
				t.Errorf("%d after %s: %v", code, time.Since(began), err)
			}
		})
	}
	// What is long, and not of many values, passes.
	big := &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: "big"}, Data: map[string]string{"dashboard": strings.Repeat(`{"a":[1,2]},`, 60_000)}}
	if _, err := c.CoreV1().ConfigMaps("many-values").Create(within(t, 30*time.Second), big, metav1.CreateOptions{}); err != nil {
		t.Error(err)
	}
	full := &discoveryv1.EndpointSlice{ObjectMeta: metav1.ObjectMeta{Name: "full"}, AddressType: discoveryv1.AddressTypeIPv4}
	for i := range 1000 {
		e := discoveryv1.Endpoint{
			Addresses: []string{fmt.Sprintf("10.9.%d.%d", i/200, i%200+1)}, Zone: ptr.To("a"), NodeName: ptr.To("n"), Hostname: ptr.To("h"),
			Conditions: discoveryv1.EndpointConditions{Ready: ptr.To(true), Serving: ptr.To(true), Terminating: ptr.To(false)},
			TargetRef:  &corev1.ObjectReference{Kind: "Pod", Namespace: "many-values", Name: "p", UID: "u", ResourceVersion: "1"},
			Hints:      &discoveryv1.EndpointHints{},
		}
		for zone := range 8 {
			e.Hints.ForZones = append(e.Hints.ForZones, discoveryv1.ForZone{Name: fmt.Sprint("z", zone)})
		}
		full.Endpoints = append(full.Endpoints, e)
	}
	if _, err := c.DiscoveryV1().EndpointSlices("many-values").Create(within(t, 30*time.Second), full, metav1.CreateOptions{}); err != nil {
		t.Errorf("an EndpointSlice of all the endpoints that one may have: %v", err)
	}
}

// TestSelectorsHaveABound sends selectors each of which takes a hundred times its size.
func TestSelectorsHaveABound(t *testing.T) {
	f := shareServer(t)
	c := client(t, tenant(t, f, "selectors")).CoreV1().ConfigMaps("selectors")
	selector := func(n int) metav1.ListOptions {
		var b strings.Builder
		for i := range n {
			fmt.Fprintf(&b, "a!=x%d,", i)
		}
		return metav1.ListOptions{LabelSelector: b.String() + "a"}
	}
	// Of a client that is not known yet nothing large is read.
	if _, err := c.List(within(t, time.Minute), metav1.ListOptions{}); err != nil {
		t.Fatal(err)
	}
	if _, err := c.List(within(t, time.Minute), selector(50_000)); !apierrors.IsRequestEntityTooLargeError(err) {
		t.Errorf("a selector of 600 KB: %v", err)
	}
	if _, err := c.List(within(t, time.Minute), selector(2000)); err != nil {
		t.Errorf("a selector of 20 KB: %v", err)
	}
	// A watch has its selector for as long as it lasts.
	held := func() int64 { held, _ := f.server.Bodies(); return held }
	before := held()
	w, err := c.Watch(within(t, time.Minute), selector(1000))
	if err != nil {
		t.Fatal(err)
	}
	if now := held(); now-before < 1000*6*selectorFactor {
		t.Errorf("a watch's selector holds %d bytes", now-before)
	}
	w.Stop()
	eventually(t, time.Minute, func() error {
		if now := held(); now > before {
			return fmt.Errorf("%d bytes were not given back", now-before)
		}
		return nil
	})
}

// stuck is a body of which all but the last byte comes at once, and that when it is closed.
type stuck struct {
	left int
	ctx  context.Context
}

func (s *stuck) Read(p []byte) (int, error) {
	if s.left == 1 {
		<-s.ctx.Done()
		return 0, s.ctx.Err()
	}
	n := min(len(p), s.left-1)
	for i := range p[:n] {
		p[i] = ' '
	}
	s.left -= n
	return n, nil
}

// TestBodiesHaveABound has a tenant send bodies that do not end, as many as it can: they
// take no more than there is for them, and no seats from others.
func TestBodiesHaveABound(t *testing.T) {
	f := shareServer(t)
	config := tenant(t, f, "stuck")
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()
	_, refusedBefore := f.server.Bodies()
	for range 4 {
		for _, version := range []string{"h2", "http/1.1"} {
			config := rest.CopyConfig(config)
			config.NextProtos = []string{version}
			transport, err := rest.TransportFor(config)
			if err != nil {
				t.Fatal(err)
			}
			for i := range 60 {
				wg.Go(func() {
					r, err := http.NewRequestWithContext(ctx, http.MethodPost, config.Host+"/api/v1/namespaces/stuck/configmaps", &stuck{3 << 20, ctx})
					if err != nil {
						t.Error(err)
						return
					}
					if r.ContentLength = 3 << 20; i%2 == 0 {
						r.ContentLength = -1 // in chunks
					}
					r.Header.Set("Content-Type", "application/json")
					if resp, err := transport.RoundTrip(r); err == nil {
						_, _ = io.Copy(io.Discard, resp.Body)
						resp.Body.Close()
					}
				})
			}
		}
	}
	eventually(t, time.Minute, func() error {
		if _, refused := f.server.Bodies(); refused == refusedBefore {
			return errors.New("nothing was refused: there is room for all")
		}
		return nil
	})
	limit := int64(leastBodyBytes)
	if held, _ := f.server.Bodies(); held == 0 || held > limit {
		t.Errorf("bodies hold %d bytes of %d", held, limit)
	}
	// Others write, large objects as well.
	others := client(t, f.network(t, "admin", pki.AdminGroup)).CoreV1().ConfigMaps("default")
	for _, size := range []int{10, 500_000} {
		cm := &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: fmt.Sprintf("beside-%d", size)}, Data: map[string]string{"a": strings.Repeat("x", size)}}
		if _, err := others.Create(within(t, 30*time.Second), cm, metav1.CreateOptions{}); err != nil {
			t.Errorf("an object of %d bytes of somebody else: %v", size, err)
		}
	}
	cancel()
	wg.Wait()
	eventually(t, time.Minute, func() error {
		if held, _ := f.server.Bodies(); held != 0 {
			return fmt.Errorf("%d bytes were not given back", held)
		}
		return nil
	})
}
