//go:build e2e

package e2e

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"
	storagev1 "k8s.io/api/storage/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"

	"timonel/test/harness"
)

const (
	plainDriver    = "plain.example" // nobody attaches its volumes
	attachedDriver = "attached.example"
	rackLabel      = "topology.example/rack"
)

// csiWorld is a cluster with two drivers on its first node.
type csiWorld struct {
	*harness.Cluster
	t               *testing.T
	client          *kubernetes.Clientset
	disk            string
	plain, attached *runningDriver
}

// TestCSI: drivers of the node's register, and their volumes do all that they do with a
// kubelet: by claims, as a pod's own, attached by others, grown, and over the agent's end.
func TestCSI(t *testing.T) {
	t.Parallel()
	c := harness.Up(t, harness.Options{Controllers: 3, Agents: 2})
	w := &csiWorld{Cluster: c, t: t, client: c.Client(t, ""), disk: t.TempDir()}
	w.makeDrivers()
	w.makeVolume(plainDriver, "plain", "pv-plain")
	w.makeVolume(attachedDriver, "attached", "pv-attached")
	w.requireRegistered()

	// A claim's volume, and one of the pod's own, which are made anew with the pod.
	w.makePod("app", "plain", true)
	w.requireRunning("app")
	require.Equal(t, "hello\n", w.read("app", "/data/f"))
	require.Equal(t, "hello\n", w.read("app", "/own/f"))
	require.Equal(t, "2000\n", w.Run(t, "kubectl", "exec", "app", "--", "stat", "-c", "%g", "/data/f"), "the fsGroup")
	staged, published := w.plain.of("NodeStageVolume"), w.plain.of("NodePublishVolume")
	require.Len(t, staged, 1)
	require.Equal(t, map[string]string{"key": "of staging"}, staged[0].Secrets)
	require.Len(t, published, 2, "%+v", published)
	for _, p := range published {
		require.Equal(t, "app", p.Context["csi.storage.k8s.io/pod.name"])
		if own := p.Volume != "plain"; own {
			require.Equal(t, "true", p.Context["csi.storage.k8s.io/ephemeral"])
			require.Equal(t, map[string]string{"key": "of the pod"}, p.Secrets)
		} else {
			require.Equal(t, "a", p.Context["attribute"])
		}
	}
	harness.Eventually(t, time.Minute, "figures of the claim's volume", func() error {
		out, err := w.Try(t.Context(), "kubectl", "get", "--raw", "/api/v1/nodes/a1/proxy/stats/summary")
		if err == nil && !strings.Contains(strings.Join(strings.Fields(out), ""), `"pvcRef":{"name":"plain","namespace":"default"}`) {
			err = errors.New("it has none")
		}
		return err
	})
	w.deletePod("app")
	w.requireNothingLeft()
	require.Len(t, w.plain.of("NodeUnpublishVolume"), 2)
	require.Len(t, w.plain.of("NodeUnstageVolume"), 1)
	w.makePod("app", "plain", true)
	w.requireRunning("app")
	require.Equal(t, "hello\nhello\n", w.read("app", "/data/f"), "it finds what it wrote")
	require.Equal(t, "hello\n", w.read("app", "/own/f"), "that is another")

	// The attach/detach controller asks for an attachment, an external-attacher attaches.
	id := fmt.Sprintf("csi-%x", sha256.Sum256([]byte("attached"+attachedDriver+"a1")))
	attachments := w.client.StorageV1().VolumeAttachments()
	w.makePod("attached", "attached", false)
	var va *storagev1.VolumeAttachment
	harness.Eventually(t, time.Minute, "a VolumeAttachment", func() (err error) {
		va, err = attachments.Get(t.Context(), id, metav1.GetOptions{})
		return err
	})
	require.Equal(t, attachedDriver, va.Spec.Attacher)
	require.Equal(t, "pv-attached", *va.Spec.Source.PersistentVolumeName)
	harness.For(t, 3*time.Second, "nothing is mounted that is not attached", func() error {
		if calls := w.attached.of(""); len(calls) > 0 {
			return fmt.Errorf("%+v", calls)
		}
		return nil
	})
	va.Finalizers = []string{"external-attacher/attached-example"}
	va, err := attachments.Update(t.Context(), va, metav1.UpdateOptions{})
	require.NoError(t, err)
	va.Status = storagev1.VolumeAttachmentStatus{Attached: true, AttachmentMetadata: map[string]string{"device": "d7"}}
	_, err = attachments.UpdateStatus(t.Context(), va, metav1.UpdateOptions{})
	require.NoError(t, err)
	t.Logf("attached: the pod runs after %s", w.requireRunning("attached"))
	require.Equal(t, "hello\n", w.read("attached", "/data/f"))
	require.Equal(t, "d7", w.attached.of("NodeStageVolume")[0].Context["device"])
	require.Equal(t, "d7", w.attached.of("NodePublishVolume")[0].Context["device"])

	// The agent dies, and nothing of this is mounted or asked for again.
	mounts := driverMounts(t, c, "a1")
	require.Len(t, mounts, 5, "%q", mounts)
	require.Len(t, slices.Compact(slices.Clone(mounts)), 5, "%q", mounts)
	plainCalls, attachedCalls := w.plain.of(""), w.attached.of("")
	containers := w.containers("app", "attached")
	for range 3 { // the driver, the controllers and the pods are back in any order
		c.Kill(t, "a1", true)
		c.Start(t, "a1")
		w.requireRegistered()
		harness.For(t, 3*time.Second, "nothing is done again", func() error {
			switch now := driverMounts(t, c, "a1"); {
			case !slices.Equal(mounts, now):
				return fmt.Errorf("mounts were %q and are %q", mounts, now)
			case len(w.plain.of("")) != len(plainCalls) || len(w.attached.of("")) != len(attachedCalls):
				return fmt.Errorf("drivers were asked for %+v and %+v", w.plain.of("")[len(plainCalls):], w.attached.of("")[len(attachedCalls):])
			}
			return nil
		})
	}
	require.Equal(t, containers, w.containers("app", "attached"))

	w.requireGrown("plain", "pv-plain", w.plain, false)
	w.requireGrown("attached", "pv-attached", w.attached, true)

	// Pods that end while the agent is dead leave nothing, and a volume is given back
	// when the driver has let it go.
	w.deletePod("app")
	require.NoError(t, w.client.CoreV1().Pods("default").Delete(t.Context(), "attached", metav1.DeleteOptions{}))
	c.Kill(t, "a1", true)
	c.Start(t, "a1")
	harness.Eventually(t, time.Minute, "the VolumeAttachment is to go", func() error {
		va, err := attachments.Get(t.Context(), id, metav1.GetOptions{})
		if err == nil && va.DeletionTimestamp == nil {
			err = errors.New("it stays")
		}
		return err
	})
	require.Len(t, w.attached.of("NodeUnstageVolume"), 1, "nothing is detached that is staged")
	va, err = attachments.Get(t.Context(), id, metav1.GetOptions{})
	require.NoError(t, err)
	va.Finalizers = nil
	_, err = attachments.Update(t.Context(), va, metav1.UpdateOptions{})
	require.NoError(t, err)
	w.requireGone("attached")
	w.requireNothingLeft()
	harness.Eventually(t, time.Minute, "the Node has no volume", func() error {
		node, err := w.client.CoreV1().Nodes().Get(t.Context(), "a1", metav1.GetOptions{})
		if err == nil && len(node.Status.VolumesInUse)+len(node.Status.VolumesAttached) > 0 {
			err = fmt.Errorf("in use: %v, attached: %v", node.Status.VolumesInUse, node.Status.VolumesAttached)
		}
		return err
	})
	_, err = attachments.Get(t.Context(), id, metav1.GetOptions{})
	require.True(t, apierrors.IsNotFound(err), "%v", err)
	said, err := os.ReadFile(filepath.Join(w.disk, "attached", "f"))
	require.NoError(t, err)
	require.Equal(t, "hello\n", string(said), "what it wrote stays")
}

// makeDrivers installs both drivers, as their manifests would.
func (w *csiWorld) makeDrivers() {
	w.t.Helper()
	ctx := w.t.Context()
	file := storagev1.FileFSGroupPolicy
	for name, spec := range map[string]storagev1.CSIDriverSpec{
		plainDriver: {AttachRequired: new(false), PodInfoOnMount: new(true), FSGroupPolicy: &file,
			VolumeLifecycleModes: []storagev1.VolumeLifecycleMode{storagev1.VolumeLifecyclePersistent, storagev1.VolumeLifecycleEphemeral}},
		attachedDriver: {AttachRequired: new(true), FSGroupPolicy: &file},
	} {
		_, err := w.client.StorageV1().CSIDrivers().Create(ctx, &storagev1.CSIDriver{ObjectMeta: metav1.ObjectMeta{Name: name}, Spec: spec}, metav1.CreateOptions{})
		require.NoError(w.t, err)
	}
	for namespace, value := range map[string]string{"kube-system": "of staging", "default": "of the pod"} {
		_, err := w.client.CoreV1().Secrets(namespace).Create(ctx, &corev1.Secret{
			ObjectMeta: metav1.ObjectMeta{Name: "driver"}, StringData: map[string]string{"key": value}}, metav1.CreateOptions{})
		require.NoError(w.t, err)
	}
	_, err := w.client.StorageV1().StorageClasses().Create(ctx, &storagev1.StorageClass{
		ObjectMeta: metav1.ObjectMeta{Name: "grows"}, Provisioner: plainDriver, AllowVolumeExpansion: new(true)}, metav1.CreateOptions{})
	require.NoError(w.t, err)
	w.plain = startDriver(w.t, w.Cluster, "a1", driverProcess{Name: plainDriver, Dir: w.disk, NodeID: "n-1", Segments: map[string]string{rackLabel: "r1"}, MaxVolumes: 5})
	w.attached = startDriver(w.t, w.Cluster, "a1", driverProcess{Name: attachedDriver, Dir: w.disk, NodeID: "i-7"})
}

// makeVolume makes a claim with a volume that can be had where plain.example is.
func (w *csiWorld) makeVolume(driver, claim, volume string) {
	w.t.Helper()
	require.NoError(w.t, os.Mkdir(filepath.Join(w.disk, claim), 0o755))
	ctx, size := w.t.Context(), corev1.ResourceList{corev1.ResourceStorage: resource.MustParse("1Gi")}
	secret, modes := &corev1.SecretReference{Namespace: "kube-system", Name: "driver"}, []corev1.PersistentVolumeAccessMode{corev1.ReadWriteOnce}
	_, err := w.client.CoreV1().PersistentVolumes().Create(ctx, &corev1.PersistentVolume{
		ObjectMeta: metav1.ObjectMeta{Name: volume},
		Spec: corev1.PersistentVolumeSpec{
			Capacity: size, AccessModes: modes, StorageClassName: "grows", PersistentVolumeReclaimPolicy: corev1.PersistentVolumeReclaimRetain,
			NodeAffinity: &corev1.VolumeNodeAffinity{Required: &corev1.NodeSelector{NodeSelectorTerms: []corev1.NodeSelectorTerm{{
				MatchExpressions: []corev1.NodeSelectorRequirement{{Key: rackLabel, Operator: corev1.NodeSelectorOpIn, Values: []string{"r1"}}}}}}},
			PersistentVolumeSource: corev1.PersistentVolumeSource{CSI: &corev1.CSIPersistentVolumeSource{
				Driver: driver, VolumeHandle: claim, VolumeAttributes: map[string]string{"attribute": "a"}, NodeStageSecretRef: secret, NodeExpandSecretRef: secret}},
		},
	}, metav1.CreateOptions{})
	require.NoError(w.t, err)
	_, err = w.client.CoreV1().PersistentVolumeClaims("default").Create(ctx, &corev1.PersistentVolumeClaim{
		ObjectMeta: metav1.ObjectMeta{Name: claim},
		Spec: corev1.PersistentVolumeClaimSpec{AccessModes: modes, VolumeName: volume, StorageClassName: new("grows"),
			Resources: corev1.VolumeResourceRequirements{Requests: size}},
	}, metav1.CreateOptions{})
	require.NoError(w.t, err)
}

// requireRegistered waits until the API says both drivers of the node.
func (w *csiWorld) requireRegistered() {
	w.t.Helper()
	harness.Eventually(w.t, time.Minute, "the CSINode and the Node say the drivers", func() error {
		csiNode, err := w.client.StorageV1().CSINodes().Get(w.t.Context(), "a1", metav1.GetOptions{})
		if err != nil {
			return err
		}
		node, err := w.client.CoreV1().Nodes().Get(w.t.Context(), "a1", metav1.GetOptions{})
		if err != nil {
			return err
		}
		said := map[string]storagev1.CSINodeDriver{}
		for _, d := range csiNode.Spec.Drivers {
			said[d.Name] = d
		}
		plain, attached := said[plainDriver], said[attachedDriver]
		switch {
		case len(said) != 2 || plain.NodeID != "n-1" || attached.NodeID != "i-7" || !slices.Equal(plain.TopologyKeys, []string{rackLabel}),
			plain.Allocatable == nil || plain.Allocatable.Count == nil || *plain.Allocatable.Count != 5:
			return fmt.Errorf("CSINode has %+v", csiNode.Spec.Drivers)
		case len(csiNode.OwnerReferences) != 1 || csiNode.OwnerReferences[0].UID != node.UID:
			return fmt.Errorf("CSINode is owned by %+v", csiNode.OwnerReferences)
		case node.Labels[rackLabel] != "r1":
			return fmt.Errorf("the Node has labels %v", node.Labels)
		case node.Annotations["csi.volume.kubernetes.io/nodeid"] != `{"attached.example":"i-7","plain.example":"n-1"}`:
			return fmt.Errorf("the Node has annotations %v", node.Annotations)
		}
		return nil
	})
}

// makePod makes a pod, of no user that the volume is of, that adds a line to a file of
// each of its volumes.
func (w *csiWorld) makePod(name, claim string, own bool) {
	w.t.Helper()
	p := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: name}, Spec: corev1.PodSpec{
		TerminationGracePeriodSeconds: new(int64),
		SecurityContext:               &corev1.PodSecurityContext{RunAsUser: new(int64(1000)), FSGroup: new(int64(2000))},
		Volumes: []corev1.Volume{{Name: "data", VolumeSource: corev1.VolumeSource{
			PersistentVolumeClaim: &corev1.PersistentVolumeClaimVolumeSource{ClaimName: claim}}}},
		Containers: []corev1.Container{{Name: "c", Image: "docker.io/timonel/busybox:latest", ImagePullPolicy: corev1.PullIfNotPresent,
			Command:      []string{"sh", "-c", `for d in /data /own; do if [ -d $d ]; then echo hello >> $d/f || exit 1; fi; done; touch /tmp/done; exec sleep 86400`},
			VolumeMounts: []corev1.VolumeMount{{Name: "data", MountPath: "/data"}, {Name: "tmp", MountPath: "/tmp"}},
			ReadinessProbe: &corev1.Probe{PeriodSeconds: 1, ProbeHandler: corev1.ProbeHandler{
				Exec: &corev1.ExecAction{Command: []string{"cat", "/tmp/done"}}}}}},
	}}
	p.Spec.Volumes = append(p.Spec.Volumes, corev1.Volume{Name: "tmp", VolumeSource: corev1.VolumeSource{EmptyDir: &corev1.EmptyDirVolumeSource{}}})
	if own {
		p.Spec.Volumes = append(p.Spec.Volumes, corev1.Volume{Name: "own", VolumeSource: corev1.VolumeSource{CSI: &corev1.CSIVolumeSource{
			Driver: plainDriver, NodePublishSecretRef: &corev1.LocalObjectReference{Name: "driver"}}}})
		p.Spec.Containers[0].VolumeMounts = append(p.Spec.Containers[0].VolumeMounts, corev1.VolumeMount{Name: "own", MountPath: "/own"})
	}
	_, err := w.client.CoreV1().Pods("default").Create(w.t.Context(), p, metav1.CreateOptions{})
	require.NoError(w.t, err)
}

func (w *csiWorld) requireRunning(name string) time.Duration {
	w.t.Helper()
	return harness.Eventually(w.t, 90*time.Second, "pod "+name+" is ready", func() error {
		p, err := w.client.CoreV1().Pods("default").Get(w.t.Context(), name, metav1.GetOptions{})
		if err != nil {
			return err
		}
		if s := p.Status.ContainerStatuses; len(s) != 1 || !s[0].Ready {
			out, _ := w.Try(context.WithoutCancel(w.t.Context()), "kubectl", "get", "events", "--field-selector", "involvedObject.name="+name)
			return fmt.Errorf("on %q: %+v\n%s", p.Spec.NodeName, s, out)
		}
		return nil
	})
}

func (w *csiWorld) read(pod, path string) string {
	w.t.Helper()
	return w.Run(w.t, "kubectl", "exec", pod, "--", "cat", path)
}

// containers are the ids of pods' containers, and how often they were started.
func (w *csiWorld) containers(pods ...string) (out []string) {
	w.t.Helper()
	for _, name := range pods {
		p, err := w.client.CoreV1().Pods("default").Get(w.t.Context(), name, metav1.GetOptions{})
		require.NoError(w.t, err)
		for _, s := range p.Status.ContainerStatuses {
			out = append(out, fmt.Sprintf("%s %s %d", name, s.ContainerID, s.RestartCount))
		}
	}
	return out
}

func (w *csiWorld) deletePod(name string) {
	w.t.Helper()
	require.NoError(w.t, w.client.CoreV1().Pods("default").Delete(w.t.Context(), name, metav1.DeleteOptions{}))
	w.requireGone(name)
}

func (w *csiWorld) requireGone(name string) {
	w.t.Helper()
	harness.Eventually(w.t, time.Minute, "pod "+name+" goes", func() error {
		_, err := w.client.CoreV1().Pods("default").Get(w.t.Context(), name, metav1.GetOptions{})
		if err == nil {
			return errors.New("it is there")
		}
		if apierrors.IsNotFound(err) {
			return nil
		}
		return err
	})
}

// requireNothingLeft waits until no driver has anything mounted on the node, and the agent
// has no record of it.
func (w *csiWorld) requireNothingLeft() {
	w.t.Helper()
	harness.Eventually(w.t, 30*time.Second, "nothing is left of volumes", func() error {
		records, err := filepath.Glob(filepath.Join(w.Spec.DataDir("a1"), "csi", "*", "*"))
		if mounts := driverMounts(w.t, w.Cluster, "a1"); err == nil && len(mounts)+len(records) > 0 {
			err = fmt.Errorf("mounts %q, records %q", mounts, records)
		}
		return err
	})
}

// requireGrown has a claim grown, as its user and an external-resizer do, and waits until
// the node's driver was told and the claim says so. A resizer that allocates says when it
// is the node's turn.
func (w *csiWorld) requireGrown(claim, volume string, d *runningDriver, allocates bool) {
	w.t.Helper()
	ctx, larger := w.t.Context(), resource.MustParse("2Gi")
	claims, volumes := w.client.CoreV1().PersistentVolumeClaims("default"), w.client.CoreV1().PersistentVolumes()
	change := func(what string, f func(*corev1.PersistentVolumeClaim)) {
		w.t.Helper()
		harness.Eventually(w.t, 10*time.Second, what, func() error { // others write it, too
			pvc, err := claims.Get(ctx, claim, metav1.GetOptions{})
			if err != nil {
				return err
			}
			f(pvc)
			_, err = claims.UpdateStatus(ctx, pvc, metav1.UpdateOptions{})
			return err
		})
	}
	is := func(s corev1.ClaimResourceStatus) map[corev1.ResourceName]corev1.ClaimResourceStatus {
		return map[corev1.ResourceName]corev1.ClaimResourceStatus{corev1.ResourceStorage: s}
	}
	patch := []byte(`{"spec":{"resources":{"requests":{"storage":"2Gi"}}}}`)
	_, err := claims.Patch(ctx, claim, types.MergePatchType, patch, metav1.PatchOptions{})
	require.NoError(w.t, err)
	change("the resizer grows it", func(pvc *corev1.PersistentVolumeClaim) {
		resizing := corev1.PersistentVolumeClaimResizing
		if allocates {
			pvc.Status.AllocatedResources = corev1.ResourceList{corev1.ResourceStorage: larger}
			pvc.Status.AllocatedResourceStatuses = is(corev1.PersistentVolumeClaimControllerResizeInProgress)
		} else {
			resizing = corev1.PersistentVolumeClaimFileSystemResizePending
		}
		pvc.Status.Conditions = append(pvc.Status.Conditions, corev1.PersistentVolumeClaimCondition{Type: resizing, Status: corev1.ConditionTrue})
	})
	_, err = volumes.Patch(ctx, volume, types.MergePatchType, []byte(`{"spec":{"capacity":{"storage":"2Gi"}}}`), metav1.PatchOptions{})
	require.NoError(w.t, err)
	if allocates {
		harness.For(w.t, 2*time.Second, "it is not the node's turn", func() error {
			if calls := d.of("NodeExpandVolume"); len(calls) > 0 {
				return fmt.Errorf("%+v", calls)
			}
			return nil
		})
		change("it is the node's turn", func(pvc *corev1.PersistentVolumeClaim) {
			pvc.Status.AllocatedResourceStatuses = is(corev1.PersistentVolumeClaimNodeResizePending)
		})
	}
	took := harness.Eventually(w.t, time.Minute, "claim "+claim+" has grown", func() error {
		pvc, err := claims.Get(ctx, claim, metav1.GetOptions{})
		if err != nil {
			return err
		}
		waits := len(pvc.Status.AllocatedResourceStatuses) > 0 || slices.ContainsFunc(pvc.Status.Conditions, func(c corev1.PersistentVolumeClaimCondition) bool {
			return c.Type == corev1.PersistentVolumeClaimFileSystemResizePending || c.Type == corev1.PersistentVolumeClaimResizing
		})
		if has := pvc.Status.Capacity[corev1.ResourceStorage]; has.Cmp(larger) != 0 || waits {
			return fmt.Errorf("its status is %+v", pvc.Status)
		}
		return nil
	})
	w.t.Logf("claim %s has grown after %s", claim, took)
	calls := d.of("NodeExpandVolume")
	require.Len(w.t, calls, 1)
	require.Equal(w.t, larger.Value(), calls[0].Bytes)
	require.Equal(w.t, map[string]string{"key": "of staging"}, calls[0].Secrets)
}
