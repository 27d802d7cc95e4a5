package pod

import (
	"maps"
	"slices"

	corev1 "k8s.io/api/core/v1"

	"timonel/agent/desired"
	"timonel/agent/eviction"
	"timonel/agent/volume"
)

// want is what a pod should be. Others change the worker's; a pass works on a copy,
// which never changes, so that a mark in it is as old as what it is about.
type want struct {
	pod     *corev1.Pod // api, with the resources that it was given
	api     *corev1.Pod // as the API has it
	resized bool        // api asks for other resources than it was given
	given   *allocation // nil until it is accepted
	removed bool        // the cluster does not know it any more
	evicted *eviction.Eviction
	shown   uint64 // counts what volumes show: changes of the pod or of what it refers to
	short   bool   // room is short: containers that have ended are to be removed
}

// set takes the pod as it is now, and says whether anything but its status is new.
func (w *want) set(pod *corev1.Pod) (changed bool) {
	old := w.pod
	w.api = pod
	w.pod, w.resized = w.given.apply(pod)
	if !maps.Equal(old.Labels, pod.Labels) || !maps.Equal(old.Annotations, pod.Annotations) || old.Generation != pod.Generation {
		w.shown++
		return true
	}
	return false
}

// give gives the pod resources.
func (w *want) give(a *allocation) {
	w.given = a
	w.pod, w.resized = a.apply(w.api)
}

// ends says whether somebody wants the pod to end.
func (w *want) ends() bool { return w.removed || w.pod.DeletionTimestamp != nil || w.evicted != nil }

// gone says whether nothing of the pod is to be left.
func (w *want) gone() bool { return w.removed || w.pod.DeletionTimestamp != nil }

func (w *want) refersTo(kind, namespace, name string) bool {
	pod := w.pod
	if kind == desired.KindVolume { // the claims that it may be of are the pod's
		return slices.ContainsFunc(pod.Spec.Volumes, func(v corev1.Volume) bool { return volume.ClaimOf(pod, &v) != "" })
	}
	if kind == desired.KindTrustBundle {
		return volume.ShowsBundle(pod, name)
	}
	if kind == desired.KindRuntimeClass {
		return pod.Spec.RuntimeClassName != nil && *pod.Spec.RuntimeClassName == name
	}
	if pod.Namespace != namespace {
		return false
	}
	if kind == desired.KindPodCertificate {
		return volume.AskedFor(pod, name)
	}
	if kind == desired.KindServiceAccount {
		return pod.Spec.ServiceAccountName == name
	}
	for i := range pod.Spec.ImagePullSecrets {
		if kind == desired.KindSecret && pod.Spec.ImagePullSecrets[i].Name == name {
			return true
		}
	}
	for i := range pod.Spec.Volumes {
		v := &pod.Spec.Volumes[i].VolumeSource
		if kind == desired.KindClaim && volume.ClaimOf(pod, &pod.Spec.Volumes[i]) == name {
			return true
		}
		if v.ConfigMap != nil && kind == desired.KindConfigMap && v.ConfigMap.Name == name ||
			v.Secret != nil && kind == desired.KindSecret && v.Secret.SecretName == name {
			return true
		}
		if v.Projected == nil {
			continue
		}
		for _, s := range v.Projected.Sources {
			if s.ConfigMap != nil && kind == desired.KindConfigMap && s.ConfigMap.Name == name ||
				s.Secret != nil && kind == desired.KindSecret && s.Secret.Name == name {
				return true
			}
		}
	}
	for i := range pod.Spec.Volumes { // inline CSI
		if v := pod.Spec.Volumes[i].CSI; v != nil && kind == desired.KindSecret && v.NodePublishSecretRef != nil && v.NodePublishSecretRef.Name == name {
			return true
		}
	}
	for _, list := range [][]corev1.Container{pod.Spec.InitContainers, pod.Spec.Containers} {
		for i := range list {
			if envRefersTo(&list[i], kind, name) {
				return true
			}
		}
	}
	for i := range pod.Spec.EphemeralContainers {
		if envRefersTo(asContainer(&pod.Spec.EphemeralContainers[i]), kind, name) {
			return true
		}
	}
	return false
}

func envRefersTo(c *corev1.Container, kind, name string) bool {
	for _, f := range c.EnvFrom {
		if f.ConfigMapRef != nil && kind == desired.KindConfigMap && f.ConfigMapRef.Name == name ||
			f.SecretRef != nil && kind == desired.KindSecret && f.SecretRef.Name == name {
			return true
		}
	}
	for _, e := range c.Env {
		if s := e.ValueFrom; s != nil {
			if s.ConfigMapKeyRef != nil && kind == desired.KindConfigMap && s.ConfigMapKeyRef.Name == name ||
				s.SecretKeyRef != nil && kind == desired.KindSecret && s.SecretKeyRef.Name == name {
				return true
			}
		}
	}
	return false
}
