package reconcile

import (
	"encoding/json"
	"fmt"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
)

// Verb is what a Request does.
type Verb string

// The verbs, named as in the API.
const (
	VerbCreate           Verb = "create"
	VerbUpdate           Verb = "update"
	VerbPatch            Verb = "patch"
	VerbDelete           Verb = "delete"
	VerbDeleteCollection Verb = "deletecollection"
)

// Request is one request to the API. Its fields are those of the request; which
// of them apply depends on the verb.
type Request struct {
	Verb     Verb
	Resource schema.GroupVersionResource
	// Namespace is empty for resources of the cluster.
	Namespace, Name string
	// Subresource is for example "status" or "binding".
	Subresource string

	// Object is the body of a create and of an update. An update carries the
	// resourceVersion of the snapshot, so that it fails with a conflict when
	// somebody was faster.
	Object runtime.Object

	// PatchType and Patch are the body of a patch.
	PatchType types.PatchType
	Patch     []byte

	// Preconditions, Propagation and GracePeriodSeconds are options of a delete.
	Preconditions      *metav1.Preconditions
	Propagation        *metav1.DeletionPropagation
	GracePeriodSeconds *int64

	// SlowStart says that a refusal of this request means one of all alike. Those of a
	// pass are made in batches of one, two, four and so on, and what is left when one
	// was refused is not made.
	SlowStart bool

	// Then are made one after another once this change has succeeded.
	Then []Request
	// Event is recorded once this change has succeeded.
	Event *Event
	// FailEvent is recorded when the API refuses this change (conflicts and
	// objects that are gone do not count). The error is added to its message.
	FailEvent *Event
}

// String renders the change for logs and test stories.
func (c Request) String() string {
	name := c.Name
	if c.Namespace != "" {
		name = c.Namespace + "/" + name
	}
	resource := c.Resource.Resource
	if c.Subresource != "" {
		resource += "/" + c.Subresource
	}
	return fmt.Sprintf("%s %s %s", c.Verb, resource, name)
}

// Event is something worth telling the users of an object.
type Event struct {
	Object corev1.ObjectReference
	// Type is corev1.EventTypeNormal or corev1.EventTypeWarning.
	Type    string
	Reason  string
	Message string
	// Component is who reports it. Default: the reconciler.
	Component string
}

// The resources that reconcilers write.
var (
	PodsResource            = corev1.SchemeGroupVersion.WithResource("pods")
	NodesResource           = corev1.SchemeGroupVersion.WithResource("nodes")
	NamespacesResource      = corev1.SchemeGroupVersion.WithResource("namespaces")
	ServiceAccountsResource = corev1.SchemeGroupVersion.WithResource("serviceaccounts")
	ConfigMapsResource      = corev1.SchemeGroupVersion.WithResource("configmaps")
	ServicesResource        = corev1.SchemeGroupVersion.WithResource("services")
	ReplicaSetsResource     = schema.GroupVersionResource{Group: "apps", Version: "v1", Resource: "replicasets"}
	DeploymentsResource     = schema.GroupVersionResource{Group: "apps", Version: "v1", Resource: "deployments"}

	DaemonSetsResource             = schema.GroupVersionResource{Group: "apps", Version: "v1", Resource: "daemonsets"}
	StatefulSetsResource           = schema.GroupVersionResource{Group: "apps", Version: "v1", Resource: "statefulsets"}
	ControllerRevisionsResource    = schema.GroupVersionResource{Group: "apps", Version: "v1", Resource: "controllerrevisions"}
	ReplicationControllersResource = corev1.SchemeGroupVersion.WithResource("replicationcontrollers")
	PVCsResource                   = corev1.SchemeGroupVersion.WithResource("persistentvolumeclaims")
	PVsResource                    = corev1.SchemeGroupVersion.WithResource("persistentvolumes")
)

// The kinds that reconcilers own or refer to in events.
var (
	PodKind        = corev1.SchemeGroupVersion.WithKind("Pod")
	NodeKind       = corev1.SchemeGroupVersion.WithKind("Node")
	NamespaceKind  = corev1.SchemeGroupVersion.WithKind("Namespace")
	ReplicaSetKind = schema.GroupVersionKind{Group: "apps", Version: "v1", Kind: "ReplicaSet"}
	DeploymentKind = schema.GroupVersionKind{Group: "apps", Version: "v1", Kind: "Deployment"}

	DaemonSetKind             = schema.GroupVersionKind{Group: "apps", Version: "v1", Kind: "DaemonSet"}
	StatefulSetKind           = schema.GroupVersionKind{Group: "apps", Version: "v1", Kind: "StatefulSet"}
	ControllerRevisionKind    = schema.GroupVersionKind{Group: "apps", Version: "v1", Kind: "ControllerRevision"}
	ReplicationControllerKind = corev1.SchemeGroupVersion.WithKind("ReplicationController")
	PVCKind                   = corev1.SchemeGroupVersion.WithKind("PersistentVolumeClaim")
	PVKind                    = corev1.SchemeGroupVersion.WithKind("PersistentVolume")
)

// Object is an object with metadata, as the generated API types are.
type Object interface {
	runtime.Object
	metav1.Object
}

// Create returns the change that creates obj.
func Create(resource schema.GroupVersionResource, obj Object) Request {
	return Request{Verb: VerbCreate, Resource: resource, Namespace: obj.GetNamespace(), Name: obj.GetName(), Object: obj}
}

// Update returns the change that replaces obj, if nobody has changed it since the snapshot.
func Update(resource schema.GroupVersionResource, obj Object) Request {
	return Request{Verb: VerbUpdate, Resource: resource, Namespace: obj.GetNamespace(), Name: obj.GetName(), Object: obj}
}

// UpdateStatus is update for the status subresource.
func UpdateStatus(resource schema.GroupVersionResource, obj Object) Request {
	c := Update(resource, obj)
	c.Subresource = "status"
	return c
}

// Delete returns the change that deletes obj if it is still the object of the snapshot.
func Delete(resource schema.GroupVersionResource, obj metav1.Object) Request {
	uid := obj.GetUID()
	return Request{
		Verb: VerbDelete, Resource: resource, Namespace: obj.GetNamespace(), Name: obj.GetName(),
		Preconditions: &metav1.Preconditions{UID: &uid},
	}
}

// MergePatch returns a JSON merge patch of obj. body must hold what json can encode.
func MergePatch(resource schema.GroupVersionResource, obj metav1.Object, subresource string, body map[string]any) Request {
	return Request{
		Verb: VerbPatch, Resource: resource, Namespace: obj.GetNamespace(), Name: obj.GetName(), Subresource: subresource,
		PatchType: types.MergePatchType, Patch: mustJSON(body),
	}
}

// Pinned returns metadata for a merge patch that applies to this version of obj only.
func Pinned(obj metav1.Object) map[string]any {
	return map[string]any{"uid": string(obj.GetUID()), "resourceVersion": obj.GetResourceVersion()}
}

// mustJSON encodes what this package itself built out of encodable parts.
func mustJSON(v any) []byte {
	out, err := json.Marshal(v)
	if err != nil {
		panic(fmt.Sprintf("reconcile: encode patch: %v", err))
	}
	return out
}

// Reference returns a reference to obj for events.
func Reference(gvk schema.GroupVersionKind, obj metav1.Object) corev1.ObjectReference {
	apiVersion, kind := gvk.ToAPIVersionAndKind()
	return corev1.ObjectReference{
		APIVersion: apiVersion, Kind: kind,
		Namespace: obj.GetNamespace(), Name: obj.GetName(),
		UID: obj.GetUID(), ResourceVersion: obj.GetResourceVersion(),
	}
}

// NewEvent returns an event about obj.
func NewEvent(gvk schema.GroupVersionKind, obj metav1.Object, kind, reason, format string, args ...any) *Event {
	return &Event{Object: Reference(gvk, obj), Type: kind, Reason: reason, Message: fmt.Sprintf(format, args...)}
}

// Accessor returns the metadata of a change's object, or nil.
func Accessor(obj runtime.Object) metav1.Object {
	m, err := meta.Accessor(obj)
	if err != nil {
		return nil
	}
	return m
}
