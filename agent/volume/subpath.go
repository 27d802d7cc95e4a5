package volume

import (
	"errors"
	"fmt"
	"path/filepath"
	"strconv"

	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"

	"timonel/agent/hostile"
)

// SubPath returns a host path that shows sub inside volume for one container's
// mount. What sub leads to is found without opening it and is mounted, as that
// very file or folder, in a place that no container sees: whatever a container
// in the same pod does to the volume afterwards, the runtime mounts the one that
// was looked at. Regular files and folders only; links may lead to what is in
// the volume. Missing folders are made, with the mode of the volume's own; in
// an image none is.
func (m *Manager) SubPath(pod *corev1.Pod, container string, index int, volume, sub string) (string, error) {
	if !filepath.IsLocal(sub) {
		return "", fmt.Errorf("subPath %q must stay inside the volume", sub)
	}
	root, err := hostile.OpenRoot(volume)
	if err != nil {
		return "", fmt.Errorf("subPath %q: %w", sub, err)
	}
	defer root.Close()
	find := root.PinOrMake
	if filepath.Dir(volume) == m.pluginPath(pod.UID, imagePlugin) {
		find = root.Pin // nothing can be made in an image
	}
	source, err := find(sub)
	if err != nil {
		return "", fmt.Errorf("subPath %q: %w", sub, err)
	}
	defer source.Close()

	return m.pinned(pod, container, index, source)
}

// Sealed returns a host path that shows what is at path, of a volume or as SubPath found
// it, with all that is mounted below it now, for one container's mount: and none of it can
// be written to, which runtimes before containerd 2.0 see to for the topmost mount alone.
// Only Linux from 5.12 on can do it. Below what is no folder, or not there yet, nothing is
// mounted: it is returned as it is.
func (m *Manager) Sealed(pod *corev1.Pod, container string, index int, path string) (string, error) {
	target := filepath.Join(m.PodDir(pod.UID), "subpaths", container, strconv.Itoa(index))
	if path != target { // it is no subPath
		root, err := hostile.OpenRoot(path)
		if errors.Is(err, unix.ENOTDIR) || errors.Is(err, unix.ENOENT) {
			return path, nil
		}
		if err != nil {
			return "", err
		}
		defer root.Close()
		source, err := root.Pin(".")
		if err != nil {
			return "", err
		}
		defer source.Close()
		if _, err = m.pinned(pod, container, index, source); err != nil {
			return "", err
		}
	}
	// Private, so that what is mounted in the volume later does not come in here.
	attr := &unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY, Propagation: unix.MS_PRIVATE}
	if err := unix.MountSetattr(unix.AT_FDCWD, target, unix.AT_RECURSIVE|unix.AT_SYMLINK_NOFOLLOW, attr); err != nil {
		return "", fmt.Errorf("make %s read-only with all below it: %w", target, err)
	}
	return target, nil
}

// pinned mounts a file or a folder where no container sees it, for one container's mount.
func (m *Manager) pinned(pod *corev1.Pod, container string, index int, source *hostile.Pinned) (string, error) {
	folder, err := m.podSubDir(pod.UID, filepath.Join("subpaths", container))
	if err != nil {
		return "", err
	}
	defer folder.Close()
	name := strconv.Itoa(index)
	target := filepath.Join(m.PodDir(pod.UID), "subpaths", container, name)
	if err := hostile.Unmount(target); err != nil { // of the container before
		return "", err
	}
	// Never with what is in it: that would be the volume's, were it still mounted.
	if err := folder.Remove(name); err != nil {
		return "", err
	}
	if source.IsDir() {
		at, err := folder.Mkdir(name, 0o750, -1, -1)
		if err != nil {
			return "", err
		}
		at.Close()
	} else if err := folder.Create(name, nil, 0o640, -1, -1); err != nil {
		return "", err
	}
	if err := unix.Mount(source.Path(), target, "", unix.MS_BIND|unix.MS_REC, ""); err != nil {
		return "", fmt.Errorf("bind for the mount %d of container %s: %w", index, container, err)
	}
	return target, nil
}
