package csi

import (
	"testing"

	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
)

// TestGrowth: the node's part of a volume grows when it is the node's turn by the claim's
// status, as the kubelet has it.
func TestGrowth(t *testing.T) {
	const gi = int64(1 << 30)
	q := func(n int64) corev1.ResourceList {
		return corev1.ResourceList{corev1.ResourceStorage: *resource.NewQuantity(n*gi, resource.BinarySI)}
	}
	type of struct {
		node, volume, claim, allocated int64 // sizes in Gi; node: what its part has
		status                         corev1.ClaimResourceStatus
		many, others, readOnly         bool
	}
	for name, c := range map[string]struct {
		of
		want int64
	}{
		"as it is":                           {of{node: 1, volume: 1, claim: 1}, 0},
		"an old resizer":                     {of{node: 1, volume: 2, claim: 1}, 2},
		"an old resizer, read only":          {of{node: 1, volume: 2, claim: 1, readOnly: true}, 0},
		"others have seen to it":             {of{node: 1, volume: 2, claim: 2}, 0},
		"the controller is at it":            {of{node: 1, volume: 2, claim: 1, allocated: 2, status: corev1.PersistentVolumeClaimControllerResizeInProgress}, 0},
		"nobody's turn yet":                  {of{node: 1, volume: 2, claim: 1, allocated: 2}, 0},
		"the node's turn":                    {of{node: 1, volume: 2, claim: 1, allocated: 2, status: corev1.PersistentVolumeClaimNodeResizePending}, 2},
		"it was at it":                       {of{node: 1, volume: 2, claim: 1, allocated: 2, status: corev1.PersistentVolumeClaimNodeResizeInProgress}, 2},
		"it cannot be":                       {of{node: 1, volume: 2, claim: 1, allocated: 2, status: corev1.PersistentVolumeClaimNodeResizeInfeasible}, 0},
		"less was allocated":                 {of{node: 1, volume: 5, claim: 1, allocated: 2, status: corev1.PersistentVolumeClaimNodeResizePending}, 2},
		"no more was allocated than it has":  {of{node: 2, volume: 5, claim: 2, allocated: 2}, 0},
		"done":                               {of{node: 1, volume: 2, claim: 2, allocated: 2}, 0},
		"done on another node":               {of{node: 1, volume: 2, claim: 2, allocated: 2, many: true}, 2},
		"done on another node, old resizer":  {of{node: 1, volume: 2, claim: 2, many: true}, 2},
		"done where many write, not by them": {of{node: 1, volume: 2, claim: 2, allocated: 2, many: true, others: true}, 0},
	} {
		pv := &corev1.PersistentVolume{Spec: corev1.PersistentVolumeSpec{Capacity: q(c.volume)}}
		claim := &corev1.PersistentVolumeClaim{Status: corev1.PersistentVolumeClaimStatus{Capacity: q(c.claim)}}
		if c.allocated > 0 {
			claim.Status.AllocatedResources = q(c.allocated)
		}
		if c.status != "" {
			claim.Status.AllocatedResourceStatuses = map[corev1.ResourceName]corev1.ClaimResourceStatus{corev1.ResourceStorage: c.status}
		}
		if c.many {
			claim.Spec.AccessModes = []corev1.PersistentVolumeAccessMode{corev1.ReadWriteMany}
		}
		if c.others {
			claim.Annotations = map[string]string{"volume.kubernetes.io/node-expansion-not-required": "true"}
		}
		r := &Request{PV: pv, Claim: claim, ReadOnly: c.readOnly}
		require.Equal(t, c.want*gi, growth(r, &published{Size: c.node * gi}), name)
	}
	require.Zero(t, growth(&Request{PV: &corev1.PersistentVolume{Spec: corev1.PersistentVolumeSpec{Capacity: q(2)}}}, &published{Size: gi}), "its claim is not known")
}
