package main

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"runtime"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"timonel/state"
)

// The biggest cluster that Kubernetes supports.
const growthPods, growthNodes = 150_000, 5_000

// TestGrowth fills a state with the biggest cluster there is and prints what it
// costs.
func TestGrowth(t *testing.T) {
	large(t)
	before := heap()
	store := state.New(state.Options{})
	began, stored := time.Now(), fillGrowth(t, store, growthPods, growthNodes)
	objects := growthPods + growthNodes
	filled := heap() - before
	t.Logf("%d pods and %d nodes, %d bytes each on average: applied in %v", growthPods, growthNodes, stored/objects, time.Since(began).Round(time.Millisecond))
	t.Logf("heap: %d MB, of it %d bytes an object beside its value; the history holds no more than 64 MiB", filled>>20, (filled-stored)/objects)

	began, n, size := time.Now(), 0, 0
	for kv := range store.View().Range("/registry/pods/", "") {
		n++
		size += len(kv.Value)
	}
	if n != growthPods {
		t.Fatalf("listed %d pods", n)
	}
	t.Logf("list of all pods, encoded: %v, %d MB", time.Since(began).Round(time.Microsecond), size>>20)
	began = time.Now()
	for kv := range store.View().Range("/registry/pods/", "") {
		var pod corev1.Pod
		if err := pod.Unmarshal(kv.Value); err != nil {
			t.Fatal(err)
		}
	}
	t.Logf("list of all pods, decoded: %v", time.Since(began).Round(time.Millisecond))

	var snapshot bytes.Buffer
	began = time.Now()
	if err := store.Save(&snapshot); err != nil {
		t.Fatal(err)
	}
	t.Logf("snapshot saved: %v, %d MB", time.Since(began).Round(time.Millisecond), snapshot.Len()>>20)
	began = time.Now()
	restored := state.New(state.Options{})
	if err := restored.Restore(bytes.NewReader(snapshot.Bytes())); err != nil {
		t.Fatal(err)
	}
	t.Logf("snapshot loaded: %v", time.Since(began).Round(time.Millisecond))
	if restored.View().Revision() != store.View().Revision() || restored.View().Hash() != store.View().Hash() {
		t.Fatal("the state that was loaded is not the one that was saved")
	}
	runtime.KeepAlive(store)
}

// TestGrowthCatchUp has a replica join a cluster that holds the biggest state, by
// snapshot, over TLS, and prints how long it took.
func TestGrowthCatchUp(t *testing.T) {
	large(t)
	c := newLogCluster(t, t.TempDir())
	for _, id := range []string{"c1", "c2"} {
		c.start(t, id)
	}
	c.start(t, "c3")
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	leader := c.await(t, ctx)
	began := time.Now()
	for _, txn := range growthTxns(t, growthPods, growthNodes) {
		if _, err := leader.replica.Apply(ctx, txn); err != nil {
			t.Fatal(err)
		}
	}
	t.Logf("%d objects through the log of three replicas, 250 a write: %v", growthPods+growthNodes, time.Since(began).Round(time.Millisecond))
	var follower string
	for id := range c.nodes {
		if id != leader.id {
			follower = id
		}
	}
	c.stop(follower)
	began = time.Now()
	n := c.start(t, follower)
	if err := n.store.WaitRevision(ctx, leader.store.View().Revision()); err != nil {
		t.Fatal(err)
	}
	t.Logf("follower restarted and caught up: %v", time.Since(began).Round(time.Millisecond))
	c.stop(follower)
	c.wipe(t, follower)
	began = time.Now()
	n = c.start(t, follower)
	if err := n.store.WaitRevision(ctx, leader.store.View().Revision()); err != nil {
		t.Fatal(err)
	}
	t.Logf("follower with an empty disk caught up: %v", time.Since(began).Round(time.Millisecond))
}

// large skips what takes minutes and gigabytes unless it is asked for.
func large(t *testing.T) {
	if os.Getenv("TIMONEL_GROWTH") == "" {
		t.Skip("set TIMONEL_GROWTH=1 (make bench-parts does): takes 3 GB of memory")
	}
}

func heap() int {
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int(m.HeapAlloc)
}

// fillGrowth applies the objects and returns the bytes of their values.
func fillGrowth(t testing.TB, store *state.Store, pods, nodes int) int {
	index := uint64(0)
	for _, txn := range growthTxns(t, pods, nodes) {
		index++
		for _, r := range store.ApplyBatch([]state.Entry{{Index: index, Term: 1, Command: txn}}) {
			if r.Err != nil {
				t.Fatal(r.Err)
			}
		}
	}
	size := 0
	for kv := range store.View().Range("/registry/", "") {
		size += len(kv.Value)
	}
	return size
}

// growthTxns yields transactions of 250 objects each, in the encoding of the log.
func growthTxns(t testing.TB, pods, nodes int) func(func(int, []byte) bool) {
	return func(yield func(int, []byte) bool) {
		var txn state.Txn
		for i := range pods + nodes {
			key, object := fmt.Sprintf("/registry/minions/node-%05d", i), marshaler(growthNode(i))
			if i >= nodes {
				pod := growthPod(i)
				key, object = "/registry/pods/"+pod.Namespace+"/"+pod.Name, pod
			}
			value, err := object.Marshal()
			if err != nil {
				t.Fatal(err)
			}
			txn.Changes = append(txn.Changes, state.Change{Key: key, Value: value})
			if len(txn.Changes) == 250 || i == pods+nodes-1 {
				if !yield(i, txn.Marshal()) {
					return
				}
				txn = state.Txn{}
			}
		}
	}
}

type marshaler interface{ Marshal() ([]byte, error) }

// growthPod is a pod as a Deployment's is that runs: two to three kilobytes.
func growthPod(i int) *corev1.Pod {
	now := metav1.NewTime(time.Unix(1_800_000_000+int64(i), 0))
	app := fmt.Sprintf("service-%04d", i%3000)
	pod := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{
		Name: fmt.Sprintf("%s-7d9c5b6f4-%05x", app, i), GenerateName: app + "-7d9c5b6f4-", Namespace: fmt.Sprintf("team-%03d", i%200),
		UID: types.UID(fmt.Sprintf("11111111-2222-3333-4444-%012d", i)), CreationTimestamp: now,
		Labels:      map[string]string{"app": app, "pod-template-hash": "7d9c5b6f4", "version": "v1.2.3", "team": fmt.Sprint(i % 200)},
		Annotations: map[string]string{"prometheus.io/scrape": "true", "prometheus.io/port": "9090", "checksum/config": fmt.Sprintf("%064x", i)},
		OwnerReferences: []metav1.OwnerReference{{APIVersion: "apps/v1", Kind: "ReplicaSet", Name: app + "-7d9c5b6f4",
			UID: types.UID(fmt.Sprintf("55555555-2222-3333-4444-%012d", i%3000))}},
	}}
	quantities := corev1.ResourceList{corev1.ResourceCPU: resource.MustParse("250m"), corev1.ResourceMemory: resource.MustParse("256Mi")}
	probe := &corev1.Probe{PeriodSeconds: 10, TimeoutSeconds: 1, ProbeHandler: corev1.ProbeHandler{HTTPGet: &corev1.HTTPGetAction{Path: "/healthz", Scheme: "HTTP"}}}
	container := corev1.Container{Name: "app", Image: "registry.example.com/team/" + app + ":v1.2.3", ImagePullPolicy: corev1.PullIfNotPresent,
		Ports:     []corev1.ContainerPort{{Name: "http", ContainerPort: 8080, Protocol: corev1.ProtocolTCP}},
		Resources: corev1.ResourceRequirements{Requests: quantities, Limits: quantities}, LivenessProbe: probe, ReadinessProbe: probe,
		VolumeMounts: []corev1.VolumeMount{{Name: "kube-api-access", ReadOnly: true, MountPath: "/var/run/secrets/kubernetes.io/serviceaccount"}},
	}
	for j := range 8 {
		container.Env = append(container.Env, corev1.EnvVar{Name: fmt.Sprint("SETTING_", j), Value: fmt.Sprintf("value-%d-of-%s", j, app)})
	}
	pod.Spec = corev1.PodSpec{Containers: []corev1.Container{container}, NodeName: fmt.Sprintf("node-%05d", i%growthNodes), ServiceAccountName: "default",
		RestartPolicy: corev1.RestartPolicyAlways, DNSPolicy: corev1.DNSClusterFirst, SchedulerName: "default-scheduler",
		Tolerations: []corev1.Toleration{{Key: "node.kubernetes.io/not-ready", Operator: corev1.TolerationOpExists, Effect: corev1.TaintEffectNoExecute},
			{Key: "node.kubernetes.io/unreachable", Operator: corev1.TolerationOpExists, Effect: corev1.TaintEffectNoExecute}},
		Volumes: []corev1.Volume{{Name: "config", VolumeSource: corev1.VolumeSource{ConfigMap: &corev1.ConfigMapVolumeSource{LocalObjectReference: corev1.LocalObjectReference{Name: app}}}}},
	}
	for _, kind := range []corev1.PodConditionType{corev1.PodInitialized, corev1.PodReady, corev1.ContainersReady, corev1.PodScheduled} {
		pod.Status.Conditions = append(pod.Status.Conditions, corev1.PodCondition{Type: kind, Status: corev1.ConditionTrue, LastTransitionTime: now})
	}
	pod.Status.Phase, pod.Status.PodIP, pod.Status.HostIP, pod.Status.StartTime = corev1.PodRunning, "10.244.17.23", "192.0.2.17", &now
	pod.Status.ContainerStatuses = []corev1.ContainerStatus{{Name: "app", Ready: true, Image: container.Image, ImageID: fmt.Sprintf("sha256:%064x", i%3000),
		ContainerID: fmt.Sprintf("containerd://%064x", i), State: corev1.ContainerState{Running: &corev1.ContainerStateRunning{StartedAt: now}}}}
	managed := []byte(`{"f:metadata":{"f:labels":{".":{},"f:app":{},"f:team":{}}},"f:spec":{"f:containers":{"k:{\"name\":\"app\"}":{".":{},"f:env":{},"f:image":{},"f:name":{},"f:ports":{},"f:resources":{}}}}}`)
	for _, manager := range []string{"controller", "agent"} {
		pod.ManagedFields = append(pod.ManagedFields, metav1.ManagedFieldsEntry{Manager: manager, Operation: "Update", APIVersion: "v1", Time: &now, FieldsType: "FieldsV1", FieldsV1: &metav1.FieldsV1{Raw: managed}})
	}
	return pod
}

// growthNode is a node with twenty images.
func growthNode(i int) *corev1.Node {
	node := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: fmt.Sprintf("node-%05d", i), UID: types.UID(fmt.Sprintf("99999999-2222-3333-4444-%012d", i)),
		Labels: map[string]string{"kubernetes.io/hostname": fmt.Sprintf("node-%05d", i), "kubernetes.io/arch": "amd64", "topology.kubernetes.io/zone": fmt.Sprint("zone-", i%3)}}}
	for j := range 20 {
		node.Status.Images = append(node.Status.Images, corev1.ContainerImage{Names: []string{fmt.Sprintf("registry.example.com/team/service-%04d@sha256:%064x", j, j)}, SizeBytes: 1 << 27})
	}
	return node
}
