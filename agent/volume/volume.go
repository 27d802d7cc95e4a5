package volume

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"path/filepath"
	"reflect"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
	authenticationv1 "k8s.io/api/authentication/v1"
	certificatesv1 "k8s.io/api/certificates/v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"

	"timonel/agent/csi"
	"timonel/agent/hostile"
)

// Objects finds what volumes refer to.
type Objects interface {
	ConfigMap(namespace, name string) (*corev1.ConfigMap, bool)
	Secret(namespace, name string) (*corev1.Secret, bool)
	PersistentVolumeClaim(namespace, name string) (*corev1.PersistentVolumeClaim, bool)
	PersistentVolume(name string) (*corev1.PersistentVolume, bool)
	ClusterTrustBundle(name string) (*certificatesv1.ClusterTrustBundle, bool)
	// ClusterTrustBundles are those of a signer.
	ClusterTrustBundles(signer string) []*certificatesv1.ClusterTrustBundle
	PodCertificateRequest(namespace, name string) (*certificatesv1.PodCertificateRequest, bool)
}

// Tokens asks a controller for a service account token.
type Tokens func(ctx context.Context, namespace, serviceAccount string, tr *authenticationv1.TokenRequest) (*authenticationv1.TokenRequest, error)

// Config says where volumes go and where their content comes from.
type Config struct {
	// Dir has one folder a pod, named by its uid.
	Dir string
	// Node is this node's name, LocalDir the folder of the volumes that are its own,
	// one a PersistentVolume.
	Node, LocalDir string
	// Labels are this node's, nil while they are not known: volumes that are for other
	// nodes are not mounted.
	Labels func() map[string]string
	Objects
	Tokens       Tokens
	Certificates Certificates
	Images       Images
	// CSI mounts volumes of CSI drivers; nil: there are none.
	CSI CSI
	// Event tells a pod's owner what happened. Default: nobody hears of it.
	Event func(pod types.UID, eventType, reason, message string)
	// Allocatable is the node's, for resourceFieldRef without a limit.
	Allocatable func() corev1.ResourceList
	// Now is the clock for token refresh. Default: time.Now.
	Now    func() time.Time
	Logger *slog.Logger
}

// Manager makes and removes volumes. Calls for one pod must not overlap.
type Manager struct {
	cfg        Config
	deleteTurn time.Duration // deleteTurn but in tests

	mu    sync.Mutex
	users map[string][]types.UID // pods that have it, by PersistentVolume
}

// Mounts are a pod's volumes that are ready: host paths by volume name.
type Mounts map[string]string

// New returns a manager.
func New(cfg Config) *Manager {
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.Event == nil {
		cfg.Event = func(types.UID, string, string, string) {}
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.Default()
	}
	return &Manager{cfg: cfg, deleteTurn: deleteTurn, users: map[string][]types.UID{}}
}

// ErrUnsupported marks a volume of a type that this agent cannot mount, now or
// later.
var ErrUnsupported = errors.New("not supported by this node")

// PodDir is the folder of one pod.
func (m *Manager) PodDir(uid types.UID) string { return filepath.Join(m.cfg.Dir, string(uid)) }

func (m *Manager) path(uid types.UID, plugin, name string) string {
	return filepath.Join(m.pluginPath(uid, plugin), name)
}

// pluginPath is the folder of a pod's volumes of one kind.
func (m *Manager) pluginPath(uid types.UID, plugin string) string {
	return filepath.Join(m.PodDir(uid), pluginName(plugin))
}

// pluginName is that folder's name in the pod's own.
func pluginName(plugin string) string { return filepath.Join("volumes", "kubernetes.io~"+plugin) }

// askPatience bounds how long a pod's tokens and certificates are asked for, together.
const askPatience = 10 * time.Second

// Setup makes all volumes of a pod, or brings them up to date. It ends with ctx: to give
// a claim of millions of files to a group takes minutes. refresh is when to call it again (a token to renew), zero for not before something changes.
// podIPs are what downward API fields show, nil before they are known.
func (m *Manager) Setup(ctx context.Context, pod *corev1.Pod, podIPs []string) (mounts Mounts, refresh time.Time, err error) {
	mounts = Mounts{}
	left := m.apiRoom()
	until := time.Now().Add(askPatience)
	var errs, pending []error
	for i := range pod.Spec.Volumes {
		v := &pod.Spec.Volumes[i]
		asks, cancel := context.WithDeadline(ctx, until)
		path, again, err := m.setup(ctx, asks, pod, v, &left)
		cancel()
		if ClaimOf(pod, v) != "" { // which may have taken any time
			until = time.Now().Add(askPatience)
		}
		if errors.Is(err, ErrPending) {
			pending = append(pending, err)
			continue
		}
		if failed := (*csi.Failure)(nil); errors.As(err, &failed) {
			errs = append(errs, err) // it says which
			continue
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("volume %q: %w", v.Name, err))
			continue
		}
		mounts[v.Name] = path
		if !again.IsZero() && (refresh.IsZero() || again.Before(refresh)) {
			refresh = again
		}
	}
	if len(errs) == 0 {
		errs = pending
	}
	return mounts, refresh, errors.Join(errs...)
}

// setup makes one volume. It ends with ctx, and what it asks the cluster for with asks.
func (m *Manager) setup(ctx, asks context.Context, pod *corev1.Pod, v *corev1.Volume, left *int64) (string, time.Time, error) {
	var never time.Time
	s := &v.VolumeSource
	p := payload{ctx: asks, manager: m, pod: pod, volume: v.Name, left: left}
	switch {
	case s.EmptyDir != nil:
		path, err := m.emptyDir(ctx, pod, v)
		return path, never, err
	case s.HostPath != nil:
		return s.HostPath.Path, never, hostPath(s.HostPath)
	case s.PersistentVolumeClaim != nil, s.Ephemeral != nil:
		return m.claimed(ctx, pod, v)
	case s.CSI != nil:
		return m.ofDriver(csi.Request{Pod: pod, Volume: v.Name, Source: s.CSI, Inline: true, ReadOnly: s.CSI.ReadOnly != nil && *s.CSI.ReadOnly})
	case s.Image != nil:
		path, err := m.image(pod, v.Name)
		return path, never, err
	case s.ConfigMap != nil:
		if err := p.configMap(s.ConfigMap.Name, s.ConfigMap.Items, s.ConfigMap.Optional, mode(s.ConfigMap.DefaultMode)); err != nil {
			return "", never, err
		}
		path, err := p.write(apiPlugin(v), v.Name)
		return path, never, err
	case s.Secret != nil:
		if err := p.secret(s.Secret.SecretName, s.Secret.Items, s.Secret.Optional, mode(s.Secret.DefaultMode)); err != nil {
			return "", never, err
		}
		path, err := p.write(apiPlugin(v), v.Name)
		return path, never, err
	case s.DownwardAPI != nil:
		if err := p.downward(s.DownwardAPI.Items, mode(s.DownwardAPI.DefaultMode)); err != nil {
			return "", never, err
		}
		path, err := p.write(apiPlugin(v), v.Name)
		return path, never, err
	case s.Projected != nil:
		if err := p.projected(s.Projected); err != nil {
			return "", never, err
		}
		path, err := p.write(apiPlugin(v), v.Name)
		return path, p.refresh, err
	}
	return "", never, fmt.Errorf("volumes of type %s are %w: use emptyDir, hostPath, configMap, secret, downwardAPI, projected, persistentVolumeClaim, ephemeral, csi or image", typeOf(s), ErrUnsupported)
}

func mode(m *int32) int32 {
	if m == nil {
		return 0o644
	}
	return *m
}

// typeOf names the field of a volume source that is set, as in YAML.
func typeOf[T corev1.VolumeSource | corev1.PersistentVolumeSource](s *T) string {
	v := reflect.ValueOf(s).Elem()
	for i := range v.NumField() {
		if !v.Field(i).IsNil() {
			name, _, _ := strings.Cut(v.Type().Field(i).Tag.Get("json"), ",")
			return name
		}
	}
	return "(none)"
}

func fsGroup(pod *corev1.Pod) *int64 {
	if pod.Spec.SecurityContext == nil {
		return nil
	}
	return pod.Spec.SecurityContext.FSGroup
}

// ReadOnly says whether containers may only read a volume, whatever their mounts
// say: what shows API data is written by the agent alone, an image by nobody, and a claim
// may be used so.
func ReadOnly(v *corev1.Volume) bool {
	return apiPlugin(v) != "" || v.Image != nil || v.CSI != nil && v.CSI.ReadOnly != nil && *v.CSI.ReadOnly || v.PersistentVolumeClaim != nil && v.PersistentVolumeClaim.ReadOnly
}

// OnDisk says whether a volume takes its room on the node's disk: what containers
// write to it does.
func OnDisk(v *corev1.Volume) bool {
	return v.EmptyDir != nil && v.EmptyDir.Medium == corev1.StorageMediumDefault
}

// Memory is how much of the node's memory a pod's volumes of API data take. The agent
// wrote what is in them, so the pod's cgroup does not count it.
func (m *Manager) Memory(pod *corev1.Pod) (bytes int64) {
	for i := range pod.Spec.Volumes {
		plugin := apiPlugin(&pod.Spec.Volumes[i])
		if plugin == "" {
			continue
		}
		dir, err := hostile.OpenRoot(m.pluginPath(pod.UID, plugin))
		if err != nil {
			continue // it is not made yet, or has gone
		}
		if at, err := dir.OpenMount(pod.Spec.Volumes[i].Name); err == nil {
			if mounted, magic, err := at.IsMountPoint(); err == nil && mounted && magic == unix.TMPFS_MAGIC {
				if st, err := at.Statfs(); err == nil {
					bytes += int64(st.Blocks-st.Bfree) * st.Bsize
				}
			}
			at.Close()
		}
		dir.Close()
	}
	return bytes
}

// apiPlugin names the folder of a volume of API data, "" for another volume.
func apiPlugin(v *corev1.Volume) string {
	switch {
	case v.ConfigMap != nil:
		return "configmap"
	case v.Secret != nil:
		return "secret"
	case v.DownwardAPI != nil:
		return "downward-api"
	case v.Projected != nil:
		return "projected"
	}
	return ""
}

// Measure measures a volume that is on the node's disk.
func (m *Manager) Measure(ctx context.Context, uid types.UID, name string, how hostile.Measure) (hostile.Size, error) {
	return hostile.UsageIn(ctx, m.PodDir(uid), filepath.Join("volumes", "kubernetes.io~"+emptyDirPlugin, name), how)
}

// MeasureOther measures what a pod has on the node's disk beside its volumes.
func (m *Manager) MeasureOther(ctx context.Context, uid types.UID, how hostile.Measure) (hostile.Size, error) {
	dir, err := hostile.OpenRoot(m.PodDir(uid))
	if errors.Is(err, fs.ErrNotExist) {
		return hostile.Size{Whole: true}, nil
	}
	if err != nil {
		return hostile.Size{}, err
	}
	defer dir.Close()
	sum := hostile.Size{Whole: true}
	var failed error
	err = dir.Names(func(name string) bool {
		if name == "volumes" || name == "subpaths" {
			return true
		}
		var one hostile.Size
		one, failed = dir.Usage(ctx, name, how)
		sum.Bytes, sum.Inodes, sum.Whole = sum.Bytes+one.Bytes, sum.Inodes+one.Inodes, sum.Whole && one.Whole
		return failed == nil
	})
	return sum, errors.Join(err, failed)
}

// Pods returns the uids that have a folder, or a volume of a CSI driver; some of them twice.
func (m *Manager) Pods() ([]types.UID, error) {
	var out []types.UID
	if m.cfg.CSI != nil {
		out = m.cfg.CSI.Pods()
	}
	dir, err := hostile.OpenRoot(m.cfg.Dir)
	if errors.Is(err, fs.ErrNotExist) {
		return out, nil
	}
	if err != nil {
		return nil, err
	}
	defer dir.Close()
	err = dir.Names(func(name string) bool {
		out = append(out, types.UID(name))
		return true
	})
	return out, err
}

// Release unmounts and removes a pod's volumes, and leaves what else the pod has
// on this node's disk: what its containers had to say. For the rest it is as
// Teardown.
func (m *Manager) Release(ctx context.Context, uid types.UID) error {
	if err := m.releaseDrivers(ctx, uid); err != nil {
		return fmt.Errorf("volumes of pod %s: %w", uid, err)
	}
	dir, err := hostile.OpenRoot(m.PodDir(uid))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("volumes of pod %s: %w", uid, err)
	}
	defer dir.Close()
	if err := hostile.Unmount(m.PodDir(uid)); err != nil {
		return fmt.Errorf("volumes of pod %s: %w", uid, err)
	}
	if err := m.removeViews(ctx, uid); err != nil {
		return fmt.Errorf("volumes of pod %s: %w", uid, err)
	}
	var errs []error
	for _, name := range []string{"subpaths", "volumes", "tokens", certificatesDir, claimsDir} {
		errs = append(errs, dir.RemoveAll(ctx, name))
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("volumes of pod %s: %w", uid, err)
	}
	m.unuse(uid)
	return nil
}

// Teardown unmounts and removes all that a pod has on this node's disk. Nothing
// of the pod may run any more. What is in its volumes is the containers' work:
// no link is followed, no mount is removed into. It ends with ctx, and can be
// called again.
func (m *Manager) Teardown(ctx context.Context, uid types.UID) error {
	if err := m.releaseDrivers(ctx, uid); err != nil {
		return fmt.Errorf("volumes of pod %s: %w", uid, err)
	}
	dir := m.PodDir(uid)
	if err := hostile.Unmount(dir); err != nil {
		return fmt.Errorf("volumes of pod %s: %w", uid, err)
	}
	if err := m.removeViews(ctx, uid); err != nil {
		return fmt.Errorf("volumes of pod %s: %w", uid, err)
	}
	if err := hostile.RemoveAll(ctx, dir); err != nil {
		return fmt.Errorf("volumes of pod %s: %w", uid, err)
	}
	m.unuse(uid)
	return nil
}
