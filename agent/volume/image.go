package volume

import (
	"context"
	"errors"
	"fmt"
	"io/fs"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"

	"timonel/agent/hostile"
)

const imagePlugin = "image"

// Images shows what images hold.
type Images interface {
	// MountView mounts an image, read-only, on a folder, and keeps what it needs for it
	// under a key, until RemoveView.
	MountView(ctx context.Context, key, image, target string) error
	// RemoveView forgets a key, when there is nothing mounted any more. One that is not
	// known is no error.
	RemoveView(ctx context.Context, key string) error
}

// viewKey names the view of a pod's volume.
func viewKey(uid types.UID, volume string) string {
	return "timonel-volume-" + string(uid) + "-" + volume
}

// image makes the folder on which the image is mounted once it is on the node, and says
// where that is.
func (m *Manager) image(pod *corev1.Pod, name string) (string, error) {
	parent, err := m.pluginDir(pod.UID, imagePlugin)
	if err != nil {
		return "", err
	}
	defer parent.Close()
	at, err := parent.OpenMountOrMake(name, 0o755, -1, -1)
	if err != nil {
		return "", err
	}
	return m.path(pod.UID, imagePlugin, name), at.Close()
}

// HasImage says whether a pod's volume shows its image. It is the same one for as long as
// the pod lives, and is not asked for again.
func (m *Manager) HasImage(pod *corev1.Pod, name string) (bool, error) {
	parent, err := m.pluginDir(pod.UID, imagePlugin)
	if err != nil {
		return false, err
	}
	defer parent.Close()
	at, err := parent.OpenMount(name)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	defer at.Close()
	mounted, _, err := at.IsMountPoint()
	return mounted, err
}

// MountImage makes a pod's volume, which Setup has made the folder of, show an image that
// is on the node.
func (m *Manager) MountImage(ctx context.Context, pod *corev1.Pod, name, image string) error {
	path, err := m.image(pod, name)
	if err != nil {
		return err
	}
	return m.cfg.Images.MountView(ctx, viewKey(pod.UID, name), image, path)
}

// removeViews lets go of the images of a pod's volumes, which are not mounted any more.
func (m *Manager) removeViews(ctx context.Context, uid types.UID) error {
	dir, err := hostile.OpenRoot(m.pluginPath(uid, imagePlugin))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer dir.Close()
	var failed error
	err = dir.Names(func(name string) bool {
		failed = m.cfg.Images.RemoveView(ctx, viewKey(uid, name))
		return failed == nil
	})
	if err = errors.Join(err, failed); err != nil {
		return fmt.Errorf("volumes of images: %w", err)
	}
	return nil
}
