package volume

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"
)

// Objects finds what volumes refer to.
type Objects interface {
	ConfigMap(namespace, name string) (*corev1.ConfigMap, bool)
	Secret(namespace, name string) (*corev1.Secret, bool)
}

// Tokens asks a controller for a service account token.
type Tokens func(ctx context.Context, namespace, serviceAccount string, tr *authenticationv1.TokenRequest) (*authenticationv1.TokenRequest, error)

// Config says where volumes go and where their content comes from.
type Config struct {
	// Dir has one folder a pod, named by its uid.
	Dir string
	Objects
	Tokens Tokens
	// Allocatable is the node's, for resourceFieldRef without a limit.
	Allocatable func() corev1.ResourceList
	// Now is the clock for token refresh. Default: time.Now.
	Now    func() time.Time
	Logger *slog.Logger
}

// Manager makes and removes volumes. Calls for one pod must not overlap.
type Manager struct{ cfg Config }

// Mounts are a pod's volumes that are ready: host paths by volume name.
type Mounts map[string]string

// New returns a manager.
func New(cfg Config) *Manager {
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.Default()
	}
	return &Manager{cfg: cfg}
}

// ErrUnsupported marks a volume of a type that this agent cannot mount, now or
// later.
var ErrUnsupported = errors.New("not supported by this node")

// PodDir is the folder of one pod.
func (m *Manager) PodDir(uid types.UID) string { return filepath.Join(m.cfg.Dir, string(uid)) }

func (m *Manager) path(uid types.UID, plugin, name string) string {
	return filepath.Join(m.PodDir(uid), "volumes", "kubernetes.io~"+plugin, name)
}

// Setup makes all volumes of a pod, or brings them up to date. refresh is when
// to call it again (a token to renew), zero for not before something changes.
// podIPs are what downward API fields show, nil before they are known.
func (m *Manager) Setup(ctx context.Context, pod *corev1.Pod, podIPs []string) (mounts Mounts, refresh time.Time, err error) {
	mounts = Mounts{}
	var errs []error
	for i := range pod.Spec.Volumes {
		v := &pod.Spec.Volumes[i]
		path, again, err := m.setup(ctx, pod, v, podIPs)
		if err != nil {
			errs = append(errs, fmt.Errorf("volume %q: %w", v.Name, err))
			continue
		}
		mounts[v.Name] = path
		if !again.IsZero() && (refresh.IsZero() || again.Before(refresh)) {
			refresh = again
		}
	}
	return mounts, refresh, errors.Join(errs...)
}

func (m *Manager) setup(ctx context.Context, pod *corev1.Pod, v *corev1.Volume, podIPs []string) (string, time.Time, error) {
	var never time.Time
	s := &v.VolumeSource
	p := payload{manager: m, pod: pod, podIPs: podIPs}
	switch {
	case s.EmptyDir != nil:
		path, err := m.emptyDir(pod, v)
		return path, never, err
	case s.HostPath != nil:
		return s.HostPath.Path, never, hostPath(s.HostPath)
	case s.ConfigMap != nil:
		path := m.path(pod.UID, "configmap", v.Name)
		if err := p.configMap(s.ConfigMap.Name, s.ConfigMap.Items, s.ConfigMap.Optional, mode(s.ConfigMap.DefaultMode)); err != nil {
			return "", never, err
		}
		return path, never, p.write(path)
	case s.Secret != nil:
		path := m.path(pod.UID, "secret", v.Name)
		if err := p.secret(s.Secret.SecretName, s.Secret.Items, s.Secret.Optional, mode(s.Secret.DefaultMode)); err != nil {
			return "", never, err
		}
		return path, never, p.write(path)
	case s.DownwardAPI != nil:
		path := m.path(pod.UID, "downward-api", v.Name)
		if err := p.downward(s.DownwardAPI.Items, mode(s.DownwardAPI.DefaultMode)); err != nil {
			return "", never, err
		}
		return path, never, p.write(path)
	case s.Projected != nil:
		path := m.path(pod.UID, "projected", v.Name)
		p.current = path
		if err := p.projected(ctx, s.Projected); err != nil {
			return "", never, err
		}
		return path, p.refresh, p.write(path)
	}
	return "", never, fmt.Errorf("volumes of type %s are %w: use emptyDir, hostPath, configMap, secret, downwardAPI or projected", typeOf(s), ErrUnsupported)
}

func mode(m *int32) int32 {
	if m == nil {
		return 0o644
	}
	return *m
}

// typeOf names the field of a volume source that is set, as in YAML.
func typeOf(s *corev1.VolumeSource) string {
	v := reflect.ValueOf(s).Elem()
	for i := range v.NumField() {
		if !v.Field(i).IsNil() {
			name, _, _ := strings.Cut(v.Type().Field(i).Tag.Get("json"), ",")
			return name
		}
	}
	return "(none)"
}

// emptyDir makes the folder, on memory when asked for, and gives it to fsGroup.
func (m *Manager) emptyDir(pod *corev1.Pod, v *corev1.Volume) (string, error) {
	path := m.path(pod.UID, "empty-dir", v.Name)
	src := v.EmptyDir
	_, err := os.Lstat(path)
	fresh := errors.Is(err, fs.ErrNotExist)
	if err := os.MkdirAll(path, 0o750); err != nil {
		return "", err
	}
	switch {
	case src.Medium == corev1.StorageMediumMemory:
		mounted, err := isMount(path)
		if err != nil {
			return "", err
		}
		if !mounted {
			opts := "mode=0777"
			if src.SizeLimit != nil && src.SizeLimit.Value() > 0 {
				opts += fmt.Sprintf(",size=%d", src.SizeLimit.Value())
			}
			if err := unix.Mount("tmpfs", path, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, opts); err != nil {
				return "", fmt.Errorf("mount tmpfs: %w", err)
			}
			fresh = true
		}
	case src.Medium != corev1.StorageMediumDefault:
		return "", fmt.Errorf("emptyDir with medium %q is %w", src.Medium, ErrUnsupported)
	}
	if fresh {
		if err := os.Chmod(path, 0o777); err != nil {
			return "", err
		}
		if err := setGroup(path, fsGroup(pod)); err != nil {
			return "", err
		}
	}
	return path, nil
}

func fsGroup(pod *corev1.Pod) *int64 {
	if pod.Spec.SecurityContext == nil {
		return nil
	}
	return pod.Spec.SecurityContext.FSGroup
}

// setGroup makes a folder the group's: new files in it are, too.
func setGroup(path string, gid *int64) error {
	if gid == nil {
		return nil
	}
	if err := os.Lchown(path, -1, int(*gid)); err != nil {
		return err
	}
	info, err := os.Stat(path)
	if err != nil {
		return err
	}
	return os.Chmod(path, info.Mode().Perm()|0o070|fs.ModeSetgid)
}

// hostPath checks or makes what the volume's type asks for.
func hostPath(s *corev1.HostPathVolumeSource) error {
	kind := corev1.HostPathUnset
	if s.Type != nil {
		kind = *s.Type
	}
	info, err := os.Stat(s.Path)
	missing := errors.Is(err, fs.ErrNotExist)
	if err != nil && !missing {
		return err
	}
	is := func(want string, ok bool) error {
		if missing {
			return fmt.Errorf("hostPath type check failed: %s does not exist", s.Path)
		}
		if !ok {
			return fmt.Errorf("hostPath type check failed: %s is not a %s", s.Path, want)
		}
		return nil
	}
	switch kind {
	case corev1.HostPathUnset:
		return nil // the runtime makes a missing folder, as upstream's does
	case corev1.HostPathDirectoryOrCreate:
		if missing {
			return os.MkdirAll(s.Path, 0o755)
		}
		return is("directory", info.IsDir())
	case corev1.HostPathFileOrCreate:
		if missing {
			f, err := os.OpenFile(s.Path, os.O_CREATE, 0o644)
			if err != nil {
				return err
			}
			return f.Close()
		}
		return is("file", info.Mode().IsRegular())
	case corev1.HostPathDirectory:
		return is("directory", !missing && info.IsDir())
	case corev1.HostPathFile:
		return is("file", !missing && info.Mode().IsRegular())
	case corev1.HostPathSocket:
		return is("socket", !missing && info.Mode()&fs.ModeSocket != 0)
	case corev1.HostPathCharDev:
		return is("character device", !missing && info.Mode()&fs.ModeCharDevice != 0)
	case corev1.HostPathBlockDev:
		return is("block device", !missing && info.Mode()&fs.ModeDevice != 0 && info.Mode()&fs.ModeCharDevice == 0)
	}
	return fmt.Errorf("hostPath type %q is %w", kind, ErrUnsupported)
}

// SubPath returns a host path that shows sub inside volume for one container's
// mount. It is a bind of an opened file, so a container that swaps a link in
// the volume cannot make it point elsewhere on the node.
func (m *Manager) SubPath(pod *corev1.Pod, container string, index int, volume, sub string) (string, error) {
	clean := filepath.Clean(sub)
	if !filepath.IsLocal(clean) {
		return "", fmt.Errorf("subPath %q must stay inside the volume", sub)
	}
	root, err := os.OpenRoot(volume)
	if err != nil {
		return "", fmt.Errorf("subPath %q: %w", sub, err)
	}
	defer root.Close()
	if _, err := root.Stat(clean); errors.Is(err, fs.ErrNotExist) {
		if err := root.MkdirAll(clean, 0o750); err != nil {
			return "", fmt.Errorf("subPath %q: %w", sub, err)
		}
		if err := root.Chmod(clean, 0o777); err != nil {
			return "", fmt.Errorf("subPath %q: %w", sub, err)
		}
	}
	f, err := root.Open(clean)
	if err != nil {
		return "", fmt.Errorf("subPath %q: %w", sub, err)
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return "", err
	}
	target := filepath.Join(m.PodDir(pod.UID), "subpaths", container, fmt.Sprint(index))
	if err := unmountAll(target); err != nil {
		return "", err
	}
	if err := os.RemoveAll(target); err != nil {
		return "", err
	}
	if err := os.MkdirAll(filepath.Dir(target), 0o750); err != nil {
		return "", err
	}
	if info.IsDir() {
		err = os.Mkdir(target, 0o750)
	} else {
		err = os.WriteFile(target, nil, 0o640)
	}
	if err != nil {
		return "", err
	}
	source := fmt.Sprintf("/proc/self/fd/%d", f.Fd())
	if err := unix.Mount(source, target, "", unix.MS_BIND|unix.MS_REC, ""); err != nil {
		return "", fmt.Errorf("bind subPath %q: %w", sub, err)
	}
	return target, nil
}

// Pods returns the uids that have a folder.
func (m *Manager) Pods() ([]types.UID, error) {
	entries, err := os.ReadDir(m.cfg.Dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	var out []types.UID
	for _, e := range entries {
		out = append(out, types.UID(e.Name()))
	}
	return out, err
}

// Teardown unmounts and removes all that a pod has on this node's disk. Nothing
// of the pod may run any more.
func (m *Manager) Teardown(uid types.UID) error {
	dir := m.PodDir(uid)
	if err := unmountAll(dir); err != nil {
		return fmt.Errorf("volumes of pod %s: %w", uid, err)
	}
	if err := os.RemoveAll(dir); err != nil {
		return fmt.Errorf("volumes of pod %s: %w", uid, err)
	}
	return nil
}

// Unmount unmounts everything at or below a folder.
func Unmount(dir string) error { return unmountAll(dir) }

// unmountAll unmounts everything at or below dir, innermost first.
func unmountAll(dir string) error {
	points, err := MountsBelow(dir)
	if err != nil {
		return err
	}
	for _, p := range slices.Backward(points) {
		if err := unix.Unmount(p, unix.UMOUNT_NOFOLLOW); err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) {
			if err := unix.Unmount(p, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW); err != nil {
				return fmt.Errorf("unmount %s: %w", p, err)
			}
		}
	}
	return nil
}

func isMount(path string) (bool, error) {
	points, err := MountsBelow(path)
	return slices.Contains(points, path), err
}

// MountsBelow lists the mount points at or below dir in the order they were
// mounted.
func MountsBelow(dir string) ([]string, error) {
	raw, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil, err
	}
	var out []string
	unescape := strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`)
	for line := range strings.Lines(string(raw)) {
		fields := strings.Fields(line)
		if len(fields) < 5 {
			continue
		}
		point := unescape.Replace(fields[4])
		if point == dir || strings.HasPrefix(point, dir+"/") {
			out = append(out, point)
		}
	}
	return out, nil
}
