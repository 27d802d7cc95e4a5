package volume

import (
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
	if filepath.Dir(volume) == filepath.Dir(m.path(pod.UID, imagePlugin, "v")) {
		find = root.Pin // nothing can be made in an image
	}
	source, err := find(sub)
	if err != nil {
		return "", fmt.Errorf("subPath %q: %w", sub, err)
	}
	defer source.Close()

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
		return "", fmt.Errorf("bind subPath %q: %w", sub, err)
	}
	return target, nil
}
