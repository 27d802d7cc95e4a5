package volume

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"

	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/component-helpers/resource"
	"k8s.io/kubernetes/pkg/apis/core/v1/helper/qos"

	"timonel/agent/hostile"
)

// pluginDir opens the folder in which a pod's volumes of one type are.
func (m *Manager) pluginDir(uid types.UID, plugin string) (*hostile.Root, error) {
	return m.podSubDir(uid, pluginName(plugin))
}

// podSubDir opens a folder below a pod's own, which is made when missing.
func (m *Manager) podSubDir(uid types.UID, name string) (*hostile.Root, error) {
	parent, err := hostile.MakeRoot(m.cfg.Dir, 0o750)
	if err != nil {
		return nil, err
	}
	defer parent.Close()
	return parent.MkdirAll(filepath.Join(string(uid), name), 0o750, -1, -1)
}

// write brings a volume of API data up to date. Each has a tmpfs of its own,
// just as large as it has to be: nothing in it is on the disk, and nothing can
// be made in it that is a name for something outside of it.
func (p *payload) write(plugin, volume string) (string, error) {
	c := &content{files: p.files, gid: fsGroup(p.pod)}
	parent, err := p.manager.pluginDir(p.pod.UID, plugin)
	if err != nil {
		return "", err
	}
	defer parent.Close()
	path := p.manager.path(p.pod.UID, plugin, volume)
	root, err := apiFolder(parent, volume, path, c)
	if err != nil {
		return "", err
	}
	defer root.Close()
	return path, writeAtomic(p.ctx, root, c)
}

// apiFolder opens the folder of a volume of API data, with a tmpfs mounted on it
// that has room for what is in it and for c. A folder that an agent before this
// one filled on the disk stays as it is, for containers have it mounted.
func apiFolder(parent *hostile.Root, name, path string, c *content) (*hostile.Root, error) {
	mode, gid := c.dirMode()
	at, err := parent.OpenMountOrMake(name, mode, -1, gid)
	if err != nil {
		return nil, err
	}
	mounted, magic, err := at.IsMountPoint()
	if err == nil && mounted && magic != unix.TMPFS_MAGIC {
		err = fmt.Errorf("%s: something that the agent did not mount is mounted there", path)
	}
	onDisk := false
	if err == nil && !mounted {
		onDisk, err = at.Exists(dataLink)
	}
	if err != nil {
		at.Close()
		return nil, err
	}
	if onDisk {
		return at, nil
	}
	// Old and new version are there at once for a moment.
	bytes, inodes := c.size()
	bytes, inodes = 2*bytes+(1<<20), 2*inodes+64
	if !mounted {
		at.Close()
		if err := mountTmpfs(path, 0, fmt.Sprintf("mode=%04o,size=%d,nr_inodes=%d%s", mode, bytes, inodes, gidOption(gid))); err != nil {
			return nil, err
		}
		return parent.OpenMount(name)
	}
	st, err := at.Statfs()
	if err == nil && (int64(st.Blocks)*st.Bsize < bytes || int64(st.Files) < inodes) {
		err = mountTmpfs(path, unix.MS_REMOUNT, fmt.Sprintf("size=%d,nr_inodes=%d",
			max(bytes, int64(st.Blocks)*st.Bsize), max(inodes, int64(st.Files))))
	}
	if err != nil {
		at.Close()
		return nil, err
	}
	return at, nil
}

func gidOption(gid int) string {
	if gid < 0 {
		return ""
	}
	return fmt.Sprintf(",gid=%d", gid)
}

// certificatesDir of a pod's folder has a record for each podCertificate source, on a
// tmpfs, so that a key outlives the agent and never the machine.
const certificatesDir = "certificates"

// certificateRecords opens the folder of the pod's keys. Its size is a bound alone: what
// it holds counts as the pod's volumes do.
func (p *payload) certificateRecords() (*hostile.Root, error) {
	parent, err := p.manager.podSubDir(p.pod.UID, "")
	if err != nil {
		return nil, err
	}
	defer parent.Close()
	at, err := parent.OpenMountOrMake(certificatesDir, 0o700, -1, -1)
	if err != nil {
		return nil, err
	}
	if mounted, _, err := at.IsMountPoint(); mounted && err == nil {
		return at, nil
	}
	at.Close()
	path := filepath.Join(p.manager.PodDir(p.pod.UID), certificatesDir)
	if err := mountTmpfs(path, 0, fmt.Sprintf("mode=0700,size=%d", p.manager.apiRoom())); err != nil {
		return nil, err
	}
	return parent.OpenMount(certificatesDir)
}

// mountTmpfs mounts one that is never swapped to a disk, where the kernel can
// promise that (6.4).
func mountTmpfs(path string, flags uintptr, options string) error {
	flags |= unix.MS_NOSUID | unix.MS_NODEV
	err := unix.Mount("tmpfs", path, "tmpfs", flags, options+",noswap")
	if errors.Is(err, unix.EINVAL) {
		err = unix.Mount("tmpfs", path, "tmpfs", flags, options)
	}
	if err != nil {
		return fmt.Errorf("mount tmpfs on %s: %w", path, err)
	}
	return nil
}

const emptyDirPlugin = "empty-dir"

// emptyDir makes the folder, on memory when asked for, and gives it to fsGroup.
// Once it is there it is the containers' and is not touched.
func (m *Manager) emptyDir(ctx context.Context, pod *corev1.Pod, v *corev1.Volume) (string, error) {
	const plugin = emptyDirPlugin
	parent, err := m.pluginDir(pod.UID, plugin)
	if err != nil {
		return "", err
	}
	defer parent.Close()
	path := m.path(pod.UID, plugin, v.Name)
	mode, gid := uint32(0o777), -1
	if g := fsGroup(pod); g != nil {
		mode, gid = mode|unix.S_ISGID, int(*g)
	}
	switch v.EmptyDir.Medium {
	case corev1.StorageMediumDefault:
		if there, err := parent.Exists(v.Name); there || err != nil {
			return path, err
		}
		// It gets its name when it is whole.
		making := "." + v.Name + ".new"
		if err := parent.RemoveAll(ctx, making); err != nil {
			return "", err
		}
		dir, err := parent.Mkdir(making, mode, -1, gid)
		if err != nil {
			return "", err
		}
		dir.Close()
		return path, parent.Rename(making, v.Name)
	case corev1.StorageMediumMemory:
		at, err := parent.OpenMountOrMake(v.Name, 0o750, -1, -1)
		if err != nil {
			return "", err
		}
		mounted, _, err := at.IsMountPoint()
		at.Close()
		if mounted || err != nil {
			return path, err
		}
		options := fmt.Sprintf("mode=%04o%s", mode, gidOption(gid))
		if size := m.memorySize(pod, v.EmptyDir); size > 0 {
			options += fmt.Sprintf(",size=%d", size)
		}
		if err := unix.Mount("tmpfs", path, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, options); err != nil {
			return "", fmt.Errorf("mount tmpfs on %s: %w", path, err)
		}
		return path, nil
	}
	return "", fmt.Errorf("emptyDir with medium %q is %w", v.EmptyDir.Medium, ErrUnsupported)
}

// memorySize is how large an emptyDir on memory may become: the least of what
// the node gives to pods, the pod's memory limit and the volume's size limit.
// Without it a tmpfs may take half of the machine. 0: not known.
func (m *Manager) memorySize(pod *corev1.Pod, src *corev1.EmptyDirVolumeSource) int64 {
	var size int64
	least := func(n int64) {
		if n > 0 && (size == 0 || n < size) {
			size = n
		}
	}
	if m.cfg.Allocatable != nil {
		allocatable := m.cfg.Allocatable()
		least(allocatable.Memory().Value())
	}
	least(podMemoryLimit(pod))
	if src.SizeLimit != nil {
		least(src.SizeLimit.Value())
	}
	return size
}

// podMemoryLimit is the limit of the pod's cgroup, 0 when it has none: a
// container without a limit takes it away, unless the pod has one of its own.
func podMemoryLimit(pod *corev1.Pod) int64 {
	own := pod.Spec.Resources != nil && !pod.Spec.Resources.Limits.Memory().IsZero()
	if !own && qos.GetPodQOS(pod) != corev1.PodQOSGuaranteed {
		for _, list := range [][]corev1.Container{pod.Spec.InitContainers, pod.Spec.Containers} {
			for i := range list {
				if list[i].Resources.Limits.Memory().IsZero() {
					return 0
				}
			}
		}
	}
	limits := resource.PodLimits(pod, resource.PodResourcesOptions{})
	return limits.Memory().Value()
}
