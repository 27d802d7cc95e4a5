package reconcile

import (
	"maps"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

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
func (NamespaceDefaults) All(s *objects.Snapshot) []Key { return namespaceKeys(s) }

// Keys implements Reconciler.
func (NamespaceDefaults) Keys(c objects.Changed, _ *objects.Snapshot) []Key {
	m := c.Meta()
	switch {
	case m.GVK == namespaceKind:
		return []Key{{Kind: namespaceKind.Kind, Name: m.Name}}
	case m.GVK.Group != "":
		return nil
	case m.GVK.Kind == "ServiceAccount" && m.Name == defaultServiceAccount && c.New == nil,
		m.GVK.Kind == "ConfigMap" && m.Name == rootCAConfigMap:
		return []Key{{Kind: namespaceKind.Kind, Name: m.Namespace}}
	}
	return nil
}

// Reconcile implements Reconciler.
func (d NamespaceDefaults) Reconcile(in Input, key Key) (Result, error) {
	ns, ok := in.Snapshot.Namespaces().Get("", key.Name)
	if !ok || ns.DeletionTimestamp != nil || ns.Status.Phase == corev1.NamespaceTerminating {
		return Result{}, nil
	}
	var result Result
	if _, ok := in.Snapshot.ServiceAccounts().Get(ns.Name, defaultServiceAccount); !ok {
		result.change(create(serviceAccountsResource, &corev1.ServiceAccount{
			ObjectMeta: metav1.ObjectMeta{Namespace: ns.Name, Name: defaultServiceAccount},
		}))
	}
	if len(d.RootCA) == 0 {
		return result, nil
	}
	data := map[string]string{rootCAKey: string(d.RootCA)}
	switch cm, ok := in.Snapshot.ConfigMaps().Get(ns.Name, rootCAConfigMap); {
	case !ok:
		result.change(create(configMapsResource, &corev1.ConfigMap{
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
		result.change(update(configMapsResource, cm))
	}
	return result, nil
}

// namespaceKeys returns a key for each namespace.
func namespaceKeys(s *objects.Snapshot) []Key {
	var keys []Key
	for ns := range s.Namespaces().All() {
		keys = append(keys, Key{Kind: namespaceKind.Kind, Name: ns.Name})
	}
	return keys
}
