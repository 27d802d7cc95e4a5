package storytest

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/strategicpatch"
	"k8s.io/client-go/kubernetes/scheme"

	"timonel/reconcile"
	"timonel/reconcile/workload/job"
	"timonel/state"
	"timonel/state/objects"
)

// World is an API server in memory, as far as reconcilers can tell: objects in a
// state.Store, with the API's rules for versions, generations, graceful deletion
// and finalizers, but without validation and defaults.
type World struct {
	t     T
	store *state.Store
	Cache *objects.Cache

	mu     sync.Mutex
	Now    time.Time
	uids   int
	live   map[string]map[string]any     // by storage key
	Refuse func(reconcile.Request) error // makes the API refuse a change
	// Did is called after each change that was made, with what the object was.
	Did func(c reconcile.Request, was map[string]any)
	// UID gives a new object its uid; nil for a number.
	UID    func(obj map[string]any) types.UID
	writes []string
}

// T is what tests and rapid's checks have in common.
type T interface {
	Helper()
	Fatalf(format string, args ...any)
	Cleanup(func())
}

// worldKinds are the kinds the world serves and where it keeps them.
var worldKinds = map[schema.GroupVersionKind]string{
	reconcile.PodKind:                                                                "pods",
	reconcile.NodeKind:                                                               "minions",
	reconcile.NamespaceKind:                                                          "namespaces",
	reconcile.ReplicaSetKind:                                                         "replicasets",
	reconcile.DeploymentKind:                                                         "deployments",
	corev1.SchemeGroupVersion.WithKind("ServiceAccount"):                             "serviceaccounts",
	corev1.SchemeGroupVersion.WithKind("ConfigMap"):                                  "configmaps",
	corev1.SchemeGroupVersion.WithKind("Secret"):                                     "secrets",
	corev1.SchemeGroupVersion.WithKind("Endpoints"):                                  "services/endpoints",
	corev1.SchemeGroupVersion.WithKind("Event"):                                      "events",
	{Group: "ships.example.org", Version: "v1", Kind: "Boat"}:                        "ships.example.org/boats",
	{Group: "ships.example.org", Version: "v1", Kind: "Fleet"}:                       "ships.example.org/fleets",
	{Group: "apiextensions.k8s.io", Version: "v1", Kind: "CustomResourceDefinition"}: "apiextensions.k8s.io/customresourcedefinitions",
	{Group: "discovery.k8s.io", Version: "v1", Kind: "EndpointSlice"}:                "endpointslices",
	{Group: "coordination.k8s.io", Version: "v1", Kind: "Lease"}:                     "leases",
	corev1.SchemeGroupVersion.WithKind("Service"):                                    "services/specs",
	reconcile.DaemonSetKind:                                                          "daemonsets",
	reconcile.StatefulSetKind:                                                        "statefulsets",
	reconcile.ControllerRevisionKind:                                                 "controllerrevisions",
	reconcile.ReplicationControllerKind:                                              "controllers",
	reconcile.PVCKind:                                                                "persistentvolumeclaims",
	job.Kind:                                                                         "jobs",
	job.CronJobKind:                                                                  "cronjobs",
	{Group: "policy", Version: "v1", Kind: "PodDisruptionBudget"}:                    "poddisruptionbudgets",
	reconcile.PVKind:                                                                 "persistentvolumes",
	{Group: "storage.k8s.io", Version: "v1", Kind: "StorageClass"}:                   "storageclasses",
	{Group: "resource.k8s.io", Version: "v1", Kind: "DeviceClass"}:                   "deviceclasses",
	{Group: "resource.k8s.io", Version: "v1", Kind: "ResourceClaim"}:                 "resourceclaims",
	{Group: "resource.k8s.io", Version: "v1", Kind: "ResourceSlice"}:                 "resourceslices",
	{Group: "storage.k8s.io", Version: "v1", Kind: "VolumeAttributesClass"}:          "volumeattributesclasses",
}

var clusterKinds = map[string]bool{
	"Node": true, "Namespace": true, "Fleet": true, "CustomResourceDefinition": true,
	"PersistentVolume": true, "StorageClass": true, "DeviceClass": true, "ResourceSlice": true, "VolumeAttributesClass": true,
}

// resourceName is the plural in the API.
func resourceName(gvk schema.GroupVersionKind) string {
	name := strings.ToLower(gvk.Kind)
	switch {
	case strings.HasSuffix(name, "ss"):
		return name + "es"
	case strings.HasSuffix(name, "s"): // Endpoints is its own plural
		return name
	}
	return name + "s"
}

func Serves() reconcile.Kinds {
	kinds := reconcile.Kinds{}
	for gvk := range worldKinds {
		kinds[gvk.GroupKind()] = reconcile.Kind{
			Resource:   gvk.GroupVersion().WithResource(resourceName(gvk)),
			Namespaced: !clusterKinds[gvk.Kind],
		}
	}
	return kinds
}

func NewWorld(t T) *World {
	store := state.New(state.Options{})
	w := &World{
		t: t, store: store, Cache: objects.NewCache(store),
		Now: time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC), live: map[string]map[string]any{},
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		if err := w.Cache.Run(ctx); ctx.Err() == nil {
			panic(fmt.Sprintf("object cache: %v", err))
		}
	}()
	t.Cleanup(func() { cancel(); <-done })
	return w
}

// Writes are the changes that were made, as they read.
func (w *World) Writes() []string {
	w.mu.Lock()
	defer w.mu.Unlock()
	return slices.Clone(w.writes)
}

func (w *World) Revision() int64 { return w.store.View().Revision() }

// Snapshot returns a snapshot with everything that was written.
func (w *World) Snapshot() *objects.Snapshot {
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	if err := w.Cache.WaitRevision(ctx, w.Revision()); err != nil {
		w.t.Fatalf("the cache does not follow: %v", err)
	}
	return w.Cache.Snapshot()
}

func storageKey(prefix, namespace, name string) string {
	if namespace != "" {
		name = namespace + "/" + name
	}
	return objects.DefaultPrefix + prefix + "/" + name
}

func (w *World) keyOf(r schema.GroupVersionResource, namespace, name string) (string, schema.GroupVersionKind) {
	for gvk, prefix := range worldKinds {
		if gvk.Group == r.Group && resourceName(gvk) == r.Resource {
			if clusterKinds[gvk.Kind] {
				namespace = ""
			}
			return storageKey(prefix, namespace, name), gvk
		}
	}
	w.t.Fatalf("the world has no %s", r)
	return "", schema.GroupVersionKind{}
}

// put stores an object, or removes it when its time has come.
func (w *World) put(key string, obj map[string]any) {
	u := unstructured.Unstructured{Object: obj}
	change := state.Change{Key: key}
	if w.finished(&u) {
		delete(w.live, key)
		change.Delete = true
	} else {
		unstructured.RemoveNestedField(obj, "metadata", "resourceVersion")
		change.Value, _ = json.Marshal(obj) // made of JSON
	}
	txn := state.Txn{Changes: []state.Change{change}}
	r := w.store.ApplyBatch([]state.Entry{{Index: uint64(w.Revision()), Command: txn.Marshal()}})[0]
	if r.Err != nil {
		w.t.Fatalf("put %s: %v", key, r.Err)
	}
	if !change.Delete {
		u.SetResourceVersion(fmt.Sprint(r.Revision))
		w.live[key] = obj
	}
}

// finished says whether an object that is being deleted has nothing left to wait for.
func (w *World) finished(u *unstructured.Unstructured) bool {
	if u.GetDeletionTimestamp() == nil || len(u.GetFinalizers()) > 0 {
		return false
	}
	switch u.GetKind() {
	case "Namespace":
		finalizers, _, _ := unstructured.NestedSlice(u.Object, "spec", "finalizers")
		return len(finalizers) == 0
	case "Pod":
		grace := u.GetDeletionGracePeriodSeconds()
		return grace == nil || *grace == 0
	}
	return true
}

func toMap(obj any) map[string]any {
	raw, err := json.Marshal(obj)
	if err != nil {
		panic(err)
	}
	var out map[string]any
	if err := json.Unmarshal(raw, &out); err != nil {
		panic(err)
	}
	return out
}

// Write implements Writer.
func (w *World) Write(_ context.Context, c reconcile.Request) error {
	was, err := w.write(c)
	if err == nil && w.Did != nil {
		w.Did(c, was)
	}
	return err
}

// write makes a change and returns what the object was.
func (w *World) write(c reconcile.Request) (map[string]any, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.Refuse != nil {
		if err := w.Refuse(c); err != nil {
			return nil, err
		}
	}
	if c.Resource != reconcile.EventsResource {
		w.writes = append(w.writes, c.String())
	}
	key, gvk := w.keyOf(c.Resource, c.Namespace, c.Name)
	gr := c.Resource.GroupResource()
	old, exists := w.live[key]
	if c.Verb == reconcile.VerbCreate && c.Subresource == "" {
		if exists {
			return nil, apierrors.NewAlreadyExists(gr, c.Name)
		}
		obj := toMap(c.Object)
		obj["apiVersion"], obj["kind"] = gvk.GroupVersion().String(), gvk.Kind
		w.create(key, obj)
		return nil, nil
	}
	if !exists {
		return nil, apierrors.NewNotFound(gr, c.Name)
	}
	was := unstructured.Unstructured{Object: old}
	conflict := func(uid types.UID, version string) error {
		if uid != "" && uid != was.GetUID() || version != "" && version != was.GetResourceVersion() {
			return apierrors.NewConflict(gr, c.Name, fmt.Errorf("the object is another by now"))
		}
		return nil
	}

	switch c.Verb {
	case reconcile.VerbCreate: // a binding
		b := c.Object.(*corev1.Binding)
		if node, _, _ := unstructured.NestedString(old, "spec", "nodeName"); node != "" || was.GetUID() != b.UID {
			return nil, apierrors.NewConflict(gr, c.Name, fmt.Errorf("already bound"))
		}
		obj := runtime.DeepCopyJSON(old)
		_ = unstructured.SetNestedField(obj, b.Target.Name, "spec", "nodeName")
		w.put(key, obj)
	case reconcile.VerbUpdate:
		m := reconcile.Accessor(c.Object)
		if err := conflict(m.GetUID(), m.GetResourceVersion()); err != nil {
			return nil, err
		}
		w.replace(key, old, toMap(c.Object), c.Subresource)
	case reconcile.VerbPatch:
		var patch metav1.PartialObjectMetadata
		if err := json.Unmarshal(c.Patch, &patch); err != nil {
			return nil, apierrors.NewBadRequest(err.Error())
		}
		if err := conflict(patch.UID, patch.ResourceVersion); err != nil {
			return nil, err
		}
		var obj map[string]any
		if c.PatchType == types.StrategicMergePatchType {
			typed, err := scheme.Scheme.New(gvk)
			if err != nil {
				return nil, apierrors.NewBadRequest(err.Error())
			}
			raw, _ := json.Marshal(old)
			if raw, err = strategicpatch.StrategicMergePatch(raw, c.Patch, typed); err != nil {
				return nil, apierrors.NewBadRequest(err.Error())
			}
			_ = json.Unmarshal(raw, &obj)
		} else {
			var p map[string]any
			_ = json.Unmarshal(c.Patch, &p)
			obj, _ = MergeJSON(runtime.DeepCopyJSON(old), p).(map[string]any)
		}
		w.replace(key, old, obj, c.Subresource)
	case reconcile.VerbDelete:
		if p := c.Preconditions; p != nil {
			var uid types.UID
			var version string
			if p.UID != nil {
				uid = *p.UID
			}
			if p.ResourceVersion != nil {
				version = *p.ResourceVersion
			}
			if err := conflict(uid, version); err != nil {
				return nil, err
			}
		}
		w.delete(key, old, c)
	}
	return old, nil
}

func (w *World) create(key string, obj map[string]any) {
	w.uids++
	u := unstructured.Unstructured{Object: obj}
	if u.GetUID() == "" {
		if w.UID != nil {
			u.SetUID(w.UID(obj))
		} else {
			u.SetUID(types.UID(fmt.Sprintf("uid-%d", w.uids)))
		}
	}
	if created := u.GetCreationTimestamp(); created.IsZero() {
		u.SetCreationTimestamp(metav1.NewTime(w.Now))
	}
	if u.GetKind() != "Pod" {
		u.SetGeneration(max(1, u.GetGeneration()))
	}
	switch u.GetKind() {
	case "Namespace":
		if _, ok, _ := unstructured.NestedFieldNoCopy(obj, "spec", "finalizers"); !ok {
			_ = unstructured.SetNestedStringSlice(obj, []string{"kubernetes"}, "spec", "finalizers")
		}
	case "PersistentVolume", "PersistentVolumeClaim":
		if _, ok, _ := unstructured.NestedFieldNoCopy(obj, "status", "phase"); !ok {
			_ = unstructured.SetNestedField(obj, "Pending", "status", "phase")
		}
	case "Pod":
		if _, ok, _ := unstructured.NestedFieldNoCopy(obj, "status", "phase"); !ok {
			_ = unstructured.SetNestedField(obj, "Pending", "status", "phase")
		}
		if _, ok, _ := unstructured.NestedFieldNoCopy(obj, "spec", "schedulerName"); !ok {
			_ = unstructured.SetNestedField(obj, corev1.DefaultSchedulerName, "spec", "schedulerName")
		}
	}
	w.put(key, obj)
}

// replace stores the part of obj that the subresource may change.
func (w *World) replace(key string, old, obj map[string]any, subresource string) {
	next := runtime.DeepCopyJSON(old)
	if subresource == "status" {
		next["status"] = obj["status"]
		u, o := unstructured.Unstructured{Object: next}, unstructured.Unstructured{Object: obj}
		u.SetAnnotations(o.GetAnnotations())
	} else {
		u, o := unstructured.Unstructured{Object: next}, unstructured.Unstructured{Object: obj}
		for k, v := range obj {
			if k != "metadata" && k != "status" && k != "apiVersion" && k != "kind" {
				if k == "spec" && mustString(v) != mustString(old["spec"]) {
					u.SetGeneration(u.GetGeneration() + 1)
				}
				next[k] = v
			}
		}
		u.SetLabels(o.GetLabels())
		u.SetAnnotations(o.GetAnnotations())
		u.SetFinalizers(o.GetFinalizers())
		u.SetOwnerReferences(o.GetOwnerReferences())
		if len(o.GetOwnerReferences()) == 0 {
			unstructured.RemoveNestedField(next, "metadata", "ownerReferences")
		}
	}
	if mustString(next) != mustString(old) || w.finished(&unstructured.Unstructured{Object: next}) {
		w.put(key, next)
	}
}

func (w *World) delete(key string, old map[string]any, c reconcile.Request) {
	obj := runtime.DeepCopyJSON(old)
	u := unstructured.Unstructured{Object: obj}
	finalizers := slices.DeleteFunc(u.GetFinalizers(), func(f string) bool {
		return c.Propagation != nil && (f == metav1.FinalizerOrphanDependents || f == metav1.FinalizerDeleteDependents)
	})
	if c.Propagation != nil {
		switch *c.Propagation {
		case metav1.DeletePropagationForeground:
			finalizers = append(finalizers, metav1.FinalizerDeleteDependents)
		case metav1.DeletePropagationOrphan:
			finalizers = append(finalizers, metav1.FinalizerOrphanDependents)
		}
	}
	u.SetFinalizers(finalizers)
	if u.GetDeletionTimestamp() == nil {
		at := metav1.NewTime(w.Now)
		u.SetDeletionTimestamp(&at)
		u.SetGeneration(u.GetGeneration() + 1)
		if u.GetKind() == "Pod" {
			var grace int64
			if node, _, _ := unstructured.NestedString(obj, "spec", "nodeName"); node != "" {
				grace = 30
			}
			u.SetDeletionGracePeriodSeconds(&grace)
		}
	}
	if c.GracePeriodSeconds != nil && u.GetKind() == "Pod" {
		u.SetDeletionGracePeriodSeconds(c.GracePeriodSeconds)
	}
	w.put(key, obj)
}

func mustString(v any) string {
	raw, _ := json.Marshal(v)
	return string(raw)
}

// MergeJSON applies a JSON merge patch.
func MergeJSON(old, patch any) any {
	p, ok := patch.(map[string]any)
	if !ok {
		return patch
	}
	o, ok := old.(map[string]any)
	if !ok {
		o = map[string]any{}
	}
	for k, v := range p {
		if v == nil {
			delete(o, k)
		} else {
			o[k] = MergeJSON(o[k], v)
		}
	}
	return o
}

// Add stores an object as given, with what the API adds to a new one.
func (w *World) Add(obj runtime.Object) {
	w.t.Helper()
	m := toMap(obj)
	if kinds, _, err := scheme.Scheme.ObjectKinds(obj); err == nil {
		m["apiVersion"], m["kind"] = kinds[0].GroupVersion().String(), kinds[0].Kind
	}
	w.addMap(m)
}

func (w *World) addMap(m map[string]any) {
	w.t.Helper()
	u := unstructured.Unstructured{Object: m}
	prefix, ok := worldKinds[u.GroupVersionKind()]
	if !ok {
		w.t.Fatalf("the world has no %s", u.GroupVersionKind())
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.create(storageKey(prefix, u.GetNamespace(), u.GetName()), m)
}

// Edit changes a stored object as its agent or its user would.
func (w *World) Edit(r schema.GroupVersionResource, namespace, name string, change func(map[string]any)) {
	w.t.Helper()
	w.mu.Lock()
	defer w.mu.Unlock()
	key, _ := w.keyOf(r, namespace, name)
	old, ok := w.live[key]
	if !ok {
		w.t.Fatalf("no %s %s/%s to edit", r.Resource, namespace, name)
	}
	obj := runtime.DeepCopyJSON(old)
	change(obj)
	if mustString(obj["spec"]) != mustString(old["spec"]) {
		u := unstructured.Unstructured{Object: obj}
		u.SetGeneration(u.GetGeneration() + 1)
	}
	w.put(key, obj)
}

// SetStatus merges into an object's status.
func (w *World) SetStatus(r schema.GroupVersionResource, namespace, name string, status map[string]any) {
	w.Edit(r, namespace, name, func(obj map[string]any) {
		obj["status"] = MergeJSON(obj["status"], toMap(status))
	})
}

// Find returns a stored object, which must not be changed, or nil.
func (w *World) Find(r schema.GroupVersionResource, namespace, name string) map[string]any {
	w.mu.Lock()
	defer w.mu.Unlock()
	key, _ := w.keyOf(r, namespace, name)
	return w.live[key]
}

// All returns the stored objects of a resource in a namespace, "" for all, in order of
// name. They must not be changed.
func (w *World) All(r schema.GroupVersionResource, namespace string) []map[string]any {
	w.mu.Lock()
	defer w.mu.Unlock()
	prefix, _ := w.keyOf(r, namespace, "")
	var out []map[string]any
	for _, k := range slices.Sorted(maps.Keys(w.live)) {
		if strings.HasPrefix(k, prefix) {
			out = append(out, w.live[k])
		}
	}
	return out
}

// SetNow sets the time while others write.
func (w *World) SetNow(now time.Time) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.Now = now
}

// List returns the storage keys with a prefix, sorted.
func (w *World) List(prefix string) []string {
	w.mu.Lock()
	defer w.mu.Unlock()
	var out []string
	for _, k := range slices.Sorted(maps.Keys(w.live)) {
		if strings.HasPrefix(k, objects.DefaultPrefix+prefix) {
			out = append(out, k)
		}
	}
	return out
}

// RunPod makes a bound pod run, ready, as an agent reports it.
func (w *World) RunPod(namespace, name string) {
	at := w.Now.Format(time.RFC3339)
	w.SetStatus(reconcile.PodsResource, namespace, name, map[string]any{
		"phase":      "Running",
		"conditions": []any{map[string]any{"type": "Ready", "status": "True", "lastTransitionTime": at}},
	})
}

// FinishPod makes a pod end by itself, as an agent reports it.
func (w *World) FinishPod(namespace, name string, phase corev1.PodPhase, exit int) {
	at := w.Now.Format(time.RFC3339)
	w.SetStatus(reconcile.PodsResource, namespace, name, map[string]any{
		"phase":      string(phase),
		"conditions": []any{map[string]any{"type": "Ready", "status": "False", "lastTransitionTime": at}},
		"containerStatuses": []any{map[string]any{"name": "c", "state": map[string]any{
			"terminated": map[string]any{"exitCode": exit, "finishedAt": at},
		}}},
	})
}

// EndPod removes a terminating pod, as an agent does when its containers have stopped.
func (w *World) EndPod(namespace, name string) {
	now := int64(0)
	if err := w.Write(context.Background(), reconcile.Request{Verb: reconcile.VerbDelete, Resource: reconcile.PodsResource, Namespace: namespace, Name: name, GracePeriodSeconds: &now}); err != nil {
		w.t.Fatalf("end pod %s/%s: %v", namespace, name, err)
	}
}
