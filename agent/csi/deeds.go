package csi

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	corev1 "k8s.io/api/core/v1"

	"timonel/agent/hostile"
)

// job is a deed with all that it needs. Its records are what there is when it is done.
type job struct {
	deed
	key    key
	driver *driver
	want   *Request // of the pod that it is for; nil: it is to go
	staged *staged
	rec    *published
	grow   int64
}

// Failure is what an event says of a volume that cannot be mounted.
type Failure struct{ Message string }

func (f *Failure) Error() string { return f.Message }

func failureOf(message string) error { return &Failure{message} }

// failure says, in the kubelet's words, which step of which volume failed.
func failure(r *Request, step, why string) error {
	return failureOf(fmt.Sprintf("%s failed for volume %q : %s", step, r.name(), why))
}

// name is that of the PersistentVolume, or of the pod's own volume.
func (r *Request) name() string {
	if r.PV != nil {
		return r.PV.Name
	}
	return r.Volume
}

// key is whose volume it is. One of the pod's own is called as upstream calls it.
func (r *Request) key() key {
	if r.Inline {
		return key{r.Source.Driver, "csi-" + digest(r.Pod.Namespace, string(r.Pod.UID), r.Volume)}
	}
	return key{r.PV.Spec.CSI.Driver, r.PV.Spec.CSI.VolumeHandle}
}

// do asks the driver for a deed. The job's records are changed, on the disk first, so that
// whatever ends this process, what the driver may have done is known.
func (m *Manager) do(ctx context.Context, j *job) error {
	switch j.kind {
	case stage:
		if err := m.stage(ctx, j); err != nil {
			return failure(j.want, stepOf(j.want.Block, "MountVolume.MountDevice", "MapVolume.SetUpDevice"), rpcError(err))
		}
	case publish:
		if err := m.publish(ctx, j); err != nil {
			return failure(j.want, stepOf(j.want.Block, "MountVolume.SetUp", "MapVolume.MapPodDevice"), rpcError(err))
		}
	case expand:
		if err := m.expand(ctx, j); err != nil {
			return failure(j.want, "MountVolume.NodeExpandVolume", rpcError(err))
		}
	case unpublish:
		if err := m.unpublish(ctx, j); err != nil {
			return fmt.Errorf("%s failed for volume %q : %s", stepOf(j.rec.Block, "UnmountVolume.TearDown", "UnmapVolume.UnmapPodDevice"), j.rec.Name, rpcError(err))
		}
	case unstage:
		if err := m.unstage(ctx, j); err != nil {
			return fmt.Errorf("%s failed for volume %q : %s", stepOf(j.staged.Block, "UnmountDevice", "UnmapDevice.TearDownDevice"), j.staged.Name, rpcError(err))
		}
	}
	return nil
}

func stepOf(block bool, mount, device string) string {
	if block {
		return device
	}
	return mount
}

// rpcError is an error as upstream's events have it, bounded.
func rpcError(err error) string {
	s := strings.ToValidUTF8(err.Error(), "?")
	if len(s) > maxText {
		s = strings.ToValidUTF8(s[:maxText], "") + "..."
	}
	return s
}

// isFinal says whether a driver that answered so does not work on it any more, as
// upstream's isFinalError.
func isFinal(err error) bool {
	st, ok := status.FromError(err)
	if !ok {
		return false
	}
	switch st.Code() {
	case codes.Canceled, codes.DeadlineExceeded, codes.Unavailable, codes.ResourceExhausted, codes.Aborted:
		return false
	}
	return true
}

func (m *Manager) host(path string) string { return filepath.Join(m.cfg.Root, path) }
func (m *Manager) seen(path string) string { return filepath.Join(m.cfg.Seen, path) }

// makeDir makes a folder of a path, and those above it, without following a link.
func (m *Manager) makeDir(path string) error {
	root, err := hostile.MakeRoot(m.cfg.Root, 0o711)
	if err != nil {
		return err
	}
	defer root.Close()
	// What is mounted on the folder itself is the driver's, and stays.
	if at, err := root.OpenMount(path); err == nil {
		return at.Close()
	}
	dir, err := root.MkdirAll(path, 0o750, -1, -1)
	if err != nil {
		return err
	}
	return dir.Close()
}

// clear unmounts whatever a driver left at a path, and removes it and the folder above, the
// volume's own, if there is nothing in them.
func (m *Manager) clear(path string) error {
	if err := unmountAt(m.host(path)); err != nil {
		return err
	}
	root, err := hostile.OpenRoot(m.cfg.Root)
	if err != nil {
		return err
	}
	defer root.Close()
	for i, folder := range []string{path, filepath.Dir(path)} {
		err := root.Remove(folder)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			if i > 0 || errors.Is(err, unix.ENOTEMPTY) {
				return nil // others use it, or it is removed with the pod's folder
			}
			return err
		}
	}
	return nil
}

// drop clears a path that a driver was asked to use, and then removes the record of it.
func (m *Manager) drop(path, file string) error {
	if err := m.clear(path); err != nil {
		return err
	}
	return m.records.remove(file)
}

// unmountAt unmounts what is at or below a path whose last part may be anything.
func unmountAt(path string) error {
	if points, err := hostile.MountsBelow(path); err != nil || len(points) == 0 {
		return err
	}
	return hostile.Unmount(path)
}

func (m *Manager) stage(ctx context.Context, j *job) error {
	r, src := j.want, j.want.PV.Spec.CSI
	secrets, err := m.secrets("NodeStageSecretRef", src.NodeStageSecretRef)
	if err != nil {
		return err
	}
	rec := &staged{key: j.key, Name: r.PV.Name, Block: r.Block, Attached: m.attachable(j.key.Driver), Path: stagingPath(j.key, r)}
	if j.staged != nil { // it was tried before, and is where it was then
		rec.Path, rec.Block = j.staged.Path, j.staged.Block
	}
	if err := m.makeDir(rec.Path); err != nil {
		return err
	}
	if err := m.records.save(rec.file(), rec); err != nil {
		return err
	}
	j.staged = rec
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	_, err = j.driver.client().NodeStageVolume(ctx, &csi.NodeStageVolumeRequest{
		VolumeId: j.key.Handle, PublishContext: m.publishContext(j.key), StagingTargetPath: m.seen(rec.Path),
		VolumeCapability: j.driver.capability(r), Secrets: secrets, VolumeContext: src.VolumeAttributes,
	})
	if err != nil {
		if isFinal(err) {
			return errors.Join(err, m.forgetStaged(j))
		}
		return err
	}
	rec.Done, rec.Mounted = true, mounted(m.cfg.Root, rec.Path)
	return m.records.save(rec.file(), rec)
}

func (m *Manager) forgetStaged(j *job) error {
	if err := m.drop(j.staged.Path, j.staged.file()); err != nil {
		return err
	}
	j.staged = nil
	return nil
}

func (m *Manager) unstage(ctx context.Context, j *job) error {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	if j.driver.can.stage {
		_, err := j.driver.client().NodeUnstageVolume(ctx, &csi.NodeUnstageVolumeRequest{VolumeId: j.key.Handle, StagingTargetPath: m.seen(j.staged.Path)})
		if err != nil {
			return err
		}
	}
	return m.forgetStaged(j)
}

func (m *Manager) publish(ctx context.Context, j *job) error {
	r := j.want
	if err := m.checkLifecycle(j.key.Driver, r.Inline); err != nil {
		return err
	}
	asking, cancel := context.WithTimeout(ctx, callTimeout)
	attributes, secrets, err := m.attributes(asking, j.key.Driver, r)
	cancel()
	if err != nil {
		return err
	}
	before := j.rec != nil && j.rec.Done // it is there, and is published once more
	rec := &published{
		key: j.key, user: j.user, Name: r.name(), Block: r.Block, Inline: r.Inline, Attached: !r.Inline && m.attachable(j.key.Driver),
		Staged: j.staged != nil, Path: targetPath(r),
	}
	if j.rec != nil {
		*rec = *j.rec
	}
	if err := m.makeDir(filepath.Dir(rec.Path)); err != nil {
		return err
	}
	if err := m.records.save(rec.file(), rec); err != nil {
		return err
	}
	j.rec = rec
	req := &csi.NodePublishVolumeRequest{
		VolumeId: j.key.Handle, TargetPath: m.seen(rec.Path), Readonly: r.ReadOnly || r.PV != nil && r.PV.Spec.CSI.ReadOnly,
		VolumeCapability: j.driver.capability(r), Secrets: secrets, VolumeContext: attributes,
	}
	if !r.Inline {
		req.PublishContext = m.publishContext(j.key)
		if j.staged != nil {
			req.StagingTargetPath = m.seen(j.staged.Path)
		}
	}
	call, cancel := context.WithTimeout(ctx, callTimeout)
	_, err = j.driver.client().NodePublishVolume(call, req)
	cancel()
	if err != nil {
		if isFinal(err) && !before && !j.rec.Mounted {
			return errors.Join(err, m.forgetPublished(j))
		}
		return err
	}
	if err := m.checkTarget(rec); err != nil {
		return err
	}
	if !before {
		if err := m.giveToGroup(ctx, j, rec); err != nil {
			return fmt.Errorf("applyFSGroup failed for vol %s: %w", j.key.Handle, err)
		}
	}
	rec.Done, rec.Mounted = true, mounted(m.cfg.Root, rec.Path)
	if rec.Size == 0 {
		if rec.Size = r.has(); rec.Size == 0 {
			rec.Size = size(r)
		}
	}
	return m.records.save(rec.file(), rec)
}

// checkTarget looks at what a driver left: a folder that is no link, or a block device.
func (m *Manager) checkTarget(rec *published) error {
	root, err := hostile.OpenRoot(m.cfg.Root)
	if err != nil {
		return err
	}
	defer root.Close()
	st, err := root.Lstat(rec.Path)
	if err != nil {
		return fmt.Errorf("driver %s says that the volume is there, and it is not: %w", rec.Driver, err)
	}
	want := uint32(unix.S_IFDIR)
	if rec.Block {
		want = unix.S_IFBLK
	}
	if st.Mode&unix.S_IFMT != want {
		return fmt.Errorf("driver %s left %s at the target path, not %s", rec.Driver, hostile.KindName(st.Mode), hostile.KindName(want))
	}
	return nil
}

func (m *Manager) forgetPublished(j *job) error {
	if err := m.drop(j.rec.Path, j.rec.file()); err != nil {
		return err
	}
	j.rec = nil
	return nil
}

func (m *Manager) unpublish(ctx context.Context, j *job) error {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	_, err := j.driver.client().NodeUnpublishVolume(ctx, &csi.NodeUnpublishVolumeRequest{VolumeId: j.key.Handle, TargetPath: m.seen(j.rec.Path)})
	if err != nil {
		return err
	}
	return m.forgetPublished(j)
}

// expand has the driver make the node's part of a volume as large as the volume is.
func (m *Manager) expand(ctx context.Context, j *job) error {
	rec := new(*j.rec)
	if j.driver.can.expand {
		secrets, err := m.secrets("NodeExpandSecretRef", j.want.PV.Spec.CSI.NodeExpandSecretRef)
		if err != nil {
			return err
		}
		req := &csi.NodeExpandVolumeRequest{
			VolumeId: j.key.Handle, VolumePath: m.seen(rec.Path), CapacityRange: &csi.CapacityRange{RequiredBytes: j.grow},
			VolumeCapability: j.driver.capability(j.want), Secrets: secrets,
		}
		if j.staged != nil {
			req.StagingTargetPath = m.seen(j.staged.Path)
		}
		ctx, cancel := context.WithTimeout(ctx, callTimeout)
		defer cancel()
		if _, err := j.driver.client().NodeExpandVolume(ctx, req); err != nil {
			return err
		}
		if m.cfg.Grown != nil && j.want.Claim != nil {
			if err := m.cfg.Grown(ctx, j.want.Claim, j.want.PV.Name, j.grow); err != nil {
				return fmt.Errorf("say that the claim has grown: %w", err)
			}
		}
	}
	rec.Size = j.grow
	if err := m.records.save(rec.file(), rec); err != nil {
		return err
	}
	j.rec = rec
	return nil
}

// capability is how a pod uses a volume.
func (d *driver) capability(r *Request) *csi.VolumeCapability {
	mode := corev1.ReadWriteOnce
	if r.PV != nil && len(r.PV.Spec.AccessModes) > 0 {
		mode = r.PV.Spec.AccessModes[0]
	}
	c := &csi.VolumeCapability{AccessMode: &csi.VolumeCapability_AccessMode{Mode: d.accessMode(mode)}}
	if r.Block {
		c.AccessType = &csi.VolumeCapability_Block{Block: &csi.VolumeCapability_BlockVolume{}}
		return c
	}
	mount := &csi.VolumeCapability_MountVolume{FsType: r.fsType()}
	if r.PV != nil {
		mount.MountFlags = r.PV.Spec.MountOptions
	}
	if gid := fsGroup(r.Pod); gid != nil && d.can.group {
		mount.VolumeMountGroup = strconv.FormatInt(*gid, 10)
	}
	c.AccessType = &csi.VolumeCapability_Mount{Mount: mount}
	return c
}

// accessMode is upstream's asCSIAccessModeV1 and asSingleNodeMultiWriterCapableCSIAccessModeV1.
func (d *driver) accessMode(mode corev1.PersistentVolumeAccessMode) csi.VolumeCapability_AccessMode_Mode {
	switch {
	case mode == corev1.ReadOnlyMany:
		return csi.VolumeCapability_AccessMode_MULTI_NODE_READER_ONLY
	case mode == corev1.ReadWriteMany:
		return csi.VolumeCapability_AccessMode_MULTI_NODE_MULTI_WRITER
	case mode == corev1.ReadWriteOncePod && d.can.multiWriter:
		return csi.VolumeCapability_AccessMode_SINGLE_NODE_SINGLE_WRITER
	case mode == corev1.ReadWriteOnce && d.can.multiWriter:
		return csi.VolumeCapability_AccessMode_SINGLE_NODE_MULTI_WRITER
	case mode == corev1.ReadWriteOnce, mode == corev1.ReadWriteOncePod:
		return csi.VolumeCapability_AccessMode_SINGLE_NODE_WRITER
	}
	return csi.VolumeCapability_AccessMode_UNKNOWN
}

// The paths are the kubelet's (pkg/volume/csi), beneath the root.

const pluginsDir = "plugins/kubernetes.io/csi"

func stagingPath(k key, r *Request) string {
	if r.Block {
		return filepath.Join(pluginsDir, "volumeDevices", "staging", r.PV.Name)
	}
	return filepath.Join(pluginsDir, k.Driver, digest(k.Handle), "globalmount")
}

func targetPath(r *Request) string {
	if r.Block {
		return filepath.Join(pluginsDir, "volumeDevices", "publish", r.PV.Name, string(r.Pod.UID))
	}
	return filepath.Join("pods", string(r.Pod.UID), "volumes", "kubernetes.io~csi", r.name(), "mount")
}
