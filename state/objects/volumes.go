package objects

import (
	"iter"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/component-helpers/storage/ephemeral"
	"k8s.io/component-helpers/storage/volume"
)

// byVolume finds what storage is about. Its keys begin with what is looked for:
//
//	pod/NAMESPACE/CLAIM/            pods that use a claim, or would one of that name
//	claimed/NAMESPACE/CLAIM/        volumes whose claimRef names a claim
//	free/CLASS/                     volumes without a claimRef
//	pending/CLASS/                  claims that are not bound
//	named/VOLUME/                   claims that name a volume, bound or not
//	default/                        claims that are not bound and name no class at all
//	attributes/CLASS/               volumes and claims of a VolumeAttributesClass
//	node/NODE/                      volumes with the annotation NodeAnnotation
//
// A class may be empty: what has none.

// NodeAnnotation of a PersistentVolume names the Node that has it, which alone
// makes and deletes what is behind it.
const NodeAnnotation = "timonel.io/node"

// volumeKeys yields the keys under which byVolume has m, without m's own.
func volumeKeys(m *Meta) iter.Seq[string] {
	return func(yield func(string) bool) {
		switch o := m.Object.(type) {
		case *corev1.Pod:
			for i := range o.Spec.Volumes {
				if claim := ClaimName(o, &o.Spec.Volumes[i]); claim != "" && !yield("pod/"+o.Namespace+"/"+claim+"/") {
					return
				}
			}
		case *corev1.PersistentVolume:
			key := "free/" + volume.GetPersistentVolumeClass(o) + "/"
			if ref := o.Spec.ClaimRef; ref != nil {
				key = "claimed/" + ref.Namespace + "/" + ref.Name + "/"
			}
			if !yield(key) {
				return
			}
			if c := o.Spec.VolumeAttributesClassName; c != nil && *c != "" && !yield("attributes/"+*c+"/") {
				return
			}
			if node := o.Annotations[NodeAnnotation]; node != "" {
				yield("node/" + node + "/")
			}
		case *corev1.PersistentVolumeClaim:
			if o.Spec.VolumeName != "" && !yield("named/"+o.Spec.VolumeName+"/") {
				return
			}
			if _, bound := o.Annotations[volume.AnnBindCompleted]; !bound {
				if !yield("pending/" + volume.GetPersistentVolumeClaimClass(o) + "/") {
					return
				}
				if !volume.PersistentVolumeClaimHasClass(o) && !yield("default/") {
					return
				}
			}
			if c := o.Spec.VolumeAttributesClassName; c != nil && *c != "" && !yield("attributes/"+*c+"/") {
				return
			}
			if c := o.Status.CurrentVolumeAttributesClassName; c != nil && *c != "" && !yield("attributes/"+*c+"/") {
				return
			}
			if s := o.Status.ModifyVolumeStatus; s != nil && s.TargetVolumeAttributesClassName != "" {
				yield("attributes/" + s.TargetVolumeAttributesClassName + "/")
			}
		}
	}
}

// ClaimName returns the name of the claim that a volume of a pod uses, "" for
// none. Whether the claim of an ephemeral volume is the pod's, the claim says.
func ClaimName(pod *corev1.Pod, v *corev1.Volume) string {
	switch {
	case v.PersistentVolumeClaim != nil:
		return v.PersistentVolumeClaim.ClaimName
	case v.Ephemeral != nil:
		return ephemeral.VolumeClaimName(pod, v)
	}
	return ""
}

// PodsUsing yields the pods that have a volume of a claim's name.
func (s *Snapshot) PodsUsing(namespace, claim string) iter.Seq[*corev1.Pod] {
	return only[*corev1.Pod](scan(s.byVolume, "pod/"+namespace+"/"+claim+"/"))
}

// PVsClaimed yields the volumes whose claimRef names a claim, whatever its UID.
func (s *Snapshot) PVsClaimed(namespace, claim string) iter.Seq[*corev1.PersistentVolume] {
	return only[*corev1.PersistentVolume](scan(s.byVolume, "claimed/"+namespace+"/"+claim+"/"))
}

// PVsFree yields the volumes of a class that have no claimRef.
func (s *Snapshot) PVsFree(class string) iter.Seq[*corev1.PersistentVolume] {
	return only[*corev1.PersistentVolume](scan(s.byVolume, "free/"+class+"/"))
}

// PVsOnNode yields the volumes that a Node has, as their [NodeAnnotation] says.
func (s *Snapshot) PVsOnNode(node string) iter.Seq[*corev1.PersistentVolume] {
	return only[*corev1.PersistentVolume](scan(s.byVolume, "node/"+node+"/"))
}

// PVCsPending yields the claims of a class, "" for those without one, that are not bound.
func (s *Snapshot) PVCsPending(class string) iter.Seq[*corev1.PersistentVolumeClaim] {
	return only[*corev1.PersistentVolumeClaim](scan(s.byVolume, "pending/"+class+"/"))
}

// PVCsNaming yields the claims whose volumeName is a volume's.
func (s *Snapshot) PVCsNaming(volume string) iter.Seq[*corev1.PersistentVolumeClaim] {
	return only[*corev1.PersistentVolumeClaim](scan(s.byVolume, "named/"+volume+"/"))
}

// PVCsWithoutClass yields the claims that are not bound and leave their class to the cluster.
func (s *Snapshot) PVCsWithoutClass() iter.Seq[*corev1.PersistentVolumeClaim] {
	return only[*corev1.PersistentVolumeClaim](scan(s.byVolume, "default/"))
}

// UsersOfAttributes yields the volumes and claims that name a VolumeAttributesClass.
func (s *Snapshot) UsersOfAttributes(class string) iter.Seq[*Meta] {
	return scan(s.byVolume, "attributes/"+class+"/")
}
