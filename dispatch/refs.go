package dispatch

import (
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/types"

	"timonel/state/objects"
)

// Kinds of referenced objects, as ObjectSet names them.
const (
	kindConfigMap      = "ConfigMap"
	kindSecret         = "Secret"
	kindServiceAccount = "ServiceAccount"
	kindClaim          = "PersistentVolumeClaim"
	kindVolume         = "PersistentVolume" // without a namespace
	kindTrustBundle    = "ClusterTrustBundle"
	// kindSigner is no object: who refers to a signer hears of all its trust bundles.
	kindSigner = "signer"

	kindRuntimeClass = "RuntimeClass"
	kindDriver       = "CSIDriver"        // without a namespace
	kindAttachment   = "VolumeAttachment" // likewise

	kindPodCertificate = "PodCertificateRequest"
	// kindCertified is no object: who has a pod by that uid hears of all requests for it.
	kindCertified = "certified"
)

// objKey names an object that pods refer to.
type objKey struct{ kind, namespace, name string }

// defaultServiceAccount is that of a pod that names none.
const defaultServiceAccount = "default"

// wanted calls add with each object that a node needs: what its pods refer to, and
// those of its own volumes that it is to delete.
func wanted(node string, pods []*corev1.Pod, s *objects.Snapshot, add func(objKey)) {
	for _, pod := range pods {
		references(pod, s, add)
	}
	for pv := range s.PVsOnNode(node) {
		if pv.DeletionTimestamp != nil {
			addNamed(add, kindVolume, "", pv.Name)
		}
	}
}

// references calls add with each object that a pod needs: ConfigMaps and Secrets
// of its environment, volumes and image pulls, its ServiceAccount, the pull
// secrets of that, its claims and their volumes with what CSI needs for them, trust
// bundles, what was asked for of its certificates, and its RuntimeClass.
func references(pod *corev1.Pod, s *objects.Snapshot, add func(objKey)) {
	ns := pod.Namespace
	configMap := func(name string) { addNamed(add, kindConfigMap, ns, name) }
	secret := func(name string) { addNamed(add, kindSecret, ns, name) }

	account := pod.Spec.ServiceAccountName
	if account == "" {
		account = defaultServiceAccount
	}
	addNamed(add, kindServiceAccount, ns, account)
	if sa, ok := s.ServiceAccounts().Get(ns, account); ok {
		for _, r := range sa.ImagePullSecrets {
			secret(r.Name)
		}
	}
	for _, r := range pod.Spec.ImagePullSecrets {
		secret(r.Name)
	}
	if name := pod.Spec.RuntimeClassName; name != nil {
		addNamed(add, kindRuntimeClass, "", *name)
	}
	environment := func(env []corev1.EnvVar, from []corev1.EnvFromSource) {
		for _, e := range env {
			if v := e.ValueFrom; v != nil {
				if v.ConfigMapKeyRef != nil {
					configMap(v.ConfigMapKeyRef.Name)
				}
				if v.SecretKeyRef != nil {
					secret(v.SecretKeyRef.Name)
				}
			}
		}
		for _, f := range from {
			if f.ConfigMapRef != nil {
				configMap(f.ConfigMapRef.Name)
			}
			if f.SecretRef != nil {
				secret(f.SecretRef.Name)
			}
		}
	}
	for i := range pod.Spec.InitContainers {
		environment(pod.Spec.InitContainers[i].Env, pod.Spec.InitContainers[i].EnvFrom)
	}
	for i := range pod.Spec.Containers {
		environment(pod.Spec.Containers[i].Env, pod.Spec.Containers[i].EnvFrom)
	}
	for i := range pod.Spec.EphemeralContainers {
		environment(pod.Spec.EphemeralContainers[i].Env, pod.Spec.EphemeralContainers[i].EnvFrom)
	}
	certified := false
	for i := range pod.Spec.Volumes {
		v := &pod.Spec.Volumes[i]
		if v.ConfigMap != nil {
			configMap(v.ConfigMap.Name)
		}
		if v.Secret != nil {
			secret(v.Secret.SecretName)
		}
		if v.CSI != nil {
			addNamed(add, kindDriver, "", v.CSI.Driver)
			if v.CSI.NodePublishSecretRef != nil {
				secret(v.CSI.NodePublishSecretRef.Name)
			}
		}
		if name := objects.ClaimName(pod, v); name != "" {
			addNamed(add, kindClaim, ns, name)
			if claim, ok := s.PVCs().Get(ns, name); ok {
				addNamed(add, kindVolume, "", claim.Spec.VolumeName)
				csiVolume(pod.Spec.NodeName, claim, s, add)
			}
		}
		if v.Projected == nil {
			continue
		}
		for _, p := range v.Projected.Sources {
			if p.ConfigMap != nil {
				configMap(p.ConfigMap.Name)
			}
			if p.Secret != nil {
				secret(p.Secret.Name)
			}
			if p.ClusterTrustBundle != nil {
				trustBundles(p.ClusterTrustBundle, s, add)
			}
			certified = certified || p.PodCertificate != nil
		}
	}
	if certified {
		podCertificates(pod, s, add)
	}
}

// trustBundles calls add with the ClusterTrustBundles that a volume shows: one by name,
// or those of a signer that a selector matches; no selector matches none, an empty one all.
func trustBundles(p *corev1.ClusterTrustBundleProjection, s *objects.Snapshot, add func(objKey)) {
	if p.Name != nil {
		addNamed(add, kindTrustBundle, "", *p.Name)
		return
	}
	selector, err := metav1.LabelSelectorAsSelector(p.LabelSelector)
	if err != nil || p.SignerName == nil || *p.SignerName == "" {
		return // the node says what is wrong with it
	}
	add(objKey{kindSigner, "", *p.SignerName})
	for b := range s.TrustBundlesOf(*p.SignerName) {
		if selector.Matches(labels.Set(b.Labels)) {
			addNamed(add, kindTrustBundle, "", b.Name)
		}
	}
}

func addNamed(add func(objKey), kind, namespace, name string) {
	if name != "" {
		add(objKey{kind, namespace, name})
	}
}

// marshaler is an API object that encodes itself as protobuf.
type marshaler interface {
	Marshal() ([]byte, error)
	GetUID() types.UID
}

// lookup returns a referenced object and its revision, or nil if there is none.
func lookup(s *objects.Snapshot, k objKey) (marshaler, int64) {
	switch k.kind {
	case kindConfigMap:
		return found(s.ConfigMaps().Get(k.namespace, k.name))
	case kindSecret:
		return found(s.Secrets().Get(k.namespace, k.name))
	case kindServiceAccount:
		return found(s.ServiceAccounts().Get(k.namespace, k.name))
	case kindClaim:
		return found(s.PVCs().Get(k.namespace, k.name))
	case kindVolume:
		return found(s.PVs().Get("", k.name))
	case kindTrustBundle:
		return found(s.ClusterTrustBundles().Get("", k.name))
	case kindRuntimeClass:
		return found(s.RuntimeClasses().Get("", k.name))
	case kindDriver:
		return found(s.CSIDrivers().Get("", k.name))
	case kindAttachment:
		return found(s.VolumeAttachments().Get("", k.name))
	case kindPodCertificate:
		return found(s.PodCertificateRequests().Get(k.namespace, k.name))
	}
	return nil, 0
}

// found is what lookup returns of an object that may not be there.
func found[T interface {
	marshaler
	metav1.Object
}](o T, ok bool) (marshaler, int64) {
	if !ok {
		return nil, 0
	}
	return o, objects.Revision(o)
}
