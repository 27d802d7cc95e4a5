package sched

import (
	"maps"
	"slices"

	storagev1 "k8s.io/api/storage/v1"
	"k8s.io/component-helpers/storage/volume"
)

// filterLimits says whether a CSI driver that must be on the node is missing there, or
// would have more volumes attached than it allows.
func (r *round) filterLimits(v *podVolumes, n *nodeInfo) *status {
	csiNode, ok := r.in.State.CSINode(n.name)
	if s := r.missingDriver(v, csiNode); s != nil || !ok {
		return s
	}
	limits := map[string]int{}
	for _, d := range csiNode.Spec.Drivers {
		if d.Allocatable != nil && d.Allocatable.Count != nil {
			limits[d.Name] = int(*d.Allocatable.Count)
		}
	}
	if len(limits) == 0 {
		return nil
	}
	there := map[string]string{}
	for _, p := range n.pods {
		for i := range p.pod.Spec.Volumes {
			if name, _ := claimName(p.pod, &p.pod.Spec.Volumes[i]); name != "" {
				r.attachedVolume(p.pod.Namespace, name, there)
			}
		}
	}
	count, adds := map[string]int{}, map[string]bool{}
	for _, driver := range there {
		count[driver]++
	}
	// What is still, or already, attached takes its place though no pod here uses it.
	for handle, driver := range r.attachments()[n.name] {
		if _, used := there[handle]; !used {
			count[driver]++
		}
	}
	for handle, driver := range v.attached {
		if _, already := there[handle]; !already {
			count[driver]++
			adds[driver] = true
		}
	}
	for driver := range adds {
		if limit, ok := limits[driver]; ok && count[driver] > limit {
			return statusMaxVolumes
		}
	}
	return nil
}

// missingDriver says which of the drivers of the pod's volumes, of those without which no
// pod is to come, is not on a node.
func (r *round) missingDriver(v *podVolumes, csiNode *storagev1.CSINode) *status {
	for _, name := range slices.Sorted(maps.Values(v.attached)) {
		driver, ok := r.in.State.CSIDriver(name)
		if !ok || driver.Spec.PreventPodSchedulingIfMissing == nil || !*driver.Spec.PreventPodSchedulingIfMissing {
			continue
		}
		if csiNode == nil || !slices.ContainsFunc(csiNode.Spec.Drivers, func(d storagev1.CSINodeDriver) bool { return d.Name == name }) {
			return unschedulable(causeVolumeLimits, name+" CSI driver is not installed on the node")
		}
	}
	return nil
}

// listAttachments maps nodes to the volumes attached to them, by driver and handle.
func (r *round) listAttachments() map[string]map[string]string {
	out := map[string]map[string]string{}
	for a := range r.in.State.VolumeAttachments() {
		if a.Spec.Attacher == "" || a.Spec.Source.PersistentVolumeName == nil {
			continue
		}
		pv, ok := r.in.State.PersistentVolume(*a.Spec.Source.PersistentVolumeName)
		if !ok || pv.Spec.CSI == nil {
			continue
		}
		if out[a.Spec.NodeName] == nil {
			out[a.Spec.NodeName] = map[string]string{}
		}
		out[a.Spec.NodeName][a.Spec.Attacher+"/"+pv.Spec.CSI.VolumeHandle] = a.Spec.Attacher
	}
	return out
}

func (r *round) attachedVolume(namespace, claimName string, into map[string]string) {
	claim, ok := r.in.State.PersistentVolumeClaim(namespace, claimName)
	if !ok {
		return
	}
	if pv, ok := r.in.State.PersistentVolume(claim.Spec.VolumeName); ok {
		if csi := pv.Spec.CSI; csi != nil {
			into[csi.Driver+"/"+csi.VolumeHandle] = csi.Driver
		}
		return
	}
	if class, ok := r.in.State.StorageClass(volume.GetPersistentVolumeClaimClass(claim)); ok && class.Provisioner != "" {
		into[class.Provisioner+"/unbound/"+podKey(namespace, claimName)] = class.Provisioner
	}
}
