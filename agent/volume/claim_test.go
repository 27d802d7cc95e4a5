package volume

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strconv"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/utils/ptr"
)

// local returns objects with a bound claim "data" whose volume is a folder of node n1.
func local() (*fakeObjects, *corev1.PersistentVolumeClaim, *corev1.PersistentVolume) {
	claim := &corev1.PersistentVolumeClaim{
		ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: "data", UID: "claim"},
		Spec:       corev1.PersistentVolumeClaimSpec{VolumeName: "pvc-1"}, Status: corev1.PersistentVolumeClaimStatus{Phase: corev1.ClaimBound},
	}
	pv := &corev1.PersistentVolume{
		ObjectMeta: metav1.ObjectMeta{Name: "pvc-1", UID: "pv", Finalizers: []string{localFinalizer}, Annotations: map[string]string{
			"pv.kubernetes.io/provisioned-by": localProvisioner, nodeAnnotation: "n1",
		}},
		Spec: corev1.PersistentVolumeSpec{
			PersistentVolumeReclaimPolicy: corev1.PersistentVolumeReclaimDelete,
			AccessModes:                   []corev1.PersistentVolumeAccessMode{corev1.ReadWriteOnce},
			ClaimRef:                      &corev1.ObjectReference{Namespace: "ns", Name: "data", UID: "claim"},
			// What it says of its path is asked by nobody.
			PersistentVolumeSource: corev1.PersistentVolumeSource{Local: &corev1.LocalVolumeSource{Path: "/etc"}},
		},
		Status: corev1.PersistentVolumeStatus{Phase: corev1.VolumeBound},
	}
	return &fakeObjects{
		claims: map[string]*corev1.PersistentVolumeClaim{"data": claim}, volumes: map[string]*corev1.PersistentVolume{"pvc-1": pv},
	}, claim, pv
}

func claimVolume(name string) corev1.Volume {
	return corev1.Volume{Name: "d", VolumeSource: corev1.VolumeSource{PersistentVolumeClaim: &corev1.PersistentVolumeClaimVolumeSource{ClaimName: name}}}
}

func podOf(uid string, v corev1.Volume) *corev1.Pod {
	pod := newPod(v)
	pod.UID = types.UID(uid)
	return pod
}

// TestLocalVolumeOutlivesPods: what one pod leaves the next one finds, and the
// folder goes when the volume is being deleted and nobody has it, not before.
func TestLocalVolumeOutlivesPods(t *testing.T) {
	t.Parallel()
	objects, claim, pv := local()
	dir := filepath.Join(t.TempDir(), "local-volumes")
	m := manager(t, Config{Objects: objects, Node: "n1", LocalDir: dir})
	path := filepath.Join(dir, "pvc-1")

	mounts, _, err := m.Setup(t.Context(), podOf("u1", claimVolume("data")), nil)
	require.NoError(t, err)
	require.Equal(t, Mounts{"d": path}, mounts)
	st, err := os.Stat(path)
	require.NoError(t, err)
	require.Equal(t, os.FileMode(0o777), st.Mode().Perm())
	require.NoError(t, os.WriteFile(filepath.Join(path, "kept"), []byte("1"), 0o600))

	// The claim is being deleted: the pod keeps it, also after the agent's start.
	now := metav1.Now()
	claim.DeletionTimestamp = &now
	again := New(m.cfg)
	_, _, err = again.Setup(t.Context(), podOf("u1", claimVolume("data")), nil)
	require.NoError(t, err)
	_, _, err = again.Setup(t.Context(), podOf("u2", claimVolume("data")), nil)
	require.ErrorContains(t, err, "can't start pod because PVC ns/data is being deleted")
	claim.DeletionTimestamp = nil

	require.NoError(t, again.Teardown(t.Context(), "u1"))
	_, _, err = again.Setup(t.Context(), podOf("u3", claimVolume("data")), nil)
	require.NoError(t, err)
	raw, err := os.ReadFile(filepath.Join(path, "kept"))
	require.NoError(t, err)
	require.Equal(t, "1", string(raw))

	volumes := []*corev1.PersistentVolume{pv}
	for what, change := range map[string]func(pv *corev1.PersistentVolume){
		"it is not being deleted": func(pv *corev1.PersistentVolume) { pv.DeletionTimestamp = nil },
		"it is bound":             func(pv *corev1.PersistentVolume) { pv.Status.Phase = corev1.VolumeBound },
		"it is to be kept": func(pv *corev1.PersistentVolume) {
			pv.Spec.PersistentVolumeReclaimPolicy = corev1.PersistentVolumeReclaimRetain
		},
		"it is another node's":  func(pv *corev1.PersistentVolume) { pv.Annotations[nodeAnnotation] = "n2" },
		"another made it":       func(pv *corev1.PersistentVolume) { pv.Annotations["pv.kubernetes.io/provisioned-by"] = "x" },
		"its finalizer is gone": func(pv *corev1.PersistentVolume) { pv.Finalizers = nil },
	} {
		other := pv.DeepCopy()
		other.DeletionTimestamp, other.Status.Phase = &now, corev1.VolumeReleased
		change(other)
		require.NoError(t, again.Teardown(t.Context(), "u3"))
		gone, err := again.DeleteLocal(t.Context(), []*corev1.PersistentVolume{other})
		require.NoError(t, err, what)
		require.Empty(t, gone, what)
		require.FileExists(t, filepath.Join(path, "kept"), what)
	}

	pv.DeletionTimestamp, pv.Status.Phase = &now, corev1.VolumeReleased
	_, _, err = again.Setup(t.Context(), podOf("u4", claimVolume("data")), nil)
	require.NoError(t, err)
	gone, err := again.DeleteLocal(t.Context(), volumes)
	require.ErrorContains(t, err, "still used by a pod")
	require.Empty(t, gone)
	require.NoError(t, again.Release(t.Context(), "u4"))
	for range 2 { // once more by an agent that does not know that it did
		gone, err = again.DeleteLocal(t.Context(), volumes)
		require.NoError(t, err)
		require.Equal(t, []types.UID{"pv"}, gone)
		require.NoDirExists(t, path)
	}
	require.DirExists(t, "/etc")
}

func TestClaimsThatCannotBeHad(t *testing.T) {
	t.Parallel()
	for name, tc := range map[string]struct {
		change func(claim *corev1.PersistentVolumeClaim, pv *corev1.PersistentVolume)
		want   string
	}{
		"pending": {func(c *corev1.PersistentVolumeClaim, _ *corev1.PersistentVolume) {
			c.Status.Phase = corev1.ClaimPending
		}, "non-bound phase"},
		"another's": {func(_ *corev1.PersistentVolumeClaim, pv *corev1.PersistentVolume) { pv.Spec.ClaimRef.UID = "x" }, "spec.claimRef.uid"},
		"another node's": {func(_ *corev1.PersistentVolumeClaim, pv *corev1.PersistentVolume) {
			pv.Annotations[nodeAnnotation] = "n2"
		}, `is on the disk of node "n2"`},
		"block": {func(_ *corev1.PersistentVolumeClaim, pv *corev1.PersistentVolume) {
			pv.Spec.VolumeMode = ptr.To(corev1.PersistentVolumeBlock)
		}, "volumeMode Block is not supported"},
		"nfs": {func(_ *corev1.PersistentVolumeClaim, pv *corev1.PersistentVolume) {
			pv.Annotations, pv.Spec.PersistentVolumeSource = nil, corev1.PersistentVolumeSource{NFS: &corev1.NFSVolumeSource{}}
		}, "volumes of type nfs are not supported"},
		"no folder": {func(_ *corev1.PersistentVolumeClaim, pv *corev1.PersistentVolume) {
			pv.Annotations, pv.Spec.Local.Path = nil, "/nowhere/at/all"
		}, `path "/nowhere/at/all" does not exist`},
		"a name that leaves the folder": {func(c *corev1.PersistentVolumeClaim, pv *corev1.PersistentVolume) {
			c.Spec.VolumeName, pv.Name = "..", ".."
		}, "has no folder on this node"},
		"affinity": {func(_ *corev1.PersistentVolumeClaim, pv *corev1.PersistentVolume) {
			pv.Spec.NodeAffinity = &corev1.VolumeNodeAffinity{Required: &corev1.NodeSelector{NodeSelectorTerms: []corev1.NodeSelectorTerm{{
				MatchExpressions: []corev1.NodeSelectorRequirement{{Key: "zone", Operator: corev1.NodeSelectorOpIn, Values: []string{"z2"}}}}}}}
		}, "is not for this node"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			objects, claim, pv := local()
			tc.change(claim, pv)
			objects.volumes = map[string]*corev1.PersistentVolume{pv.Name: pv}
			m := manager(t, Config{Objects: objects, Node: "n1", LocalDir: filepath.Join(t.TempDir(), "local"), Labels: func() map[string]string { return map[string]string{"zone": "z1"} }})
			_, _, err := m.Setup(t.Context(), podOf("u1", claimVolume("data")), nil)
			require.ErrorContains(t, err, tc.want)
		})
	}
	objects, _, _ := local()
	m := manager(t, Config{Objects: objects, Node: "n1", LocalDir: t.TempDir()})
	_, _, err := m.Setup(t.Context(), podOf("u1", claimVolume("other")), nil)
	require.ErrorContains(t, err, "PVC ns/other is not known here yet")
}

func TestReadWriteOncePodIsOnePods(t *testing.T) {
	t.Parallel()
	objects, _, pv := local()
	pv.Spec.AccessModes = []corev1.PersistentVolumeAccessMode{corev1.ReadWriteOncePod}
	m := manager(t, Config{Objects: objects, Node: "n1", LocalDir: t.TempDir()})
	_, _, err := m.Setup(t.Context(), podOf("u1", claimVolume("data")), nil)
	require.NoError(t, err)
	_, _, err = m.Setup(t.Context(), podOf("u2", claimVolume("data")), nil)
	require.ErrorContains(t, err, "ReadWriteOncePod access mode and is already in use by another pod")
	_, _, err = m.Setup(t.Context(), podOf("u1", claimVolume("data")), nil)
	require.NoError(t, err)
	require.NoError(t, m.Teardown(t.Context(), "u1"))
	_, _, err = m.Setup(t.Context(), podOf("u2", claimVolume("data")), nil)
	require.NoError(t, err)
}

// TestClaimOfFsGroup: the group may write what is there already, and what only the
// policy leaves alone stays.
func TestClaimOfFsGroup(t *testing.T) {
	t.Parallel()
	objects, _, _ := local()
	dir := t.TempDir()
	m := manager(t, Config{Objects: objects, Node: "n1", LocalDir: dir})
	path := filepath.Join(dir, "pvc-1")
	file := filepath.Join(path, "file")
	require.NoError(t, os.Mkdir(path, 0o700))
	require.NoError(t, os.WriteFile(file, nil, 0o600))
	setup := func(uid string, policy corev1.PodFSGroupChangePolicy) (folder, content unix.Stat_t) {
		pod := podOf(uid, claimVolume("data"))
		pod.Spec.SecurityContext = &corev1.PodSecurityContext{FSGroup: ptr.To(int64(4242)), FSGroupChangePolicy: &policy}
		_, _, err := m.Setup(t.Context(), pod, nil)
		require.NoError(t, err)
		require.NoError(t, unix.Stat(path, &folder))
		require.NoError(t, unix.Stat(file, &content))
		return folder, content
	}
	folder, content := setup("u1", corev1.FSGroupChangeOnRootMismatch)
	require.Equal(t, [2]uint32{4242, 0o2770}, [2]uint32{folder.Gid, folder.Mode & 0o7777})
	require.Equal(t, [2]uint32{4242, 0o660}, [2]uint32{content.Gid, content.Mode & 0o7777})
	require.NoError(t, os.Chown(file, 0, 0))
	_, content = setup("u2", corev1.FSGroupChangeOnRootMismatch)
	require.Equal(t, uint32(0), content.Gid)
	_, content = setup("u3", corev1.FSGroupChangeAlways)
	require.Equal(t, uint32(4242), content.Gid)
}

// TestEphemeralVolume: its claim is by the pod's and the volume's name, and only one
// that was made for the pod counts.
func TestEphemeralVolume(t *testing.T) {
	t.Parallel()
	objects, claim, _ := local()
	objects.claims = map[string]*corev1.PersistentVolumeClaim{"p-scratch": claim}
	claim.Name = "p-scratch"
	dir := t.TempDir()
	m := manager(t, Config{Objects: objects, Node: "n1", LocalDir: dir})
	pod := podOf("u1", corev1.Volume{Name: "scratch", VolumeSource: corev1.VolumeSource{Ephemeral: &corev1.EphemeralVolumeSource{}}})
	_, _, err := m.Setup(t.Context(), pod, nil)
	require.ErrorContains(t, err, "was not created for pod ns/p (pod is not owner)")
	claim.OwnerReferences = []metav1.OwnerReference{{APIVersion: "v1", Kind: "Pod", Name: "p", UID: "u1", Controller: ptr.To(true)}}
	mounts, _, err := m.Setup(t.Context(), pod, nil)
	require.NoError(t, err)
	require.Equal(t, Mounts{"scratch": filepath.Join(dir, "pvc-1")}, mounts)
}

func TestReadOnlyClaim(t *testing.T) {
	t.Parallel()
	v := claimVolume("data")
	require.False(t, ReadOnly(&v))
	v.PersistentVolumeClaim.ReadOnly = true
	require.True(t, ReadOnly(&v))
}

// TestOnlyAskingHasATime: what the cluster is asked for has to come soon, but a claim may
// take any time, and takes none of that.
func TestOnlyAskingHasATime(t *testing.T) {
	t.Parallel()
	objects, _, _ := local()
	var until []time.Time
	m := manager(t, Config{Objects: objects, Node: "n1", LocalDir: t.TempDir(),
		Tokens: func(ctx context.Context, _, _ string, _ *authenticationv1.TokenRequest) (*authenticationv1.TokenRequest, error) {
			deadline, ok := ctx.Deadline()
			require.True(t, ok)
			until = append(until, deadline)
			return nil, errors.New("no")
		}})
	token := func(name string) corev1.Volume {
		return corev1.Volume{Name: name, VolumeSource: corev1.VolumeSource{Projected: &corev1.ProjectedVolumeSource{
			Sources: []corev1.VolumeProjection{{ServiceAccountToken: &corev1.ServiceAccountTokenProjection{Path: "token"}}},
		}}}
	}
	_, _, err := m.Setup(context.Background(), newPod(token("a"), token("b"), claimVolume("data"), token("c")), nil)
	require.Error(t, err)
	require.Len(t, until, 3)
	require.Equal(t, until[0], until[1], "together")
	require.True(t, until[2].After(until[1]))
}

// TestALargeVolumeKeepsNoOther: one of very many files is deleted in turns.
func TestALargeVolumeKeepsNoOther(t *testing.T) {
	t.Parallel()
	objects, _, large := local()
	dir := t.TempDir()
	m := manager(t, Config{Objects: objects, Node: "n1", LocalDir: dir})
	m.deleteTurn = 20 * time.Millisecond
	large.DeletionTimestamp, large.Status.Phase = &metav1.Time{Time: time.Now()}, corev1.VolumeReleased
	small := large.DeepCopy()
	small.Name, small.UID = "pvc-2", "pv-2"
	require.NoError(t, os.Mkdir(filepath.Join(dir, "pvc-1"), 0o700))
	require.NoError(t, os.Mkdir(filepath.Join(dir, "pvc-2"), 0o700))
	for i := range 20_000 {
		require.NoError(t, os.WriteFile(filepath.Join(dir, "pvc-1", strconv.Itoa(i)), nil, 0o600))
	}
	both := []*corev1.PersistentVolume{large, small}
	gone, err := m.DeleteLocal(t.Context(), both)
	require.ErrorContains(t, err, `PersistentVolume "pvc-1"`)
	require.Equal(t, []types.UID{"pv-2"}, gone)
	require.NoDirExists(t, filepath.Join(dir, "pvc-2"))
	for turns := 0; err != nil; turns++ {
		require.Less(t, turns, 5_000)
		gone, err = m.DeleteLocal(t.Context(), both)
	}
	require.Equal(t, []types.UID{"pv", "pv-2"}, gone)
	require.NoDirExists(t, filepath.Join(dir, "pvc-1"))
}
