package dispatch

import (
	"context"
	"crypto/sha256"
	"fmt"
	"slices"

	corev1 "k8s.io/api/core/v1"
	storagev1 "k8s.io/api/storage/v1"
	apiequality "k8s.io/apimachinery/pkg/api/equality"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	storageclient "k8s.io/client-go/kubernetes/typed/storage/v1"

	pb "timonel/proto/timonel/v1"
	"timonel/state/objects"
)

// maxDrivers bounds the CSI drivers that a node says it has, or had.
const maxDrivers = 128

// csiVolume calls add with what a node needs for a claim whose volume is a CSI driver's:
// the driver, the volume's attachment and its Secrets. Secrets are of any namespace, and
// are named by a volume, which only administrators make: a volume that does not name this
// claim in turn gives it none of them.
func csiVolume(node string, claim *corev1.PersistentVolumeClaim, s *objects.Snapshot, add func(objKey)) {
	pv, ok := s.PVs().Get("", claim.Spec.VolumeName)
	if !ok || pv.Spec.CSI == nil || pv.Spec.ClaimRef == nil || pv.Spec.ClaimRef.UID != claim.UID ||
		pv.Spec.ClaimRef.Namespace != claim.Namespace || pv.Spec.ClaimRef.Name != claim.Name {
		return
	}
	csi := pv.Spec.CSI
	addNamed(add, kindDriver, "", csi.Driver)
	addNamed(add, kindAttachment, "", attachmentName(csi.VolumeHandle, csi.Driver, node))
	for _, r := range []*corev1.SecretReference{csi.NodeStageSecretRef, csi.NodePublishSecretRef, csi.NodeExpandSecretRef} {
		if r != nil {
			addNamed(add, kindSecret, r.Namespace, r.Name)
		}
	}
}

// attachmentName is that of the VolumeAttachment of a volume to a node, as upstream's
// attacher names it (pkg/volume/csi, getAttachmentName).
func attachmentName(handle, driver, node string) string {
	return fmt.Sprintf("csi-%x", sha256.Sum256([]byte(handle+driver+node)))
}

// csiReport is what an agent said of its CSI drivers.
type csiReport struct {
	drivers []storagev1.CSINodeDriver
	gone    []string
}

// reportCSINode takes which CSI drivers a node has.
func (s *session) reportCSINode(r *pb.CSINodeReport) error {
	if n := len(r.GetCsiNode()); n > pb.MaxCSINode {
		return fmt.Errorf("CSINode of %s has %d bytes, %d are taken", s.node, n, pb.MaxCSINode)
	}
	said := &storagev1.CSINode{}
	if err := said.Unmarshal(r.GetCsiNode()); err != nil {
		return fmt.Errorf("CSINode of %s: %w", s.node, err)
	}
	if len(said.Spec.Drivers) > maxDrivers || len(r.GetGone()) > maxDrivers {
		return fmt.Errorf("CSINode of %s names %d drivers, and %d that it had; %d of each are taken", s.node, len(said.Spec.Drivers), len(r.GetGone()), maxDrivers)
	}
	s.reports.mu.Lock()
	s.reports.csi = &csiReport{drivers: said.Spec.Drivers, gone: r.GetGone()}
	s.reports.mu.Unlock()
	s.writer.add("csinode "+s.node, s.writeCSINode)
	return nil
}

// writeCSINode makes the node's CSINode name the drivers that the agent said, and none of
// those that it said are gone. Entries of others stay: an agent that has just started does
// not know yet which drivers will register again.
func (s *session) writeCSINode(ctx context.Context) error {
	s.reports.mu.Lock()
	said := s.reports.csi
	s.reports.mu.Unlock()
	if said == nil {
		return nil
	}
	client, err := storageclient.NewForConfig(s.d.config.API(s.node))
	if err != nil {
		return fmt.Errorf("API client of node %s: %w", s.node, err)
	}
	for try := 0; ; try++ {
		err := s.updateCSINode(ctx, client, said)
		if (apierrors.IsConflict(err) || apierrors.IsAlreadyExists(err) || apierrors.IsNotFound(err)) && try < 5 {
			continue
		}
		if err != nil {
			return fmt.Errorf("write CSINode %s: %w", s.node, err)
		}
		return nil
	}
}

func (s *session) updateCSINode(ctx context.Context, client storageclient.StorageV1Interface, said *csiReport) error {
	live, err := client.CSINodes().Get(ctx, s.node, metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		node, ok := s.d.config.Objects.Snapshot().Nodes().Get("", s.node)
		if !ok {
			return err // its owner is being registered; it is tried again
		}
		made := &storagev1.CSINode{
			ObjectMeta: metav1.ObjectMeta{Name: s.node, OwnerReferences: []metav1.OwnerReference{{APIVersion: "v1", Kind: "Node", Name: node.Name, UID: node.UID}}},
			Spec:       storagev1.CSINodeSpec{Drivers: said.drivers},
		}
		if _, err = client.CSINodes().Create(ctx, made, metav1.CreateOptions{}); err != nil {
			return err
		}
		return nil
	}
	if err != nil {
		return err
	}
	next, replaced := mergeDrivers(live.Spec.Drivers, said)
	if replaced != nil {
		// What a driver said of a node cannot be changed: it goes, and comes anew.
		node := live.DeepCopy()
		node.Spec.Drivers = replaced
		if live, err = client.CSINodes().Update(ctx, node, metav1.UpdateOptions{}); err != nil {
			return err
		}
	}
	if apiequality.Semantic.DeepEqual(live.Spec.Drivers, next) {
		return nil
	}
	node := live.DeepCopy()
	node.Spec.Drivers = next
	_, err = client.CSINodes().Update(ctx, node, metav1.UpdateOptions{})
	return err
}

// mergeDrivers is what a CSINode should name: what it does, without what is gone, and with
// what the agent said. replaced is what it has to name before, if it now says other things
// of a driver; nil: nothing.
func mergeDrivers(live []storagev1.CSINodeDriver, said *csiReport) (next, replaced []storagev1.CSINodeDriver) {
	saidOf := func(name string) int {
		return slices.IndexFunc(said.drivers, func(d storagev1.CSINodeDriver) bool { return d.Name == name })
	}
	changed := false
	next, replaced = []storagev1.CSINodeDriver{}, []storagev1.CSINodeDriver{}
	for _, d := range live {
		switch i := saidOf(d.Name); {
		case i >= 0 && apiequality.Semantic.DeepEqual(d, said.drivers[i]), i < 0 && !slices.Contains(said.gone, d.Name):
			next, replaced = append(next, d), append(replaced, d)
		case i >= 0:
			changed = true
		}
	}
	for _, d := range said.drivers {
		if !slices.ContainsFunc(next, func(n storagev1.CSINodeDriver) bool { return n.Name == d.Name }) {
			next = append(next, d)
		}
	}
	if !changed {
		replaced = nil
	}
	return next, replaced
}

// growClaim makes a claim's status say how large its volume is, as the kubelet does when
// what is left of growing it is the node's (MarkFSResizeFinished, pkg/volume/util). The
// size is the volume's own, or what was allocated to the claim, whatever the agent says,
// and the agent's node is asked for it: only a claim that a pod there uses can be written.
func (s *session) growClaim(ctx context.Context, q *pb.ClaimGrown) error {
	for try := 0; ; try++ {
		live, err := s.client.PersistentVolumeClaims(q.GetNamespace()).Get(ctx, q.GetName(), metav1.GetOptions{})
		if apierrors.IsNotFound(err) {
			return nil
		}
		if err != nil {
			return err
		}
		pv, ok := s.d.config.Objects.Snapshot().PVs().Get("", q.GetVolume())
		if !ok || string(live.UID) != q.GetUid() || live.Spec.VolumeName != q.GetVolume() || pv.Spec.ClaimRef == nil || pv.Spec.ClaimRef.UID != live.UID {
			return nil // it is another's by now
		}
		next := grownClaim(live, pv, q.GetBytes())
		if apiequality.Semantic.DeepEqual(live.Status, next.Status) {
			return nil
		}
		_, err = s.client.PersistentVolumeClaims(q.GetNamespace()).UpdateStatus(ctx, next, metav1.UpdateOptions{})
		if apierrors.IsConflict(err) && try < 5 {
			continue
		}
		return err
	}
}

// grownClaim is a claim whose volume has been made larger on its node, to so many bytes.
func grownClaim(live *corev1.PersistentVolumeClaim, pv *corev1.PersistentVolume, bytes int64) *corev1.PersistentVolumeClaim {
	size, ok := pv.Spec.Capacity[corev1.ResourceStorage]
	if allocated, is := live.Status.AllocatedResources[corev1.ResourceStorage]; is && allocated.Cmp(size) < 0 {
		size = allocated // of one that failed to grow as far as was asked for first
	}
	has := live.Status.Capacity[corev1.ResourceStorage]
	next := live.DeepCopy()
	if !ok || bytes != size.Value() || has.Cmp(size) >= 0 {
		return next // it has grown once more, or it is known
	}
	if next.Status.Capacity == nil {
		next.Status.Capacity = corev1.ResourceList{}
	}
	next.Status.Capacity[corev1.ResourceStorage] = size
	next.Status.Conditions = slices.DeleteFunc(next.Status.Conditions, func(c corev1.PersistentVolumeClaimCondition) bool {
		switch c.Type {
		case corev1.PersistentVolumeClaimResizing, corev1.PersistentVolumeClaimFileSystemResizePending,
			corev1.PersistentVolumeClaimControllerResizeError, corev1.PersistentVolumeClaimNodeResizeError:
			return true
		}
		return false
	})
	if delete(next.Status.AllocatedResourceStatuses, corev1.ResourceStorage); len(next.Status.AllocatedResourceStatuses) == 0 {
		next.Status.AllocatedResourceStatuses = nil
	}
	return next
}
