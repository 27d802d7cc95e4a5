//go:build !race

// The race detector is left to the tests of reconcile itself: with it, building
// the API server takes minutes.

package apitest

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"path/filepath"
	"sync"
	"testing"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/wait"
	"k8s.io/apiserver/pkg/authentication/user"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/kubernetes"

	"timonel/apiserver"
	"timonel/internal/podrange"
	"timonel/pki"
	"timonel/reconcile"
	"timonel/reconcile/node"
	"timonel/reconcile/standard"
	"timonel/state"
	"timonel/state/objects"
	"timonel/state/storage/storagetest"
)

// cluster is an API server, the reconcilers, and two agents that pretend.
type cluster struct {
	t       *testing.T
	backend *storagetest.LocalBackend
	cache   *objects.Cache
	client  kubernetes.Interface
	dynamic dynamic.Interface

	mu      sync.Mutex
	health  reconcile.Health
	changed chan struct{}
}

func start(t *testing.T) *cluster {
	t.Helper()
	dir := t.TempDir()
	bundle, err := pki.CreateBundle(filepath.Join(dir, "bundle"))
	if err != nil {
		t.Fatal(err)
	}
	ip := net.IPv4(127, 0, 0, 1)
	cert, err := bundle.Controller("c1", []net.IP{ip}, nil)
	if err != nil {
		t.Fatal(err)
	}
	files, err := cert.WriteFiles(filepath.Join(dir, "c1"))
	if err != nil {
		t.Fatal(err)
	}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	c := &cluster{t: t, backend: storagetest.NewLocalBackend(state.Options{}), changed: make(chan struct{}, 1)}
	server, err := apiserver.New(ctx, apiserver.Config{
		Name: "c1", Listener: listener, AdvertiseAddress: net.IPv4(192, 0, 2, 1), Certificates: files, Backend: c.backend,
	})
	if err != nil {
		cancel()
		t.Fatal(err)
	}
	config := server.InProcess(&user.DefaultInfo{Name: "test", Groups: []string{user.SystemPrivilegedGroup}})
	if c.client, err = kubernetes.NewForConfig(config); err != nil {
		t.Fatal(err)
	}
	if c.dynamic, err = dynamic.NewForConfig(config); err != nil {
		t.Fatal(err)
	}
	c.cache = objects.NewCache(c.backend.Store())
	reconcilers, err := standard.Reconcilers(standard.Config{
		Health: node.HealthConfig{Settle: 100 * time.Millisecond, Confirm: 100 * time.Millisecond},
		Pods:   podrange.Ranges{Networks: []netip.Prefix{netip.MustParsePrefix("10.244.0.0/16")}}, RootCA: []byte("the CA"), ServiceAccountKey: bundle.ServiceAccountSigner(),
	})
	if err != nil {
		t.Fatal(err)
	}
	runner, err := reconcile.NewRunner(reconcile.Config{
		Cache: c.cache, Revision: func() int64 { return c.backend.Store().View().Revision() },
		Client: server.InProcess(&user.DefaultInfo{Name: "system:timonel:reconciler", Groups: []string{user.SystemPrivilegedGroup}}),
		Health: c.currentHealth, HealthChanged: c.changed, Reconcilers: reconcilers, Host: "c1",
		Log: slog.New(slog.NewTextHandler(t.Output(), nil)),
	})
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	for _, f := range []func(context.Context) error{
		server.Run, c.cache.Run, func(ctx context.Context) error { return runner.Run(ctx, 1) }, c.agents,
	} {
		wg.Go(func() {
			if err := f(ctx); err != nil && ctx.Err() == nil {
				t.Errorf("ended early: %v", err)
			}
		})
	}
	t.Cleanup(func() { cancel(); wg.Wait() })
	for _, name := range []string{"a1", "a2"} {
		c.addNode(name)
	}
	c.await("the namespace default and its account", func(s *objects.Snapshot) bool {
		_, ok := s.ServiceAccounts().Get("default", "default")
		return ok
	})
	return c
}

func (c *cluster) currentHealth() reconcile.Health {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.health
}

func (c *cluster) setHealth(node string, h reconcile.NodeHealth) {
	c.mu.Lock()
	nodes := map[string]reconcile.NodeHealth{node: h}
	for k, v := range c.health.Nodes {
		if k != node {
			nodes[k] = v
		}
	}
	c.health.Nodes = nodes
	c.mu.Unlock()
	select {
	case c.changed <- struct{}{}:
	default:
	}
}

func (c *cluster) ctx() context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	c.t.Cleanup(cancel)
	return ctx
}

func (c *cluster) must(err error) {
	c.t.Helper()
	if err != nil {
		c.t.Fatal(err)
	}
}

// addNode registers a node, once the server answers, and reports it ready.
func (c *cluster) addNode(name string) {
	c.t.Helper()
	c.setHealth(name, reconcile.NodeHealth{Stream: true, StreamSince: time.Now()})
	node := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name, Labels: map[string]string{corev1.LabelHostname: name}}}
	room := corev1.ResourceList{corev1.ResourceCPU: resource.MustParse("8"), corev1.ResourceMemory: resource.MustParse("16Gi"), corev1.ResourcePods: resource.MustParse("110")}
	node.Status.Capacity, node.Status.Allocatable = room, room
	node.Status.Conditions = []corev1.NodeCondition{{Type: corev1.NodeReady, Status: corev1.ConditionTrue, Reason: "KubeletReady"}}
	deadline := time.Now().Add(time.Minute)
	for {
		_, err := c.client.CoreV1().Nodes().Create(c.ctx(), node, metav1.CreateOptions{})
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			c.t.Fatal(err)
		}
		time.Sleep(50 * time.Millisecond) // the server is starting
	}
}

// agents make bound pods run and end terminating ones on nodes with a stream.
func (c *cluster) agents(ctx context.Context) error {
	var after int64
	ips := 0
	for {
		changes, err := c.cache.Changes(ctx, after)
		if err != nil {
			return err
		}
		after = changes.Snapshot.Revision()
		for pod := range changes.Snapshot.Pods().All() {
			if pod.Spec.NodeName == "" || !c.currentHealth().Nodes[pod.Spec.NodeName].Stream {
				continue
			}
			pods := c.client.CoreV1().Pods(pod.Namespace)
			switch {
			case pod.DeletionTimestamp != nil:
				err = pods.Delete(ctx, pod.Name, *metav1.NewDeleteOptions(0))
			case pod.Status.Phase == corev1.PodPending:
				pod = pod.DeepCopy()
				pod.Status.Phase = corev1.PodRunning
				ips++
				pod.Status.PodIP = fmt.Sprintf("10.244.%d.%d", ips/250, ips%250+1)
				pod.Status.PodIPs = []corev1.PodIP{{IP: pod.Status.PodIP}}
				pod.Status.Conditions = append(pod.Status.Conditions, corev1.PodCondition{Type: corev1.PodReady, Status: corev1.ConditionTrue, LastTransitionTime: metav1.Now()})
				_, err = pods.UpdateStatus(ctx, pod, metav1.UpdateOptions{})
			}
			if err != nil && !apierrors.IsNotFound(err) && !apierrors.IsConflict(err) && ctx.Err() == nil {
				return err
			}
		}
	}
}

// await waits until the snapshot is as wanted.
func (c *cluster) await(what string, ok func(*objects.Snapshot) bool) {
	c.t.Helper()
	began := time.Now()
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	c.must(c.cache.WaitRevision(ctx, c.backend.Store().View().Revision())) // what was done before must show
	for {
		s := c.cache.Snapshot()
		if ok(s) {
			c.t.Logf("%s: after %s", what, time.Since(began).Round(time.Millisecond))
			return
		}
		if err := c.cache.WaitRevision(ctx, s.Revision()+1); err != nil {
			for m := range s.Metas().All() {
				if m.Namespace == "default" || m.Namespace == "shop" {
					c.t.Logf("%s deleting=%v finalizers=%v", m.Key, m.DeletionTimestamp != nil, m.Finalizers)
				}
			}
			c.t.Fatalf("waiting for %s: %v", what, err)
		}
	}
}

func deployment(name string, replicas int32) *appsv1.Deployment {
	app := map[string]string{"app": name}
	return &appsv1.Deployment{
		ObjectMeta: metav1.ObjectMeta{Name: name},
		Spec: appsv1.DeploymentSpec{
			Replicas: &replicas, Selector: &metav1.LabelSelector{MatchLabels: app},
			Template: corev1.PodTemplateSpec{
				ObjectMeta: metav1.ObjectMeta{Labels: app},
				Spec:       corev1.PodSpec{Containers: []corev1.Container{{Name: "c", Image: "v1"}}},
			},
		},
	}
}

func complete(name string, replicas int32) func(*objects.Snapshot) bool {
	return func(s *objects.Snapshot) bool {
		d, ok := s.Deployments().Get("default", name)
		return ok && d.Status.ObservedGeneration == d.Generation && d.Status.UpdatedReplicas == replicas &&
			d.Status.AvailableReplicas == replicas && d.Status.Replicas == replicas
	}
}

func owned(s *objects.Snapshot, app string) (sets, pods int) {
	for rs := range s.ReplicaSets().InNamespace("default") {
		if rs.Labels["app"] == app {
			sets++
		}
	}
	for pod := range s.Pods().InNamespace("default") {
		if pod.Labels["app"] == app && pod.DeletionTimestamp == nil {
			pods++
		}
	}
	return sets, pods
}

func TestStandardReconcilers(t *testing.T) {
	c := start(t)
	deployments := c.client.AppsV1().Deployments("default")
	patch := func(name, body string, sub ...string) {
		t.Helper()
		_, err := deployments.Patch(c.ctx(), name, types.StrategicMergePatchType, []byte(body), metav1.PatchOptions{}, sub...)
		c.must(err)
	}

	// Every namespace has its service account and CA, every node its range.
	c.await("namespaces and nodes", func(s *objects.Snapshot) bool {
		_, sa := s.ServiceAccounts().Get("default", "default")
		_, ca := s.ConfigMaps().Get("default", "kube-root-ca.crt")
		a1, ok := s.Nodes().Get("", "a1")
		a2, ok2 := s.Nodes().Get("", "a2")
		return sa && ca && ok && ok2 && a1.Spec.PodCIDR != "" && a2.Spec.PodCIDR != "" && a1.Spec.PodCIDR != a2.Spec.PodCIDR && len(a1.Spec.Taints) == 0
	})

	_, err := deployments.Create(c.ctx(), deployment("web", 3), metav1.CreateOptions{})
	c.must(err)
	service := &corev1.Service{
		ObjectMeta: metav1.ObjectMeta{Name: "web"},
		Spec:       corev1.ServiceSpec{Selector: map[string]string{"app": "web"}, Ports: []corev1.ServicePort{{Name: "http", Port: 80}}},
	}
	// A server that has only just started has no range of addresses yet, and says so.
	c.must(wait.PollUntilContextTimeout(c.ctx(), 50*time.Millisecond, 10*time.Second, true, func(ctx context.Context) (bool, error) {
		_, err := c.client.CoreV1().Services("default").Create(ctx, service, metav1.CreateOptions{})
		if apierrors.IsInternalError(err) {
			return false, nil
		}
		return err == nil, err
	}))
	c.await("a deployment of 3", complete("web", 3))
	c.await("its endpoints", func(s *objects.Snapshot) bool {
		ready := 0
		for slice := range s.EndpointSlices().InNamespace("default") {
			if slice.Labels[discoveryv1.LabelServiceName] == "web" {
				for _, ep := range slice.Endpoints {
					if *ep.Conditions.Ready {
						ready++
					}
				}
			}
		}
		return ready == 3
	})
	patch("web", `{"spec":{"replicas":6}}`, "scale")
	c.await("scaled to 6", complete("web", 6))
	patch("web", `{"spec":{"template":{"metadata":{"annotations":{"kubectl.kubernetes.io/restartedAt":"now"}}}}}`)
	c.await("restarted", complete("web", 6))
	patch("web", `{"spec":{"template":{"spec":{"containers":[{"name":"c","image":"v2"}]}}}}`)
	c.await("rolled out", complete("web", 6))
	c.await("three revisions", func(s *objects.Snapshot) bool {
		d, _ := s.Deployments().Get("default", "web")
		sets, _ := owned(s, "web")
		return sets == 3 && d.Annotations["deployment.kubernetes.io/revision"] == "3"
	})

	// A dead machine: its pods are evicted after their tolerations' seconds, and replaced.
	_, err = deployments.Create(c.ctx(), func() *appsv1.Deployment {
		d, two := deployment("short", 2), int64(2)
		for _, key := range []string{corev1.TaintNodeUnreachable, corev1.TaintNodeNotReady} {
			d.Spec.Template.Spec.Tolerations = append(d.Spec.Template.Spec.Tolerations, corev1.Toleration{
				Key: key, Operator: corev1.TolerationOpExists, Effect: corev1.TaintEffectNoExecute, TolerationSeconds: &two})
		}
		return d
	}(), metav1.CreateOptions{})
	c.must(err)
	c.await("a deployment that tolerates little", complete("short", 2))
	c.setHealth("a2", reconcile.NodeHealth{StreamSince: time.Now(), Gossip: reconcile.GossipDead, GossipSince: time.Now()})
	c.await("a2 is not ready", func(s *objects.Snapshot) bool {
		node, _ := s.Nodes().Get("", "a2")
		for _, t := range node.Spec.Taints {
			if t.Key == corev1.TaintNodeUnreachable && t.Effect == corev1.TaintEffectNoExecute {
				return true
			}
		}
		return false
	})
	c.await("its pods are replaced on a1", func(s *objects.Snapshot) bool {
		n := 0
		for pod := range s.PodsOnNode("a1") {
			if pod.Labels["app"] == "short" && pod.Status.Phase == corev1.PodRunning {
				n++
			}
		}
		return n == 2
	})
	c.setHealth("a2", reconcile.NodeHealth{Stream: true, StreamSince: time.Now()})
	c.await("a2 is ready again, and the moved pods are gone from it", func(s *objects.Snapshot) bool {
		node, _ := s.Nodes().Get("", "a2")
		for pod := range s.PodsOnNode("a2") {
			if pod.DeletionTimestamp != nil {
				return false
			}
		}
		return len(node.Spec.Taints) == 0
	})

	// Deleting: background, foreground, orphan.
	background, foreground, orphan := metav1.DeletePropagationBackground, metav1.DeletePropagationForeground, metav1.DeletePropagationOrphan
	c.must(deployments.Delete(c.ctx(), "short", metav1.DeleteOptions{PropagationPolicy: &background}))
	c.await("short is gone", func(s *objects.Snapshot) bool { sets, pods := owned(s, "short"); return sets+pods == 0 })
	c.must(deployments.Delete(c.ctx(), "web", metav1.DeleteOptions{PropagationPolicy: &foreground}))
	c.await("web is gone, last of all", func(s *objects.Snapshot) bool {
		_, ok := s.Deployments().Get("default", "web")
		sets, pods := owned(s, "web")
		if !ok && sets+pods > 0 {
			t.Fatalf("the deployment went before %d sets and %d pods", sets, pods)
		}
		return !ok
	})
	_, err = deployments.Create(c.ctx(), deployment("left", 1), metav1.CreateOptions{})
	c.must(err)
	c.await("another deployment", complete("left", 1))
	c.must(deployments.Delete(c.ctx(), "left", metav1.DeleteOptions{PropagationPolicy: &orphan}))
	c.await("its set is an orphan", func(s *objects.Snapshot) bool {
		_, ok := s.Deployments().Get("default", "left")
		sets, pods := owned(s, "left")
		return !ok && sets == 1 && pods == 1
	})

	c.namespaceWithCustomResource()
	c.quota()

	events, err := c.client.CoreV1().Events("").List(c.ctx(), metav1.ListOptions{})
	c.must(err)
	seen := map[string]bool{}
	for _, e := range events.Items {
		seen[e.Reason] = true
	}
	for _, reason := range []string{"ScalingReplicaSet", "SuccessfulCreate", "SuccessfulDelete", "Scheduled", "NodeNotReady", "TaintManagerEviction"} {
		if !seen[reason] {
			t.Errorf("no event %s among %v", reason, seen)
		}
	}
}

// namespaceWithCustomResource deletes a namespace that holds a deployment and a custom
// resource with a finalizer of its own.
func (c *cluster) namespaceWithCustomResource() {
	c.t.Helper()
	crd := map[string]any{
		"apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition",
		"metadata": map[string]any{"name": "boats.ships.example.org"},
		"spec": map[string]any{
			"group": "ships.example.org", "scope": "Namespaced",
			"names":    map[string]any{"plural": "boats", "singular": "boat", "kind": "Boat", "listKind": "BoatList"},
			"versions": []any{map[string]any{"name": "v1", "served": true, "storage": true, "schema": map[string]any{"openAPIV3Schema": map[string]any{"type": "object"}}}},
		},
	}
	gvr := schema.GroupVersionResource{Group: "ships.example.org", Version: "v1", Resource: "boats"}
	_, err := c.dynamic.Resource(schema.GroupVersionResource{Group: "apiextensions.k8s.io", Version: "v1", Resource: "customresourcedefinitions"}).
		Create(c.ctx(), &unstructured.Unstructured{Object: crd}, metav1.CreateOptions{})
	c.must(err)
	_, err = c.client.CoreV1().Namespaces().Create(c.ctx(), &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "shop"}}, metav1.CreateOptions{})
	c.must(err)
	c.await("the namespace's service account", func(s *objects.Snapshot) bool { _, ok := s.ServiceAccounts().Get("shop", "default"); return ok })
	_, err = c.client.AppsV1().Deployments("shop").Create(c.ctx(), deployment("web", 2), metav1.CreateOptions{})
	c.must(err)
	boat := &unstructured.Unstructured{Object: map[string]any{
		"apiVersion": "ships.example.org/v1", "kind": "Boat",
		"metadata": map[string]any{"name": "santa-maria", "finalizers": []any{"example.org/unload"}},
	}}
	deadline := time.Now().Add(20 * time.Second)
	for {
		if _, err = c.dynamic.Resource(gvr).Namespace("shop").Create(c.ctx(), boat, metav1.CreateOptions{}); err == nil {
			break
		}
		if time.Now().After(deadline) {
			c.t.Fatal(err)
		}
		time.Sleep(50 * time.Millisecond) // the resource is not served yet
	}
	c.must(c.client.CoreV1().Namespaces().Delete(c.ctx(), "shop", metav1.DeleteOptions{}))
	c.await("the namespace waits for the boat", func(s *objects.Snapshot) bool {
		n, boats := 0, 0
		for m := range s.Metas().InNamespace("shop") {
			n++
			if m.GVK.Kind == "Boat" && m.DeletionTimestamp != nil {
				boats++
			}
		}
		ns, _ := s.Namespaces().Get("", "shop")
		return n == 1 && boats == 1 && len(ns.Status.Conditions) > 0
	})
	_, err = c.dynamic.Resource(gvr).Namespace("shop").Patch(c.ctx(), "santa-maria", types.MergePatchType, []byte(`{"metadata":{"finalizers":null}}`), metav1.PatchOptions{})
	c.must(err)
	c.await("the namespace is gone", func(s *objects.Snapshot) bool { _, ok := s.Namespaces().Get("", "shop"); return !ok })
}

// quota lets a deployment run into a quota, and checks that it says so, and goes on when there is room.
func (c *cluster) quota() {
	c.t.Helper()
	quota := &corev1.ResourceQuota{
		ObjectMeta: metav1.ObjectMeta{Name: "q"},
		Spec:       corev1.ResourceQuotaSpec{Hard: corev1.ResourceList{"count/replicasets.apps": resource.MustParse("0")}},
	}
	quota, err := c.client.CoreV1().ResourceQuotas("default").Create(c.ctx(), quota, metav1.CreateOptions{})
	c.must(err)
	quota.Status.Hard = quota.Spec.Hard
	quota.Status.Used = corev1.ResourceList{"count/replicasets.apps": resource.MustParse("0")}
	_, err = c.client.CoreV1().ResourceQuotas("default").UpdateStatus(c.ctx(), quota, metav1.UpdateOptions{})
	c.must(err)
	_, err = c.client.AppsV1().Deployments("default").Create(c.ctx(), deployment("many", 1), metav1.CreateOptions{})
	c.must(err)
	c.await("the deployment says what is in its way", func(s *objects.Snapshot) bool {
		d, ok := s.Deployments().Get("default", "many")
		if !ok {
			return false
		}
		for _, cond := range d.Status.Conditions {
			if cond.Reason == "ReplicaSetCreateError" && cond.Status == corev1.ConditionFalse {
				return true
			}
		}
		return false
	})
	c.must(c.client.CoreV1().ResourceQuotas("default").Delete(c.ctx(), "q", metav1.DeleteOptions{}))
	c.await("the deployment goes on", complete("many", 1))
}

// TestRest checks that the reconcilers leave a cluster alone in which nothing happens.
func TestRest(t *testing.T) {
	c := start(t)
	_, err := c.client.AppsV1().Deployments("default").Create(c.ctx(), deployment("web", 3), metav1.CreateOptions{})
	c.must(err)
	c.await("a deployment", complete("web", 3))
	revision := func() int64 { return c.backend.Store().View().Revision() }
	for last := int64(0); last != revision(); {
		last = revision()
		time.Sleep(3 * time.Second) // events and the server's own start-up writes come to their end
	}
	before := revision()
	time.Sleep(10 * time.Second)
	if after := revision(); after != before {
		var out []string
		w, err := c.backend.Store().Watch("/", before)
		c.must(err)
		defer w.Close()
		events, _ := w.Poll()
		for _, e := range events {
			out = append(out, fmt.Sprintf("%s %s", e.Type, e.KV.Key))
		}
		raw, _ := json.Marshal(out)
		t.Errorf("the state went from revision %d to %d at rest: %s", before, after, raw)
	}
}
