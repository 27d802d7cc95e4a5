package sched

import (
	"fmt"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	storagev1 "k8s.io/api/storage/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/component-helpers/storage/ephemeral"
	"k8s.io/component-helpers/storage/volume"
)

var (
	statusDisk          = unschedulable(causeVolumeUse, "node(s) had no available disk")
	statusOncePod       = unschedulable(causeVolumeUse, "node(s) unavailable due to PersistentVolumeClaim with ReadWriteOncePod access mode already in-use by another pod")
	statusMaxVolumes    = unschedulable(causeVolumeLimits, "node(s) exceed max volume count")
	statusZone          = unresolvable(causeVolumeZone, "node(s) had no available volume zone")
	statusUnboundClaims = unresolvable(causeVolumeBinding, "pod has unbound immediate PersistentVolumeClaims")
)

const (
	reasonVolumeAffinity = "node(s) didn't match PersistentVolume's node affinity"
	reasonNoVolume       = "node(s) didn't find available persistent volumes to bind"
	reasonNoSpace        = "node(s) did not have enough free storage"
	reasonVolumeMissing  = "node(s) unavailable due to one or more pvc(s) bound to non-existent pv(s)"
)

// volumeRound is what a round decided about volumes so far.
type volumeRound struct {
	// volumes holds, by name, volumes bound in this round, claimRef set.
	volumes map[string]*corev1.PersistentVolume
	// claimNodes holds, by namespace/name, the node chosen for a claim that a
	// provisioner serves.
	claimNodes map[string]string
	// users counts, by namespace/name, the pods on nodes that use a claim; nil
	// until a ReadWriteOncePod claim asks.
	users map[string]int64
}

// podVolumes is what filters need of a pod's volumes.
type podVolumes struct {
	// disks: the pod has inline disks that two pods cannot share.
	disks bool
	// bound are volumes of bound claims; missing says that one is gone.
	bound   []*corev1.PersistentVolume
	missing bool
	// delayed are unbound claims whose class waits for a pod's node, small
	// first, and available their classes' volumes.
	delayed   []*corev1.PersistentVolumeClaim
	available map[string][]*corev1.PersistentVolume
	// oncePod are ReadWriteOncePod claims and onceUsers how many pods that run
	// use one of them.
	oncePod   map[string]bool
	onceUsers int64
	// zones are topology labels of bound volumes and their allowed values.
	zones []zoneLabel
	// attached are the pod's volumes of CSI drivers, by driver and handle.
	attached map[string]string

	namespace string
}

type zoneLabel struct {
	key    string
	values []string
}

// claimName returns the name of the claim that a volume of the pod uses.
func claimName(pod *corev1.Pod, v *corev1.Volume) (name string, isEphemeral bool) {
	switch {
	case v.PersistentVolumeClaim != nil:
		return v.PersistentVolumeClaim.ClaimName, false
	case v.Ephemeral != nil:
		return ephemeral.VolumeClaimName(pod, v), true
	}
	return "", false
}

// prepareVolumes returns nil when no volume of the pod restricts its node.
func (r *round) prepareVolumes(c *candidate) (*podVolumes, *status) {
	pod, asks := c.p.pod, c.profile.asks
	v := &podVolumes{namespace: pod.Namespace}
	var claims []*corev1.PersistentVolumeClaim
	for i := range pod.Spec.Volumes {
		vol := &pod.Spec.Volumes[i]
		v.disks = v.disks || asks(FilterVolumeRestrictions) && isDisk(vol)
		name, isEphemeral := claimName(pod, vol)
		if name == "" {
			continue
		}
		claim, s := r.usableClaim(pod, name, isEphemeral)
		if s != nil {
			return nil, s
		}
		claims = append(claims, claim)
		if !isEphemeral && asks(FilterVolumeRestrictions) && slices.Contains(claim.Spec.AccessModes, corev1.ReadWriteOncePod) {
			if v.oncePod == nil {
				v.oncePod = map[string]bool{}
			}
			v.oncePod[name] = true
		}
	}
	if len(claims) == 0 && !v.disks {
		return nil, nil
	}
	if len(v.oncePod) > 0 {
		for name := range v.oncePod {
			if r.claimUsers()[podKey(pod.Namespace, name)] > 0 {
				v.onceUsers++
			}
		}
	}
	if s := r.sortClaims(v, claims); s != nil {
		return nil, s
	}
	return v, nil
}

// usableClaim returns a claim of the pod, or why the pod cannot use it.
func (r *round) usableClaim(pod *corev1.Pod, name string, isEphemeral bool) (*corev1.PersistentVolumeClaim, *status) {
	claim, ok := r.in.State.PersistentVolumeClaim(pod.Namespace, name)
	switch {
	case !ok && isEphemeral:
		return nil, unresolvable(causeVolumeBinding, fmt.Sprintf("waiting for ephemeral volume controller to create the persistentvolumeclaim %q", name))
	case !ok:
		return nil, unresolvable(causeVolumeBinding, fmt.Sprintf("persistentvolumeclaim %q not found", name))
	case claim.Status.Phase == corev1.ClaimLost:
		return nil, unresolvable(causeVolumeBinding, fmt.Sprintf("persistentvolumeclaim %q bound to non-existent persistentvolume %q", name, claim.Spec.VolumeName))
	case claim.DeletionTimestamp != nil:
		return nil, unresolvable(causeVolumeBinding, fmt.Sprintf("persistentvolumeclaim %q is being deleted", name))
	}
	if isEphemeral {
		if err := ephemeral.VolumeIsForPod(pod, claim); err != nil {
			return nil, unresolvable(causeVolumeBinding, err.Error())
		}
	}
	return claim, nil
}

// sortClaims tells bound claims from those to bind on the pod's node, and
// refuses those that should have been bound before.
func (r *round) sortClaims(v *podVolumes, claims []*corev1.PersistentVolumeClaim) *status {
	state := r.in.State
	immediate := false
	for _, claim := range claims {
		if claim.Spec.VolumeName != "" && metav1.HasAnnotation(claim.ObjectMeta, volume.AnnBindCompleted) {
			pv, ok := state.PersistentVolume(claim.Spec.VolumeName)
			if !ok {
				v.missing = true
				continue
			}
			v.bound = append(v.bound, pv)
			v.zones = append(v.zones, zoneLabels(pv)...)
			if csi := pv.Spec.CSI; csi != nil {
				v.attach(csi.Driver, csi.VolumeHandle)
			}
			continue
		}
		className := volume.GetPersistentVolumeClaimClass(claim)
		class, ok := state.StorageClass(className)
		if className != "" && !ok {
			return failed("storageclass.storage.k8s.io %q not found for persistentvolumeclaim %q", className, claim.Name)
		}
		delayed := ok && class.VolumeBindingMode != nil && *class.VolumeBindingMode == storagev1.VolumeBindingWaitForFirstConsumer
		if !delayed || claim.Spec.VolumeName != "" {
			immediate = true
			continue
		}
		v.delayed = append(v.delayed, claim)
		v.attach(class.Provisioner, "unbound/"+podKey(claim.Namespace, claim.Name))
	}
	if immediate {
		return statusUnboundClaims
	}
	if len(v.delayed) == 0 {
		return nil
	}
	slices.SortStableFunc(v.delayed, func(a, b *corev1.PersistentVolumeClaim) int {
		return a.Spec.Resources.Requests.Storage().Cmp(*b.Spec.Resources.Requests.Storage())
	})
	v.available = map[string][]*corev1.PersistentVolume{}
	for pv := range state.PersistentVolumes() {
		if taken, ok := r.volumes.volumes[pv.Name]; ok {
			pv = taken
		}
		class := volume.GetPersistentVolumeClass(pv)
		v.available[class] = append(v.available[class], pv)
	}
	return nil
}

func (v *podVolumes) attach(driver, handle string) {
	if driver == "" || handle == "" {
		return
	}
	if v.attached == nil {
		v.attached = map[string]string{}
	}
	v.attached[driver+"/"+handle] = driver
}

// zoneLabels returns the zone and region labels of a volume; a value may list
// several zones.
func zoneLabels(pv *corev1.PersistentVolume) []zoneLabel {
	var out []zoneLabel
	for _, key := range []string{
		corev1.LabelFailureDomainBetaZone, corev1.LabelFailureDomainBetaRegion,
		corev1.LabelTopologyZone, corev1.LabelTopologyRegion,
	} {
		if value, ok := pv.Labels[key]; ok {
			out = append(out, zoneLabel{key, strings.Split(value, "__")})
		}
	}
	return out
}

// claimUsers counts the users of every claim when first asked.
func (r *round) claimUsers() map[string]int64 {
	if r.volumes.users == nil {
		r.volumes.users = map[string]int64{}
		for _, n := range r.nodes {
			if n == nil || n.node == nil || n.claimUsers == 0 {
				continue
			}
			for _, p := range n.pods {
				r.volumes.countUsers(p, 1)
			}
		}
	}
	return r.volumes.users
}

func (v *volumeRound) countUsers(p *podInfo, sign int64) {
	for i := range p.pod.Spec.Volumes {
		if claim := p.pod.Spec.Volumes[i].PersistentVolumeClaim; claim != nil {
			v.users[podKey(p.pod.Namespace, claim.ClaimName)] += sign
		}
	}
}

func (v *volumeRound) addPod(p *podInfo, _ int32) {
	if v.users != nil {
		v.countUsers(p, 1)
	}
}

// count tells that a pod came to or left some node.
func (v *podVolumes) count(p *podInfo, sign int64) {
	if len(v.oncePod) == 0 || p.pod.Namespace != v.namespace {
		return
	}
	for i := range p.pod.Spec.Volumes {
		if claim := p.pod.Spec.Volumes[i].PersistentVolumeClaim; claim != nil && v.oncePod[claim.ClaimName] {
			v.onceUsers += sign
		}
	}
}

// filterVolumes checks whether the pod's volumes can be used on the node.
func (r *round) filterVolumes(c *candidate, n *nodeInfo) *status {
	v := c.volumes
	if v.disks && diskConflict(c.p.pod, n) {
		return statusDisk
	}
	if v.onceUsers > 0 {
		return statusOncePod
	}
	if len(v.attached) > 0 && c.profile.asks(FilterNodeVolumeLimits) {
		if s := r.filterLimits(v, n); s != nil {
			return s
		}
	}
	var reasons []string
	for _, pv := range v.bound {
		if volume.CheckNodeAffinity(pv, n.node.Labels) != nil {
			reasons = append(reasons, reasonVolumeAffinity)
			break
		}
	}
	if len(v.delayed) > 0 {
		_, _, reason, err := r.decideClaims(v, n)
		if err != nil {
			return &status{err: err, cause: causeError}
		}
		if reason != "" {
			reasons = append(reasons, reason)
		}
	}
	if v.missing {
		reasons = append(reasons, reasonVolumeMissing)
	}
	if len(reasons) > 0 {
		return unresolvable(causeVolumeBinding, reasons...)
	}
	if c.profile.asks(FilterVolumeZone) && !zonesMatch(v.zones, n.node.Labels) {
		return statusZone
	}
	return nil
}

// roomFor is a volume to be made, and how much its driver has left where it would be.
type roomFor struct {
	claim *corev1.PersistentVolumeClaim
	left  int64
}

// decideClaims finds, for each delayed claim, a volume usable on the node or
// else a provisioner that can make one there. A reason says why it cannot. rooms are
// those of volumes to be made whose driver says how much it has.
func (r *round) decideClaims(v *podVolumes, n *nodeInfo) (decisions []ClaimDecision, rooms []roomFor, reason string, err error) {
	chosen := map[string]*corev1.PersistentVolume{}
	for _, claim := range v.delayed {
		selected, isSelected := claim.Annotations[volume.AnnSelectedNode]
		if node, ok := r.volumes.claimNodes[podKey(claim.Namespace, claim.Name)]; ok {
			selected, isSelected = node, true
		}
		if isSelected && selected != n.name {
			return nil, nil, reasonNoVolume, nil
		}
		class := volume.GetPersistentVolumeClaimClass(claim)
		if !isSelected {
			pv, err := volume.FindMatchingVolume(claim, v.available[class], n.node, chosen, true, true)
			if err != nil {
				return nil, nil, "", err
			}
			if pv != nil {
				chosen[pv.Name] = pv
				decisions = append(decisions, ClaimDecision{Claim: claim, Volume: pv})
				continue
			}
		}
		capacity, reason, err := r.canProvision(claim, class, n)
		if reason != "" || err != nil {
			return nil, nil, reason, err
		}
		if capacity != nil && capacity.Capacity != nil {
			rooms = append(rooms, roomFor{claim, capacity.Capacity.Value()})
		}
		if !isSelected {
			decisions = append(decisions, ClaimDecision{Claim: claim})
		}
	}
	return decisions, rooms, "", nil
}

// canProvision says why no volume can be made for a claim on a node. capacity is what its
// driver says of the room there, nil if it says nothing.
func (r *round) canProvision(claim *corev1.PersistentVolumeClaim, className string, n *nodeInfo) (capacity *storagev1.CSIStorageCapacity, reason string, err error) {
	class, ok := r.in.State.StorageClass(className)
	if !ok {
		return nil, "", fmt.Errorf("failed to find storage class %q", className)
	}
	if class.Provisioner == "" || class.Provisioner == volume.NotSupportedProvisioner ||
		!topologyAllowed(class.AllowedTopologies, n.node.Labels) {
		return nil, reasonNoVolume, nil
	}
	size, sized := claim.Spec.Resources.Requests[corev1.ResourceStorage]
	driver, ok := r.in.State.CSIDriver(class.Provisioner)
	if !sized || !ok || driver.Spec.StorageCapacity == nil || !*driver.Spec.StorageCapacity {
		return nil, "", nil
	}
	for capacity := range r.in.State.CSIStorageCapacities() {
		limit := capacity.MaximumVolumeSize
		if limit == nil {
			limit = capacity.Capacity
		}
		if capacity.StorageClassName != className || limit == nil || limit.Cmp(size) < 0 || capacity.NodeTopology == nil {
			continue
		}
		selector, err := metav1.LabelSelectorAsSelector(capacity.NodeTopology)
		if err == nil && selector.Matches(labels.Set(n.node.Labels)) {
			return capacity, "", nil
		}
	}
	return nil, reasonNoSpace, nil
}

func topologyAllowed(terms []corev1.TopologySelectorTerm, nodeLabels map[string]string) bool {
	for _, t := range terms {
		matches := len(t.MatchLabelExpressions) > 0
		for _, e := range t.MatchLabelExpressions {
			value, ok := nodeLabels[e.Key]
			matches = matches && ok && slices.Contains(e.Values, value)
		}
		if matches {
			return true
		}
	}
	return len(terms) == 0
}

// assumeVolumes settles the pod's delayed claims on a node and returns what is
// new about them.
func (r *round) assumeVolumes(c *candidate, n *nodeInfo) []ClaimDecision {
	decisions, _, _, _ := r.decideClaims(c.volumes, n)
	if r.volumes.volumes == nil {
		r.volumes.volumes = map[string]*corev1.PersistentVolume{}
		r.volumes.claimNodes = map[string]string{}
	}
	var out []ClaimDecision
	for _, d := range decisions {
		if d.Volume == nil {
			r.volumes.claimNodes[podKey(d.Claim.Namespace, d.Claim.Name)] = n.name
			out = append(out, d)
			continue
		}
		pv, changed, err := volume.GetBindVolumeToClaim(d.Volume, d.Claim)
		if err != nil || !changed {
			continue // the volume names the claim already
		}
		r.volumes.volumes[pv.Name] = pv
		out = append(out, ClaimDecision{Claim: d.Claim, Volume: pv})
	}
	return out
}

// zonesMatch reports whether a node is in the zones of the pod's volumes; nodes
// without any zone label are in all.
func zonesMatch(zones []zoneLabel, nodeLabels map[string]string) bool {
	if len(zones) == 0 {
		return true
	}
	current := map[string]string{
		corev1.LabelFailureDomainBetaZone:   corev1.LabelTopologyZone,
		corev1.LabelFailureDomainBetaRegion: corev1.LabelTopologyRegion,
	}
	zoned := false
	for old, now := range current {
		_, hasOld := nodeLabels[old]
		_, hasNow := nodeLabels[now]
		zoned = zoned || hasOld || hasNow
	}
	if !zoned {
		return true
	}
	for _, z := range zones {
		value, ok := nodeLabels[z.key]
		if !ok {
			value, ok = nodeLabels[current[z.key]]
		}
		if !ok || !slices.Contains(z.values, value) {
			return false
		}
	}
	return true
}

// isDisk reports whether a volume is an inline network disk that only one pod,
// or only readers, may use.
func isDisk(v *corev1.Volume) bool {
	return v.GCEPersistentDisk != nil || v.AWSElasticBlockStore != nil || v.ISCSI != nil || v.RBD != nil
}

func diskConflict(pod *corev1.Pod, n *nodeInfo) bool {
	for i := range pod.Spec.Volumes {
		v := &pod.Spec.Volumes[i]
		if !isDisk(v) {
			continue
		}
		for _, p := range n.pods {
			for j := range p.pod.Spec.Volumes {
				if sameDisk(v, &p.pod.Spec.Volumes[j]) {
					return true
				}
			}
		}
	}
	return false
}

func sameDisk(a, b *corev1.Volume) bool {
	switch {
	case a.GCEPersistentDisk != nil && b.GCEPersistentDisk != nil:
		x, y := a.GCEPersistentDisk, b.GCEPersistentDisk
		return x.PDName == y.PDName && !(x.ReadOnly && y.ReadOnly)
	case a.AWSElasticBlockStore != nil && b.AWSElasticBlockStore != nil:
		return a.AWSElasticBlockStore.VolumeID == b.AWSElasticBlockStore.VolumeID
	case a.ISCSI != nil && b.ISCSI != nil:
		return a.ISCSI.IQN == b.ISCSI.IQN && !(a.ISCSI.ReadOnly && b.ISCSI.ReadOnly)
	case a.RBD != nil && b.RBD != nil:
		x, y := a.RBD, b.RBD
		return x.RBDPool == y.RBDPool && x.RBDImage == y.RBDImage && !(x.ReadOnly && y.ReadOnly) &&
			slices.ContainsFunc(x.CephMonitors, func(m string) bool { return slices.Contains(y.CephMonitors, m) })
	}
	return false
}
