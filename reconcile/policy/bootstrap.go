package policy

import (
	"maps"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"timonel/reconcile"
	"timonel/state/objects"
)

const (
	defaultServiceAccount = "default"
	rootCAConfigMap       = "kube-root-ca.crt"
	rootCAKey             = "ca.crt"

	rootCADescription     = "Contains a CA bundle that can be used to verify the kube-apiserver when using internal endpoints such as the internal service IP or kubernetes.default.svc. " + "No other usage is guaranteed across distributions of Kubernetes clusters."
	descriptionAnnotation = "kubernetes.io/description"
)

// NamespaceDefaults gives each namespace what every pod in it relies on: the
// ServiceAccount "default", and a ConfigMap with the cluster's root CA.
type NamespaceDefaults struct {
	// RootCA is the CA bundle in PEM. Without one no ConfigMap is kept.
	RootCA []byte
}

// Name implements Reconciler.
func (NamespaceDefaults) Name() string { return "namespace-defaults-controller" }

// All implements Reconciler.
func (NamespaceDefaults) All(s *objects.Snapshot) []reconcile.Key {
	return reconcile.KeysOf(reconcile.NamespaceKind, s.Namespaces().All())
}

// Keys implements Reconciler.
func (NamespaceDefaults) Keys(c objects.Changed, _ *objects.Snapshot) []reconcile.Key {
	m := c.Meta()
	switch {
	case m.GVK == reconcile.NamespaceKind:
		return []reconcile.Key{reconcile.NewKey(reconcile.NamespaceKind, "", m.Name)}
	case m.GVK.Group != "":
		return nil
	case m.GVK.Kind == "ServiceAccount" && m.Name == defaultServiceAccount && c.New == nil,
		m.GVK.Kind == "ConfigMap" && m.Name == rootCAConfigMap:
		return []reconcile.Key{reconcile.NewKey(reconcile.NamespaceKind, "", m.Namespace)}
	}
	return nil
}

// Reconcile implements Reconciler.
func (d NamespaceDefaults) Reconcile(in reconcile.Input, key reconcile.Key) (reconcile.Result, error) {
	ns, ok := in.Snapshot.Namespaces().Get("", key.Name)
	if !ok || ns.DeletionTimestamp != nil || ns.Status.Phase == corev1.NamespaceTerminating {
		return reconcile.Result{}, nil
	}
	var result reconcile.Result
	if _, ok := in.Snapshot.ServiceAccounts().Get(ns.Name, defaultServiceAccount); !ok {
		result.Add(reconcile.Create(reconcile.ServiceAccountsResource, &corev1.ServiceAccount{
			ObjectMeta: metav1.ObjectMeta{Namespace: ns.Name, Name: defaultServiceAccount},
		}))
	}
	if len(d.RootCA) == 0 {
		return result, nil
	}
	data := map[string]string{rootCAKey: string(d.RootCA)}
	switch cm, ok := in.Snapshot.ConfigMaps().Get(ns.Name, rootCAConfigMap); {
	case !ok:
		result.Add(reconcile.Create(reconcile.ConfigMapsResource, &corev1.ConfigMap{
			ObjectMeta: metav1.ObjectMeta{
				Namespace: ns.Name, Name: rootCAConfigMap,
				Annotations: map[string]string{descriptionAnnotation: rootCADescription},
			},
			Data: data,
		}))
	case !maps.Equal(cm.Data, data) || len(cm.BinaryData) > 0 || cm.Annotations[descriptionAnnotation] == "":
		cm = cm.DeepCopy()
		cm.Data, cm.BinaryData = data, nil
		if cm.Annotations == nil {
			cm.Annotations = map[string]string{}
		}
		cm.Annotations[descriptionAnnotation] = rootCADescription
		result.Add(reconcile.Update(reconcile.ConfigMapsResource, cm))
	}
	return result, nil
}
