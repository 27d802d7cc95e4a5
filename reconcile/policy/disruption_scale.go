package policy

import (
	"encoding/json"
	"fmt"
	"slices"
	"strings"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes/scheme"

	"timonel/reconcile"
	"timonel/state/objects"
)

// definitionKind is the kind of the definitions of custom resources.
var definitionKind = schema.GroupKind{Group: "apiextensions.k8s.io", Kind: "CustomResourceDefinition"}

// appsGroups are the groups that the kinds of apps are or were served in.
var appsGroups = []string{"apps", "extensions"}

// scaleOf returns the scale that a pod's controller asks for, and the UID of what it
// is the scale of: the Deployment's for a ReplicaSet that a Deployment controls. The
// UID is empty when the controller is not there. A controller without a scale is an
// error.
func scaleOf(in reconcile.Input, ref *metav1.OwnerReference, namespace string) (types.UID, int32, error) {
	gv, err := schema.ParseGroupVersion(ref.APIVersion)
	if err != nil {
		return "", 0, err
	}
	s, inApps := in.Snapshot, slices.Contains(appsGroups, gv.Group)
	switch {
	case inApps && ref.Kind == reconcile.ReplicaSetKind.Kind:
		rs, ok := s.ReplicaSets().Get(namespace, ref.Name)
		if !ok || rs.UID != ref.UID {
			return "", 0, nil
		}
		if of := metav1.GetControllerOfNoCopy(rs); of != nil && of.Kind == reconcile.DeploymentKind.Kind &&
			slices.Contains(appsGroups, schema.FromAPIVersionAndKind(of.APIVersion, of.Kind).Group) {
			if d, ok := s.Deployments().Get(namespace, of.Name); ok && d.UID == of.UID {
				return d.UID, replicas(d.Spec.Replicas), nil
			}
		}
		return rs.UID, replicas(rs.Spec.Replicas), nil
	case inApps && ref.Kind == reconcile.DeploymentKind.Kind:
		d, ok := s.Deployments().Get(namespace, ref.Name)
		if !ok || d.UID != ref.UID {
			return "", 0, nil
		}
		return d.UID, replicas(d.Spec.Replicas), nil
	case inApps && ref.Kind == "StatefulSet":
		set, ok := s.StatefulSets().Get(namespace, ref.Name)
		if !ok || set.UID != ref.UID {
			return "", 0, nil
		}
		return set.UID, replicas(set.Spec.Replicas), nil
	case gv.Group == "" && ref.Kind == "ReplicationController":
		rc, ok := s.ReplicationControllers().Get(namespace, ref.Name)
		if !ok || rc.UID != ref.UID {
			return "", 0, nil
		}
		return rc.UID, replicas(rc.Spec.Replicas), nil
	}
	return customScale(in, gv.WithKind(ref.Kind), ref, namespace)
}

// replicas is what the API's default makes of no number.
func replicas(n *int32) int32 {
	if n == nil {
		return 1
	}
	return *n
}

// customScale reads the scale of a custom resource where its definition says that it
// is. The scale of what an aggregated API serves is not in the state.
func customScale(in reconcile.Input, gvk schema.GroupVersionKind, ref *metav1.OwnerReference, namespace string) (types.UID, int32, error) {
	kind, ok := in.Kinds.Lookup(gvk.GroupKind())
	if !ok {
		return "", 0, &meta.NoKindMatchError{GroupKind: gvk.GroupKind(), SearchedVersions: []string{gvk.Version}}
	}
	resource := kind.Resource.GroupResource()
	definition, ok := in.Snapshot.Metas().Get(objects.DefaultPrefix + "apiextensions.k8s.io/customresourcedefinitions/" + resource.String())
	if !ok && !scheme.Scheme.IsGroupRegistered(gvk.Group) {
		return "", 0, fmt.Errorf("%s is served by an aggregated API, whose scales cannot be known here: set \".spec.minAvailable\" to an integer value", resource)
	}
	if !ok {
		return "", 0, fmt.Errorf("%s does not implement the scale subresource", resource)
	}
	owner, found := in.Snapshot.Metas().ByUID(ref.UID)
	found = found && owner.Name == ref.Name && owner.Namespace == namespace && owner.GVK.GroupKind() == gvk.GroupKind()
	version := gvk.Version
	if found {
		version = owner.GVK.Version // the paths are those of the version that is stored
	}
	path, err := scalePath(definition, version)
	if err != nil {
		return "", 0, err
	}
	if path == "" {
		return "", 0, fmt.Errorf("%s does not implement the scale subresource", resource)
	}
	if !found {
		return "", 0, nil
	}
	n, err := numberAt(owner.JSON, path)
	if err != nil {
		return "", 0, fmt.Errorf("%s %s/%s: %w", resource, namespace, ref.Name, err)
	}
	return owner.UID, n, nil
}

// scalePath returns where a custom resource of a version has its number of replicas,
// or "" if it has no scale. A version without one takes what another has, as all
// versions of most definitions have the same fields.
func scalePath(definition *objects.Meta, version string) (string, error) {
	var d struct {
		Spec struct {
			Versions []struct {
				Name         string
				Subresources struct {
					Scale struct{ SpecReplicasPath string }
				}
			}
		}
	}
	if err := json.Unmarshal(definition.JSON, &d); err != nil {
		return "", fmt.Errorf("read the CustomResourceDefinition %s: %w", definition.Name, err)
	}
	var path string
	for _, v := range d.Spec.Versions {
		if p := v.Subresources.Scale.SpecReplicasPath; p != "" && (path == "" || v.Name == version) {
			path = p
		}
	}
	return path, nil
}

// numberAt returns the number at a JSON path of fields alone, such as .spec.replicas.
func numberAt(raw []byte, path string) (int32, error) {
	for _, field := range strings.Split(strings.TrimPrefix(path, "."), ".") {
		var fields map[string]json.RawMessage
		if err := json.Unmarshal(raw, &fields); err != nil {
			return 0, fmt.Errorf("the spec replicas field %q: %w", path, err)
		}
		var ok bool
		if raw, ok = fields[field]; !ok {
			return 0, fmt.Errorf("the spec replicas field %q does not exist", path)
		}
	}
	var n int32
	if err := json.Unmarshal(raw, &n); err != nil {
		return 0, fmt.Errorf("the spec replicas field %q: %w", path, err)
	}
	return n, nil
}

// scaled says whether a changed object is of a kind that controls pods by a scale, and
// whether that may have changed.
func scaled(c objects.Changed) bool {
	m := c.Meta()
	switch m.Object.(type) {
	case nil:
		return m.JSON != nil
	case *appsv1.ReplicaSet, *appsv1.Deployment, *appsv1.StatefulSet, *corev1.ReplicationController:
		return c.Old == nil || c.New == nil || replicasOf(c.Old) != replicasOf(c.New)
	}
	return false
}

func replicasOf(m *objects.Meta) int32 {
	switch o := m.Object.(type) {
	case *appsv1.ReplicaSet:
		return replicas(o.Spec.Replicas)
	case *appsv1.Deployment:
		return replicas(o.Spec.Replicas)
	case *appsv1.StatefulSet:
		return replicas(o.Spec.Replicas)
	case *corev1.ReplicationController:
		return replicas(o.Spec.Replicas)
	}
	return 0
}

// ownerKeys returns the budgets of the pods that an object owns, directly or by its
// ReplicaSets. One pod of each owner tells.
func ownerKeys(owner metav1.Object, s *objects.Snapshot) []reconcile.Key {
	var keys []reconcile.Key
	for m := range s.OwnedBy(owner.GetUID()) {
		switch o := m.Object.(type) {
		case *appsv1.ReplicaSet:
			keys = append(keys, ownerKeys(o, s)...)
		case *corev1.Pod:
			for _, pdb := range budgetsOf(s, o) {
				keys = append(keys, reconcile.KeyOf(budgetKind, pdb))
			}
			return keys
		}
	}
	return keys
}
