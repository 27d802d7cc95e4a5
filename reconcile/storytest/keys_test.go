package storytest

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/utils/ptr"
	"pgregory.net/rapid"
	"sigs.k8s.io/yaml"

	"timonel/reconcile"
	"timonel/state/objects"
)

// keysWorld is the objects that TestKeysFollowWhatDecides starts from: some of
// everything, tied to one another.
const keysWorld = `
apiVersion: v1
kind: Namespace
metadata: {name: default}
---
apiVersion: v1
kind: Namespace
metadata: {name: shop}
---
apiVersion: v1
kind: ConfigMap
metadata: {name: owner, namespace: default, uid: o1, finalizers: [example.org/hold]}
---
apiVersion: v1
kind: ConfigMap
metadata: {name: child, namespace: default, uid: o2, ownerReferences: [{apiVersion: v1, kind: ConfigMap, name: owner, uid: o1, blockOwnerDeletion: true}]}
---
apiVersion: v1
kind: ConfigMap
metadata: {name: grandchild, namespace: default, uid: o3, ownerReferences: [{apiVersion: v1, kind: ConfigMap, name: child, uid: o2}, {apiVersion: v1, kind: ConfigMap, name: owner, uid: o1}]}
---
apiVersion: v1
kind: Service
metadata: {name: web, namespace: default, labels: {app: web}}
spec: {clusterIP: 10.0.0.1, selector: {app: web}, ports: [{name: http, port: 80, protocol: TCP}]}
---
apiVersion: v1
kind: Service
metadata: {name: all, namespace: default}
spec: {clusterIP: None, publishNotReadyAddresses: true, selector: {tier: front}, ports: [{port: 80, protocol: TCP}]}
---
apiVersion: v1
kind: Pod
metadata: {name: lone, namespace: default, labels: {app: web}}
spec: {nodeName: n1, containers: [{name: c}]}
status: {phase: Running, podIP: 10.1.0.9, podIPs: [{ip: 10.1.0.9}], conditions: [{type: Ready, status: "True", lastTransitionTime: "2025-12-31T00:00:00Z"}]}
---
apiVersion: v1
kind: Pod
metadata: {name: stray, namespace: default, labels: {app: other}}
spec: {nodeName: gone, containers: [{name: c}]}
status: {phase: Running}
---
apiVersion: v1
kind: Pod
metadata: {name: done, namespace: shop}
spec: {nodeName: n2, containers: [{name: c}]}
status: {phase: Succeeded}
`

// keysEdits are merged into objects of their kinds. Each is one that a user, an agent
// or a reconciler may make.
var keysEdits = map[string][]string{
	"": {
		`metadata: {labels: {app: web, tier: front}}`, `metadata: {labels: {app: other}}`, `metadata: {labels: null}`,
		`metadata: {annotations: {a: b}}`, `metadata: {finalizers: [example.org/hold]}`, `metadata: {finalizers: []}`,
		`metadata: {finalizers: [foregroundDeletion]}`, `metadata: {finalizers: [orphan]}`,
		`metadata: {ownerReferences: null}`,
		`metadata: {ownerReferences: [{apiVersion: v1, kind: ConfigMap, name: owner, uid: o1}]}`,
		`metadata: {ownerReferences: [{apiVersion: v1, kind: ConfigMap, name: child, uid: o2, blockOwnerDeletion: true}]}`,
		`metadata: {ownerReferences: [{apiVersion: v1, kind: ConfigMap, name: nobody, uid: o9}]}`,
	},
	"Pod": {
		`status: {phase: Failed}`, `status: {phase: Succeeded}`, `status: {phase: Failed, reason: Evicted}`,
		`status: {podIPs: [{ip: 10.1.0.1}]}`, `status: {podIPs: null}`,
		`status: {phase: Running, conditions: [{type: Ready, status: "True", lastTransitionTime: "2025-12-31T00:00:00Z"}]}`,
		`status: {phase: Running, conditions: [{type: Ready, status: "True", lastTransitionTime: "2026-01-01T00:00:00Z"}]}`,
		`status: {conditions: [{type: Ready, status: "False", lastTransitionTime: "2025-12-31T00:00:00Z"}]}`,
		`status: {conditions: [{type: PodScheduled, status: "True", lastTransitionTime: "2025-12-31T00:00:00Z"}]}`,
		`status: {containerStatuses: [{name: c, restartCount: 4}]}`,
		`spec: {nodeName: n1}`, `spec: {nodeName: gone}`, `spec: {tolerations: [{operator: Exists, tolerationSeconds: 10}]}`,
		`metadata: {annotations: {controller.kubernetes.io/pod-deletion-cost: "7"}}`,
	},
	"Node": {
		`metadata: {labels: {topology.kubernetes.io/zone: a}}`, `spec: {unschedulable: true}`, `spec: {podCIDR: null, podCIDRs: null}`,
		`spec: {podCIDR: 10.244.0.0/24, podCIDRs: [10.244.0.0/24]}`,
		`spec: {taints: [{key: node.kubernetes.io/out-of-service, effect: NoExecute}]}`,
		`spec: {taints: [{key: mine, effect: NoExecute, timeAdded: "2025-12-31T00:00:00Z"}]}`, `spec: {taints: null}`,
		`status: {conditions: [{type: Ready, status: "False"}]}`, `status: {conditions: [{type: Ready, status: "True"}]}`,
		`status: {conditions: [{type: Ready, status: "Unknown", reason: NodeStatusUnknown}]}`,
		`status: {conditions: [{type: Ready, status: "True"}, {type: DiskPressure, status: "True"}]}`,
	},
	"Namespace": {`status: {phase: Terminating}`, `status: {phase: Active, conditions: null}`, `spec: {finalizers: []}`},
	"ConfigMap": {`data: {ca.crt: other}`},
	"Service": {
		`spec: {selector: {app: other}}`, `spec: {selector: null}`, `spec: {publishNotReadyAddresses: true}`,
		`spec: {ports: [{name: http, port: 81, protocol: TCP}]}`, `spec: {type: ExternalName}`, `spec: {ipFamilies: [IPv6]}`, `spec: {clusterIP: None}`,
	},
	"EndpointSlice": {`endpoints: null`, `metadata: {labels: null}`, `ports: null`},
	"ReplicaSet": {
		`spec: {replicas: 0}`, `spec: {replicas: 3}`, `spec: {minReadySeconds: 30}`, `status: {replicas: 7}`, `status: {readyReplicas: 1, availableReplicas: 1}`,
		`metadata: {annotations: {deployment.kubernetes.io/revision: "9"}}`, `spec: {selector: {matchLabels: {app: other}}}`,
	},
	"Deployment": {
		`spec: {replicas: 4}`, `spec: {paused: true}`, `spec: {strategy: {type: Recreate, rollingUpdate: null}}`,
		`spec: {template: {spec: {containers: [{name: c, image: v2}]}}}`, `spec: {minReadySeconds: 30}`, `spec: {revisionHistoryLimit: 0}`,
		`status: {replicas: 9}`, `metadata: {annotations: {deployment.kubernetes.io/revision: "9"}}`,
	},
}

var version = regexp.MustCompile(`"(resourceVersion|observedGeneration|generation)":("[0-9]*"|[0-9]+),?`)

// answer is what a pass decides, without what follows from the version of the objects alone.
func answer(t *rapid.T, r reconcile.Reconciler, in reconcile.Input, key reconcile.Key) string {
	result, err := r.Reconcile(in, key)
	var lines []string
	var add func(c reconcile.Request)
	add = func(c reconcile.Request) {
		var body any = c.Object
		if c.Object == nil {
			if err := json.Unmarshal(c.Patch, &body); err != nil && len(c.Patch) > 0 {
				t.Fatalf("%s: patch: %v", c, err)
			}
		}
		raw, err := json.Marshal(body)
		if err != nil {
			t.Fatalf("%s: %v", c, err)
		}
		lines = append(lines, fmt.Sprintf("%s %s %v", c, version.ReplaceAll(raw, nil), ptr.Deref(c.Propagation, "")))
		for _, then := range c.Then {
			add(then)
		}
	}
	for _, c := range result.Requests {
		add(c)
	}
	for _, e := range result.Events {
		lines = append(lines, e.Reason+" "+e.Message)
	}
	return fmt.Sprintf("%s\nnext %v, error %v", strings.Join(lines, "\n"), result.Next, err)
}

// every returns all keys that any of the reconciler's rules names.
func every(r reconcile.Reconciler, s *objects.Snapshot) map[reconcile.Key]bool {
	keys := map[reconcile.Key]bool{}
	for _, k := range r.All(s) {
		keys[k] = true
	}
	for m := range s.Metas().All() {
		for _, k := range r.Keys(objects.Changed{Old: m, New: m}, s) {
			keys[k] = true
		}
		for _, k := range r.Keys(objects.Changed{Old: m}, s) {
			keys[k] = true
		}
	}
	return keys
}

// TestKeysFollowWhatDecides checks of each reconciler that what its decision reads is what
// starts it: whatever change makes a pass over a key decide something else, Keys names
// the key. The scheduler, which has one key, is checked in timonel/sched.
func TestKeysFollowWhatDecides(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		w := NewWorld(t)
		s := New(w, All(t)...)
		s.Health = reconcile.Health{Since: w.Now.Add(-time.Hour), Nodes: map[string]reconcile.NodeHealth{}}
		for i, lost := range []bool{false, rapid.Bool().Draw(t, "lost"), false} {
			name := fmt.Sprintf("n%d", i+1)
			w.Add(Node(name))
			at := w.Now.Add(-time.Minute)
			s.Health.Nodes[name] = reconcile.NodeHealth{Stream: !lost, StreamSince: at, Gossip: map[bool]reconcile.GossipState{true: reconcile.GossipDead}[lost], GossipSince: at}
		}
		for _, doc := range strings.Split(keysWorld, "\n---\n") {
			w.addMap(mapOf([]byte(doc)))
		}
		w.Add(Deployment("web", 2, 1, 1))
		if rapid.Bool().Draw(t, "shop ends") {
			if err := w.Write(context.Background(), reconcile.Request{Verb: reconcile.VerbDelete, Resource: reconcile.NamespacesResource, Name: "shop"}); err != nil {
				t.Fatal(err)
			}
		}
		s.Shuffle = func(n int) int { return rapid.IntRange(0, n-1).Draw(t, "turn") }
		s.Start()
		for range rapid.IntRange(0, 40).Draw(t, "passes") {
			if !s.Step() {
				break
			}
		}
		for range rapid.IntRange(1, 4).Draw(t, "changes") {
			before := w.Snapshot()
			what := w.drawChange(t)
			after := w.Snapshot()
			if before.Revision() == after.Revision() {
				continue
			}
			ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
			changes, err := w.Cache.Changes(ctx, before.Revision())
			cancel()
			if err != nil || changes.Reset {
				t.Fatalf("changes: %v", err)
			}
			for _, r := range s.reconcilers {
				if len(r.All(after)) == 1 && r.All(after)[0] == reconcile.Singleton && r.Name() == corev1.DefaultSchedulerName {
					continue
				}
				named := map[reconcile.Key]bool{}
				for _, c := range changes.Changed {
					for _, k := range r.Keys(c, after) {
						named[k] = true
					}
				}
				keys := every(r, before)
				maps.Copy(keys, every(r, after))
				in := reconcile.Input{Now: w.Now, Seed: 1, Health: s.Health, Kinds: s.Kinds}
				for k := range keys {
					in.Snapshot = before
					was := answer(t, r, in, k)
					in.Snapshot = after
					if is := answer(t, r, in, k); was != is && !named[k] {
						t.Fatalf("%s\nis not followed by %s, whose pass over %s decided before:\n%s\nand after:\n%s", what, r.Name(), k, was, is)
					}
				}
			}
		}
	})
}

// drawChange makes one change and says which.
func (w *World) drawChange(t *rapid.T) string {
	w.mu.Lock()
	keys := slices.Sorted(maps.Keys(w.live))
	w.mu.Unlock()
	key := rapid.SampledFrom(keys).Draw(t, "object")
	w.mu.Lock()
	u := unstructured.Unstructured{Object: w.live[key]}
	gvk := u.GroupVersionKind()
	resource := gvk.GroupVersion().WithResource(resourceName(gvk))
	namespace, name := u.GetNamespace(), u.GetName()
	w.mu.Unlock()
	switch rapid.IntRange(0, 7).Draw(t, "change") {
	case 0:
		policy := rapid.SampledFrom([]metav1.DeletionPropagation{metav1.DeletePropagationBackground, metav1.DeletePropagationForeground, metav1.DeletePropagationOrphan}).Draw(t, "propagation")
		c := reconcile.Request{Verb: reconcile.VerbDelete, Resource: resource, Namespace: namespace, Name: name, Propagation: &policy}
		if rapid.Bool().Draw(t, "at once") {
			now := int64(0)
			c.GracePeriodSeconds = &now
		}
		if err := w.Write(context.Background(), c); err != nil {
			t.Fatal(err)
		}
		return fmt.Sprintf("delete %s, %s", key, policy)
	case 1:
		if gvk.Kind == "Namespace" {
			return "nothing"
		}
		w.mu.Lock()
		copied := mapOf([]byte(mustString(w.live[key])))
		w.mu.Unlock()
		other := unstructured.Unstructured{Object: copied}
		other.SetName(name + "x")
		if rapid.Bool().Draw(t, "same name") {
			other.SetName(name)
			now := int64(0)
			_ = w.Write(context.Background(), reconcile.Request{Verb: reconcile.VerbDelete, Resource: resource, Namespace: namespace, Name: name, GracePeriodSeconds: &now})
		}
		if slices.Contains(w.List(""), strings.TrimSuffix(key, name)+other.GetName()) {
			return "nothing"
		}
		other.SetUID("")
		other.SetResourceVersion("")
		other.SetDeletionTimestamp(nil)
		w.addMap(copied)
		return fmt.Sprintf("create %s like %s", other.GetName(), key)
	}
	edit := rapid.SampledFrom(append(slices.Clone(keysEdits[""]), keysEdits[gvk.Kind]...)).Draw(t, "edit")
	w.Edit(resource, namespace, name, func(obj map[string]any) {
		var patch map[string]any
		if err := yaml.Unmarshal([]byte(edit), &patch); err != nil {
			t.Fatal(err)
		}
		MergeJSON(obj, patch)
	})
	return fmt.Sprintf("edit %s: %s", key, edit)
}
