package csi

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	storagev1 "k8s.io/api/storage/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"timonel/agent/hostile"
	"timonel/agent/plugin"
	"timonel/internal/csidriver"
	"timonel/test/needs"
)

const name = "d.example"

// world is a node and its cluster: what others say, and the agents that come and go.
type world struct {
	t    *testing.T
	root string // the agent's data folder
	seen string // as drivers have it
	disk string // the driver's volumes

	mu      sync.Mutex
	drivers map[string]*storagev1.CSIDriver
	secrets map[string]*corev1.Secret
	va      map[string]*storagev1.VolumeAttachment
	node    *corev1.Node
	told    *storagev1.CSINode
	gone    []string
	grown   []string
	changed map[types.UID]int

	m    *Manager
	stop func()
}

func newWorld(t *testing.T) *world {
	t.Helper()
	needs.Root(t, "mounts")
	base, err := os.MkdirTemp("", "csi") // short, for sockets
	require.NoError(t, err)
	w := &world{
		t: t, root: filepath.Join(base, "data"), seen: filepath.Join(base, "k"), disk: filepath.Join(base, "disk"),
		drivers: map[string]*storagev1.CSIDriver{}, secrets: map[string]*corev1.Secret{}, va: map[string]*storagev1.VolumeAttachment{},
		node: &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "a1"}}, changed: map[types.UID]int{},
	}
	require.NoError(t, os.MkdirAll(filepath.Join(w.root, "plugins"), 0o755))
	require.NoError(t, os.Symlink(w.root, w.seen))
	t.Cleanup(func() {
		w.kill()
		require.NoError(t, hostile.Unmount(base))
		require.NoError(t, os.RemoveAll(base))
	})
	w.attachRequired(false)
	w.start()
	return w
}

func (w *world) Secret(namespace, name string) (*corev1.Secret, bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	s, ok := w.secrets[namespace+"/"+name]
	return s, ok
}

func (w *world) CSIDriver(name string) (*storagev1.CSIDriver, bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	d, ok := w.drivers[name]
	return d, ok
}

func (w *world) VolumeAttachment(name string) (*storagev1.VolumeAttachment, bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	va, ok := w.va[name]
	return va, ok
}

func (w *world) attachRequired(is bool) {
	w.driverIs(func(s *storagev1.CSIDriverSpec) { s.AttachRequired = &is })
}

// driverIs changes what the cluster knows of the driver.
func (w *world) driverIs(change func(*storagev1.CSIDriverSpec)) {
	w.mu.Lock()
	defer w.mu.Unlock()
	d := &storagev1.CSIDriver{ObjectMeta: metav1.ObjectMeta{Name: name}}
	if old := w.drivers[name]; old != nil {
		d = old.DeepCopy()
	}
	change(&d.Spec)
	w.drivers[name] = d
}

// start starts an agent.
func (w *world) start() {
	w.m = New(Config{
		Node: "a1", Root: w.root, Seen: w.seen, Dir: filepath.Join(w.root, "csi"), Objects: w,
		Live: func() *corev1.Node {
			w.mu.Lock()
			defer w.mu.Unlock()
			return w.node
		},
		Tokens: func(_ context.Context, namespace, account string, tr *authenticationv1.TokenRequest) (*authenticationv1.TokenRequest, error) {
			tr = tr.DeepCopy()
			tr.Status.Token = fmt.Sprintf("%s/%s for %v and %s", namespace, account, tr.Spec.Audiences, tr.Spec.BoundObjectRef.Name)
			return tr, nil
		},
		Grown: func(_ context.Context, claim *corev1.PersistentVolumeClaim, volume string, bytes int64) error {
			w.mu.Lock()
			defer w.mu.Unlock()
			w.grown = append(w.grown, fmt.Sprintf("%s/%s %s %d", claim.Namespace, claim.Name, volume, bytes))
			if len(w.grown) == 1 {
				return errors.New("no controller is connected")
			}
			return nil
		},
		Drivers: func(n *storagev1.CSINode, gone []string) {
			w.mu.Lock()
			defer w.mu.Unlock()
			w.told, w.gone = n, gone
		},
		Changed: func(uid types.UID) {
			w.mu.Lock()
			defer w.mu.Unlock()
			w.changed[uid]++
		},
	})
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	m := w.m
	go func() { done <- m.Run(ctx) }()
	w.stop = func() { cancel(); <-done }
	require.Eventually(w.t, func() bool { m.mu.Lock(); defer m.mu.Unlock(); return m.ctx != nil }, 10*time.Second, time.Millisecond)
}

// kill ends the agent, as far as a process can end itself.
func (w *world) kill() {
	if w.stop != nil {
		w.stop()
		w.stop = nil
	}
}

// driver starts a driver and registers it.
func (w *world) driver(cfg csidriver.Config) *csidriver.Driver {
	w.t.Helper()
	cfg.Name, cfg.Dir, cfg.Socket = name, w.disk, filepath.Join(w.root, "plugins", name, "csi.sock")
	d, err := csidriver.Start(cfg)
	require.NoError(w.t, err)
	w.t.Cleanup(d.Stop)
	w.register()
	return d
}

func (w *world) plugin() plugin.Plugin {
	return plugin.Plugin{Socket: "r.sock", Name: name, Endpoint: filepath.Join(w.seen, "plugins", name, "csi.sock"), Versions: []string{"1.0.0"}}
}

func (w *world) register() {
	w.t.Helper()
	require.NoError(w.t, w.m.Register(w.t.Context(), w.plugin()))
}

func (w *world) pod(uid string) *corev1.Pod {
	return &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: "p-" + uid, UID: types.UID(uid)}, Spec: corev1.PodSpec{ServiceAccountName: "sa"}}
}

// pv is a volume of the driver, with a folder.
func (w *world) pv(handle string) *corev1.PersistentVolume {
	require.NoError(w.t, os.MkdirAll(filepath.Join(w.disk, handle), 0o755))
	return &corev1.PersistentVolume{ObjectMeta: metav1.ObjectMeta{Name: "pv-" + handle}, Spec: corev1.PersistentVolumeSpec{
		AccessModes: []corev1.PersistentVolumeAccessMode{corev1.ReadWriteOnce}, Capacity: corev1.ResourceList{corev1.ResourceStorage: resource.MustParse("1Gi")},
		PersistentVolumeSource: corev1.PersistentVolumeSource{CSI: &corev1.CSIPersistentVolumeSource{Driver: name, VolumeHandle: handle, FSType: "ext4", VolumeAttributes: map[string]string{"a": "b"}}},
	}}
}

// mount asks until the volume is there.
func (w *world) mount(r Request) string {
	w.t.Helper()
	var path string
	var err error
	require.Eventually(w.t, func() bool { path, _, err = w.m.Mount(r); return err == nil }, 20*time.Second, 2*time.Millisecond, "%v", &err)
	return path
}

// refused asks until an error says something.
func (w *world) refused(r Request, text string) {
	w.t.Helper()
	var err error
	require.Eventually(w.t, func() bool { _, _, err = w.m.Mount(r); return err != nil && strings.Contains(err.Error(), text) }, 20*time.Second, 2*time.Millisecond, "%v", &err)
}

func (w *world) release(uid string) {
	w.t.Helper()
	var err error
	require.Eventually(w.t, func() bool { err = w.m.Release(w.t.Context(), types.UID(uid)); return err == nil }, 20*time.Second, 2*time.Millisecond, "%v", &err)
}

// empty waits until nothing is left: no mount, no record, no folder, no use.
func (w *world) empty() {
	w.t.Helper()
	var left []string
	require.Eventually(w.t, func() bool {
		left, _ = hostile.MountsBelow(w.root)
		for _, glob := range []string{"csi/*/*", "plugins/kubernetes.io/csi/*/*", "plugins/kubernetes.io/csi/volumeDevices/*/*/*", "pods/*/volumes/*/*"} {
			found, _ := filepath.Glob(filepath.Join(w.root, glob))
			left = append(left, found...)
		}
		left = slices.DeleteFunc(left, func(p string) bool { return strings.Contains(p, "/volumeDevices/") && strings.Count(p, "/pv-") == 0 })
		for _, u := range w.m.Facts().InUse {
			left = append(left, string(u))
		}
		return len(left) == 0
	}, 20*time.Second, 5*time.Millisecond, "%q", &left)
}

func (w *world) written(path string) {
	w.t.Helper()
	require.NoError(w.t, os.WriteFile(filepath.Join(path, "f"), []byte("x"), 0o600))
}

// TestVolumeOfTwoPods: a volume is staged once for all pods of a node, published for each,
// and unstaged after the last; what pods write is in it.
func TestVolumeOfTwoPods(t *testing.T) {
	w := newWorld(t)
	d := w.driver(csidriver.Config{})
	pv := w.pv("v1")
	one := w.mount(Request{Pod: w.pod("u1"), Volume: "data", PV: pv})
	require.Equal(t, filepath.Join(w.root, "pods/u1/volumes/kubernetes.io~csi/pv-v1/mount"), one)
	w.written(one)
	two := w.mount(Request{Pod: w.pod("u2"), Volume: "other", PV: pv})
	require.FileExists(t, filepath.Join(two, "f"))
	require.FileExists(t, filepath.Join(w.disk, "v1", "f"))
	require.Equal(t, one, w.mount(Request{Pod: w.pod("u1"), Volume: "data", PV: pv}))
	w.release("u1")
	require.FileExists(t, filepath.Join(two, "f"))
	require.NoFileExists(t, filepath.Join(one, "f"))
	w.release("u2")
	w.empty()
	require.FileExists(t, filepath.Join(w.disk, "v1", "f"))
	require.Equal(t, []string{"NodeStageVolume v1", "NodePublishVolume v1", "NodePublishVolume v1", "NodeUnpublishVolume v1", "NodeUnpublishVolume v1", "NodeUnstageVolume v1"}, d.Calls())
	w.mu.Lock()
	require.Positive(t, w.changed["u1"])
	w.mu.Unlock()
	require.NoError(t, w.m.Release(t.Context(), "never"))
}

// TestAttachment: nothing of a volume that others attach is mounted before the Node says
// that it is in use and attached, and its VolumeAttachment does; it is in use until it is
// unstaged. What the attacher said is passed on.
func TestAttachment(t *testing.T) {
	w := newWorld(t)
	w.attachRequired(true)
	var mu sync.Mutex
	contexts := map[string]map[string]string{}
	hold := make(chan struct{})
	d := w.driver(csidriver.Config{Before: func(_ context.Context, method string, req any) error {
		if r, ok := req.(interface{ GetPublishContext() map[string]string }); ok {
			mu.Lock()
			contexts[method] = r.GetPublishContext()
			mu.Unlock()
		}
		if method == "NodeUnstageVolume" {
			<-hold
		}
		return nil
	}})
	r := Request{Pod: w.pod("u1"), Volume: "data", PV: w.pv("v1")}
	unique := corev1.UniqueVolumeName("kubernetes.io/csi/d.example^v1")
	set := func(change func()) {
		w.mu.Lock()
		w.node = w.node.DeepCopy()
		change()
		w.mu.Unlock()
		w.m.Look()
	}
	w.refused(r, "has not been added to the list of VolumesInUse")
	require.Equal(t, []corev1.UniqueVolumeName{unique}, w.m.Facts().InUse)
	_, _, err := w.m.Mount(r)
	require.ErrorIs(t, err, ErrPending)
	set(func() { w.node.Status.VolumesInUse = []corev1.UniqueVolumeName{unique} })
	w.refused(r, "is not attached to this node yet")
	set(func() { w.node.Status.VolumesAttached = []corev1.AttachedVolume{{Name: unique}} })
	w.refused(r, "VolumeAttachment of volume \"pv-v1\" is not known here yet")
	id := attachmentName("v1", name, "a1")
	va := &storagev1.VolumeAttachment{ObjectMeta: metav1.ObjectMeta{Name: id}}
	va.Status.AttachError = &storagev1.VolumeError{Message: "no such disk"}
	set(func() { w.va[id] = va.DeepCopy() })
	w.refused(r, "no such disk")
	require.Empty(t, d.Calls())
	va.Status = storagev1.VolumeAttachmentStatus{Attached: true, AttachmentMetadata: map[string]string{"device": "/dev/x"}}
	set(func() { w.va[id] = va.DeepCopy() })
	w.mount(r)
	mu.Lock()
	require.Equal(t, map[string]map[string]string{"NodeStageVolume": {"device": "/dev/x"}, "NodePublishVolume": {"device": "/dev/x"}}, contexts)
	mu.Unlock()
	w.release("u1")
	require.Equal(t, []corev1.UniqueVolumeName{unique}, w.m.Facts().InUse, "it is still staged")
	close(hold)
	w.empty()
}

// TestAgentKilledAtEachStep: whatever the driver had done and the agent had heard when it
// ended, the next agent mounts nothing twice, and leaves nothing behind.
func TestAgentKilledAtEachStep(t *testing.T) {
	steps := []string{"NodeStageVolume", "NodePublishVolume", "NodeUnpublishVolume", "NodeUnstageVolume"}
	for _, step := range steps {
		for _, done := range []bool{false, true} {
			for _, wanted := range []bool{false, true} {
				t.Run(fmt.Sprintf("%s done=%v wanted=%v", step, done, wanted), func(t *testing.T) {
					w := newWorld(t)
					var mu sync.Mutex
					armed, reached := true, make(chan struct{})
					stuck := func(method string) error {
						mu.Lock()
						defer mu.Unlock()
						if !armed || method != step {
							return nil
						}
						armed = false
						close(reached)
						return status.Error(codes.Unavailable, "the agent is killed by then")
					}
					cfg := csidriver.Config{Before: func(ctx context.Context, method string, _ any) error {
						if !done {
							if err := stuck(method); err != nil {
								<-ctx.Done()
								return err
							}
						}
						return nil
					}}
					if done {
						cfg.After = func(method string, _ any) error {
							if err := stuck(method); err != nil {
								time.Sleep(20 * time.Millisecond)
								return err
							}
							return nil
						}
					}
					w.driver(cfg)
					r := Request{Pod: w.pod("u1"), Volume: "data", PV: w.pv("v1")}
					if step == "NodeStageVolume" || step == "NodePublishVolume" {
						_, _, err := w.m.Mount(r)
						require.ErrorIs(t, err, ErrPending)
					} else {
						w.mount(r)
						ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
						_ = w.m.Release(ctx, "u1")
						cancel()
					}
					<-reached
					w.kill()
					w.start()
					require.Equal(t, step == "NodeUnstageVolume" || step == "NodeStageVolume", len(w.m.Pods()) == 0, "the records know of the pod")
					w.register()
					if wanted {
						path := w.mount(r)
						w.written(path)
						require.FileExists(t, filepath.Join(w.disk, "v1", "f"))
						for _, p := range []string{path, filepath.Join(w.root, stagingPath(r.key(), &r))} {
							n, err := csidriver.MountCount(p)
							require.NoError(t, err)
							require.Equal(t, 1, n, p)
						}
						w.kill() // and once more, at rest
						w.start()
						w.register()
						require.Equal(t, path, w.mount(r))
					}
					w.release("u1")
					w.empty()
				})
			}
		}
	}
}

// TestDriverBeforeItsPods: after a start of the agent a driver may register before pods ask
// for what they have. It stays; what no pod asks for goes when the pod's folder does.
func TestDriverBeforeItsPods(t *testing.T) {
	w := newWorld(t)
	d := w.driver(csidriver.Config{})
	r := Request{Pod: w.pod("u1"), Volume: "data", PV: w.pv("v1")}
	gone := Request{Pod: w.pod("u2"), Volume: "data", PV: w.pv("v2")}
	path := w.mount(r)
	w.written(path)
	w.mount(gone)
	before := d.Calls()
	w.kill()
	w.start()
	w.register()
	w.m.Look()
	time.Sleep(200 * time.Millisecond)
	require.Equal(t, before, d.Calls())
	require.FileExists(t, filepath.Join(path, "f"))
	w.release("u2")
	require.Equal(t, path, w.mount(r))
	w.m.Look()
	time.Sleep(50 * time.Millisecond)
	require.Equal(t, append(before, "NodeUnpublishVolume v2", "NodeUnstageVolume v2"), d.Calls())
	w.release("u1")
	w.empty()
}

// TestMountsThatAreGone: after the machine was started anew, records say what is not there;
// it is mounted again.
func TestMountsThatAreGone(t *testing.T) {
	w := newWorld(t)
	w.driver(csidriver.Config{})
	r := Request{Pod: w.pod("u1"), Volume: "data", PV: w.pv("v1")}
	path := w.mount(r)
	w.written(path)
	w.kill()
	require.NoError(t, hostile.Unmount(w.root))
	require.NoFileExists(t, filepath.Join(path, "f"))
	w.start()
	w.register()
	require.Equal(t, path, w.mount(r))
	require.FileExists(t, filepath.Join(path, "f"))
	w.release("u1")
	w.empty()
}

// TestHostileDrivers: what a driver answers, and what it leaves at a target path, does no
// harm, and is said; a driver that is well then serves the same pod.
func TestHostileDrivers(t *testing.T) {
	huge := strings.Repeat("x", 2<<20)
	for what, tt := range map[string]struct {
		says   string
		before func(w *world, method string, req any) error
		after  func(w *world, method string, req any) error
	}{
		"says it failed": {says: `MountVolume.SetUp failed for volume "pv-v1" : rpc error: code = Internal desc = boom`, before: func(_ *world, method string, _ any) error {
			if method == "NodePublishVolume" {
				return status.Error(codes.Internal, "boom")
			}
			return nil
		}},
		"does not stage": {says: `MountVolume.MountDevice failed for volume "pv-v1" : rpc error: code = Internal desc = no`, before: func(_ *world, method string, _ any) error {
			if method == "NodeStageVolume" {
				return status.Error(codes.Internal, "no")
			}
			return nil
		}},
		"does it and says it did not": {says: "code = Unavailable", after: func(_ *world, method string, _ any) error {
			if method == "NodePublishVolume" || method == "NodeStageVolume" {
				return status.Error(codes.Unavailable, "perhaps")
			}
			return nil
		}},
		"does it and says it failed": {says: "code = Internal", after: func(_ *world, method string, _ any) error {
			if method == "NodePublishVolume" || method == "NodeStageVolume" {
				return status.Error(codes.Internal, "lie")
			}
			return nil
		}},
		"answers with too much": {says: "MountVolume.", before: func(_ *world, method string, _ any) error {
			if method == "NodePublishVolume" {
				return status.Error(codes.Internal, huge)
			}
			return nil
		}},
		"a link for a target": {says: "symbolic link", after: func(_ *world, method string, req any) error {
			if r, ok := req.(*csi.NodePublishVolumeRequest); ok {
				_ = unix.Unmount(r.TargetPath, 0)
				_ = os.Remove(r.TargetPath)
				_ = os.Symlink("/etc", r.TargetPath)
			}
			return nil
		}},
		"a file for a target": {says: "not a folder", after: func(_ *world, method string, req any) error {
			if r, ok := req.(*csi.NodePublishVolumeRequest); ok {
				_ = unix.Unmount(r.TargetPath, 0)
				_ = os.Remove(r.TargetPath)
				_ = os.WriteFile(r.TargetPath, nil, 0o600)
			}
			return nil
		}},
		"nothing for a target": {says: "it is not", after: func(_ *world, method string, req any) error {
			if r, ok := req.(*csi.NodePublishVolumeRequest); ok {
				_ = unix.Unmount(r.TargetPath, 0)
				_ = os.Remove(r.TargetPath)
			}
			return nil
		}},
	} {
		t.Run(what, func(t *testing.T) {
			w := newWorld(t)
			var mu sync.Mutex
			bad := true
			is := func() bool { mu.Lock(); defer mu.Unlock(); return bad }
			w.driver(csidriver.Config{
				Before: func(_ context.Context, method string, req any) error {
					if is() && tt.before != nil {
						return tt.before(w, method, req)
					}
					return nil
				},
				After: func(method string, req any) error {
					if is() && tt.after != nil {
						return tt.after(w, method, req)
					}
					return nil
				},
			})
			r := Request{Pod: w.pod("u1"), Volume: "data", PV: w.pv("v1")}
			w.refused(r, tt.says)
			_, _, err := w.m.Mount(r)
			require.NotErrorIs(t, err, ErrPending)
			require.Less(t, len(err.Error()), 4<<10)
			mu.Lock()
			bad = false
			mu.Unlock()
			// What it left is the driver's to put right; a pod that comes after has its own.
			w.release("u1")
			w.written(w.mount(Request{Pod: w.pod("u2"), Volume: "data", PV: r.PV}))
			w.release("u2")
			w.empty()
		})
	}
}

// TestUnpublishedAndStillThere: a driver that says it took a volume back, and did not, is
// not believed: what it left is unmounted, and what is in the volume stays.
func TestUnpublishedAndStillThere(t *testing.T) {
	w := newWorld(t)
	w.driver(csidriver.Config{After: func(method string, req any) error {
		switch r := req.(type) {
		case *csi.NodeUnpublishVolumeRequest:
			_ = os.MkdirAll(r.TargetPath, 0o700)
			return unix.Mount(filepath.Join(w.disk, "v1"), r.TargetPath, "", unix.MS_BIND, "")
		case *csi.NodeUnstageVolumeRequest:
			return unix.Mount(filepath.Join(w.disk, "v1"), r.StagingTargetPath, "", unix.MS_BIND, "")
		}
		return nil
	}})
	w.written(w.mount(Request{Pod: w.pod("u1"), Volume: "data", PV: w.pv("v1")}))
	w.release("u1")
	w.empty()
	require.FileExists(t, filepath.Join(w.disk, "v1", "f"))
}

// TestDriverThatHangs: a driver that does not answer holds up no other volume and no
// caller, and dying lets go of it.
func TestDriverThatHangs(t *testing.T) {
	w := newWorld(t)
	var mu sync.Mutex
	hangs := true
	cfg := csidriver.Config{Before: func(ctx context.Context, method string, req any) error {
		mu.Lock()
		is := hangs
		mu.Unlock()
		if r, ok := req.(*csi.NodePublishVolumeRequest); ok && is && r.VolumeId == "v1" {
			<-ctx.Done()
			return ctx.Err()
		}
		return nil
	}}
	d := w.driver(cfg)
	r := Request{Pod: w.pod("u1"), Volume: "data", PV: w.pv("v1")}
	_, _, err := w.m.Mount(r)
	require.ErrorIs(t, err, ErrPending)
	w.mount(Request{Pod: w.pod("u2"), Volume: "data", PV: w.pv("v2")})
	require.Eventually(t, func() bool { return slices.Contains(d.Calls(), "NodePublishVolume v1") }, 10*time.Second, time.Millisecond)
	start := time.Now()
	require.ErrorIs(t, w.m.Release(t.Context(), "u1"), ErrPending)
	require.Less(t, time.Since(start), 2*releasePatience)
	d.Stop()
	mu.Lock()
	hangs = false
	mu.Unlock()
	w.m.Deregister(w.plugin())
	require.ErrorContains(t, w.m.Release(t.Context(), "u1"), "not found in the list of registered CSI drivers")
	_, _, err = w.m.Mount(Request{Pod: w.pod("u3"), Volume: "data", PV: w.pv("v3")})
	require.ErrorContains(t, err, `MountVolume.SetUp failed for volume "pv-v3" : driver name d.example not found in the list of registered CSI drivers`)
	w.driver(cfg)
	for _, uid := range []string{"u1", "u2", "u3"} {
		w.release(uid)
	}
	w.empty()
}

// TestRequests is what drivers are told: Secrets, the pod, its tokens, options, groups,
// access modes and sizes.
func TestRequests(t *testing.T) {
	w := newWorld(t)
	yes := true
	var mu sync.Mutex
	var stage *csi.NodeStageVolumeRequest
	var publish *csi.NodePublishVolumeRequest
	d := w.driver(csidriver.Config{Before: func(_ context.Context, _ string, req any) error {
		mu.Lock()
		defer mu.Unlock()
		switch r := req.(type) {
		case *csi.NodeStageVolumeRequest:
			stage = r
		case *csi.NodePublishVolumeRequest:
			publish = r
		}
		return nil
	}})
	pv := w.pv("v1")
	pv.Spec.MountOptions = []string{"noatime"}
	pv.Spec.AccessModes = []corev1.PersistentVolumeAccessMode{corev1.ReadWriteOncePod}
	pv.Spec.CSI.NodeStageSecretRef = &corev1.SecretReference{Namespace: "sys", Name: "stage"}
	pv.Spec.CSI.NodePublishSecretRef = &corev1.SecretReference{Namespace: "sys", Name: "publish"}
	pod := w.pod("u1")
	gid := int64(4711)
	pod.Spec.SecurityContext = &corev1.PodSecurityContext{FSGroup: &gid}
	claim := &corev1.PersistentVolumeClaim{ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: "data", UID: "c"}}
	claim.Status.Capacity = corev1.ResourceList{corev1.ResourceStorage: resource.MustParse("1Gi")}
	r := Request{Pod: pod, Volume: "data", PV: pv, Claim: claim}
	w.refused(r, "fetching NodeStageSecretRef sys/stage failed")
	w.mu.Lock()
	w.secrets["sys/stage"] = &corev1.Secret{Data: map[string][]byte{"k": []byte("s")}}
	w.secrets["sys/publish"] = &corev1.Secret{Data: map[string][]byte{"k": []byte("p")}}
	w.mu.Unlock()
	w.driverIs(func(s *storagev1.CSIDriverSpec) {
		s.PodInfoOnMount, s.TokenRequests = &yes, []storagev1.TokenRequest{{Audience: "vault"}, {}}
	})
	path := w.mount(r)
	mu.Lock()
	require.Equal(t, map[string]string{"k": "s"}, stage.Secrets)
	require.Equal(t, map[string]string{"a": "b"}, stage.VolumeContext)
	require.Equal(t, []string{"noatime"}, stage.VolumeCapability.GetMount().MountFlags)
	require.Equal(t, "ext4", stage.VolumeCapability.GetMount().FsType)
	require.Equal(t, csi.VolumeCapability_AccessMode_SINGLE_NODE_SINGLE_WRITER, stage.VolumeCapability.AccessMode.Mode)
	require.True(t, strings.HasPrefix(stage.StagingTargetPath, w.seen+"/plugins/kubernetes.io/csi/d.example/"), stage.StagingTargetPath)
	require.Equal(t, stage.StagingTargetPath, publish.StagingTargetPath)
	require.Equal(t, w.seen+"/pods/u1/volumes/kubernetes.io~csi/pv-v1/mount", publish.TargetPath)
	require.Equal(t, map[string]string{"k": "p"}, publish.Secrets)
	tokens := publish.VolumeContext["csi.storage.k8s.io/serviceAccount.tokens"]
	delete(publish.VolumeContext, "csi.storage.k8s.io/serviceAccount.tokens")
	require.Equal(t, map[string]string{
		"a": "b", "csi.storage.k8s.io/pod.name": "p-u1", "csi.storage.k8s.io/pod.namespace": "ns", "csi.storage.k8s.io/pod.uid": "u1",
		"csi.storage.k8s.io/serviceAccount.name": "sa", "csi.storage.k8s.io/ephemeral": "false",
	}, publish.VolumeContext)
	require.Contains(t, tokens, `"vault":{"token":"ns/sa for [vault] and p-u1"`)
	require.Contains(t, tokens, `"":{"token":"ns/sa for [] and p-u1"`)
	mu.Unlock()
	var st unix.Stat_t
	require.NoError(t, unix.Stat(path, &st))
	require.EqualValues(t, gid, st.Gid)

	// It grows, and the driver makes the node's part as large.
	bigger := pv.DeepCopy()
	bigger.Spec.Capacity[corev1.ResourceStorage] = resource.MustParse("2Gi")
	r.PV = bigger
	w.mount(r)
	require.Eventually(t, func() bool { return d.Size("v1") == 2<<30 }, 10*time.Second, time.Millisecond)
	// Nobody could be told, so it is done once more.
	grown := func() []string { w.mu.Lock(); defer w.mu.Unlock(); return slices.Clone(w.grown) }
	require.Eventually(t, func() bool { return len(grown()) == 2 }, 10*time.Second, time.Millisecond)
	require.Equal(t, []string{"ns/data pv-v1 2147483648", "ns/data pv-v1 2147483648"}, grown())
	w.mount(r)
	// The claim says the size already: others have seen to it.
	r.Claim = claim.DeepCopy()
	r.Claim.Status.Capacity[corev1.ResourceStorage] = resource.MustParse("4Gi")
	r.PV = bigger.DeepCopy()
	r.PV.Spec.Capacity[corev1.ResourceStorage] = resource.MustParse("4Gi")
	w.mount(r)
	w.release("u1")
	w.empty()
	n := 0
	for _, c := range d.Calls() {
		if strings.HasPrefix(c, "NodeExpandVolume") {
			n++
		}
	}
	require.Equal(t, 2, n)
}

// TestStats: a driver's figures are asked for once a minute, and nobody waits for them.
func TestStats(t *testing.T) {
	w := newWorld(t)
	var mu sync.Mutex
	now, asked, hang := time.Now(), 0, make(chan struct{})
	w.m.cfg.Now = func() time.Time { mu.Lock(); defer mu.Unlock(); return now }
	w.driver(csidriver.Config{Before: func(_ context.Context, method string, _ any) error {
		if method == "NodeGetVolumeStats" {
			mu.Lock()
			asked++
			mu.Unlock()
			<-hang
		}
		return nil
	}})
	_, known := w.m.Stats("u1", "data")
	require.False(t, known)
	path := w.mount(Request{Pod: w.pod("u1"), Volume: "data", PV: w.pv("v1")})
	for range 3 {
		_, known = w.m.Stats("u1", "data")
		require.False(t, known, "the driver hangs")
	}
	close(hang)
	var u Usage
	require.Eventually(t, func() bool { u, known = w.m.Stats("u1", "data"); return known }, 10*time.Second, time.Millisecond)
	var st unix.Statfs_t
	require.NoError(t, unix.Statfs(path, &st))
	require.Equal(t, int64(st.Blocks)*st.Bsize, u.Capacity)
	require.Equal(t, int64(st.Files), u.Inodes)
	count := func() int { mu.Lock(); defer mu.Unlock(); return asked }
	require.Equal(t, 1, count())
	mu.Lock()
	now = now.Add(statsEvery)
	mu.Unlock()
	require.Eventually(t, func() bool { w.m.Stats("u1", "data"); return count() == 2 }, 10*time.Second, time.Millisecond)
	w.release("u1")
	_, known = w.m.Stats("u1", "data")
	require.False(t, known)
	w.empty()
	require.Equal(t, Usage{Capacity: -1, Available: -1, Used: -1, Inodes: -1, InodesAvailable: -1, InodesUsed: -1}, usageOf(nil, time.Time{}))
}

// TestInlineVolumes: a volume of a pod's own is published without being staged or attached,
// if the driver says that it has such.
func TestInlineVolumes(t *testing.T) {
	w := newWorld(t)
	w.attachRequired(true)
	yes := true
	var mu sync.Mutex
	var publish *csi.NodePublishVolumeRequest
	d := w.driver(csidriver.Config{Before: func(_ context.Context, _ string, req any) error {
		mu.Lock()
		defer mu.Unlock()
		if r, ok := req.(*csi.NodePublishVolumeRequest); ok {
			publish = r
		}
		return nil
	}})
	r := Request{Pod: w.pod("u1"), Volume: "scratch", Inline: true, ReadOnly: true, Source: &corev1.CSIVolumeSource{Driver: name, VolumeAttributes: map[string]string{"size": "1"}}}
	w.refused(r, `volume mode "Ephemeral" not supported by driver d.example (only supports [])`)
	ext4 := "ext4"
	r.Source.FSType, r.Source.NodePublishSecretRef = &ext4, &corev1.LocalObjectReference{Name: "own"}
	w.driverIs(func(s *storagev1.CSIDriverSpec) {
		s.PodInfoOnMount, s.VolumeLifecycleModes = &yes, []storagev1.VolumeLifecycleMode{storagev1.VolumeLifecycleEphemeral}
	})
	// The Secret is of the pod's namespace, whatever there is elsewhere.
	w.mu.Lock()
	w.secrets["sys/own"] = &corev1.Secret{Data: map[string][]byte{"k": []byte("others'")}}
	w.mu.Unlock()
	w.refused(r, "fetching NodePublishSecretRef ns/own failed")
	w.mu.Lock()
	w.secrets["ns/own"] = &corev1.Secret{Data: map[string][]byte{"k": []byte("own")}}
	w.mu.Unlock()
	path := w.mount(r)
	mu.Lock()
	require.Equal(t, map[string]string{"k": "own"}, publish.Secrets)
	require.Equal(t, "ext4", publish.VolumeCapability.GetMount().FsType)
	require.Equal(t, "1", publish.VolumeContext["size"])
	require.Equal(t, "true", publish.VolumeContext["csi.storage.k8s.io/ephemeral"])
	require.True(t, publish.Readonly)
	mu.Unlock()
	require.ErrorIs(t, os.WriteFile(filepath.Join(path, "f"), nil, 0o600), unix.EROFS)
	require.Empty(t, w.m.Facts().InUse)
	w.refused(Request{Pod: w.pod("u1"), Volume: "pv", PV: w.pv("v1")}, "VolumesInUse")
	w.release("u1")
	w.empty()
	require.Equal(t, []string{"NodePublishVolume", "NodeUnpublishVolume"}, func() (out []string) {
		for _, c := range d.Calls() {
			method, _, _ := strings.Cut(c, " ")
			out = append(out, method)
		}
		return out
	}())
}

// TestBlockVolumes: a block volume is a device.
func TestBlockVolumes(t *testing.T) {
	w := newWorld(t)
	w.driver(csidriver.Config{})
	r := Request{Pod: w.pod("u1"), Volume: "disk", PV: w.pv("v1"), Block: true}
	path := w.mount(r)
	var st unix.Stat_t
	require.NoError(t, unix.Lstat(path, &st))
	require.EqualValues(t, unix.S_IFBLK, st.Mode&unix.S_IFMT)
	w.kill()
	w.start()
	w.register()
	require.Equal(t, path, w.mount(r))
	w.release("u1")
	w.empty()
}

// TestRegistration: what the CSINode and the Node say of drivers, and who is refused.
func TestRegistration(t *testing.T) {
	w := newWorld(t)
	w.driver(csidriver.Config{NodeID: "n-1", Segments: map[string]string{"topology.d.example/rack": "r1"}, MaxVolumes: 7})
	w.mu.Lock()
	require.Equal(t, []storagev1.CSINodeDriver{{Name: name, NodeID: "n-1", TopologyKeys: []string{"topology.d.example/rack"},
		Allocatable: &storagev1.VolumeNodeResources{Count: new(int32(7))}}}, w.told.Spec.Drivers)
	w.mu.Unlock()
	require.Equal(t, map[string]string{"topology.d.example/rack": "r1"}, w.m.Facts().Labels)
	require.Equal(t, `{"d.example":"n-1"}`, w.m.Facts().NodeIDs)

	// Another that takes the name is refused, for as long as the first is there, and what
	// it says when it goes is not about the first.
	other := w.plugin()
	other.Socket = "other.sock"
	require.ErrorContains(t, w.m.Register(t.Context(), other), "Another driver with the same name is already registered")
	w.m.Deregister(other)
	require.NotEmpty(t, w.m.Facts().NodeIDs)

	outside := filepath.Join(filepath.Dir(w.root), "s.sock")
	require.NoError(t, os.WriteFile(outside, nil, 0o600))
	require.NoError(t, os.Symlink(outside, filepath.Join(w.root, "plugins", "link.sock")))
	for why, change := range map[string]func(*plugin.Plugin){
		"is not in":                            func(p *plugin.Plugin) { p.Endpoint = "/run/containerd/containerd.sock" },
		"is not in ":                           func(p *plugin.Plugin) { p.Endpoint = w.seen + "/plugins/../../s.sock" },
		"it is a symbolic link, no socket":     func(p *plugin.Plugin) { p.Endpoint = w.seen + "/plugins/link.sock" },
		"None of the versions":                 func(p *plugin.Plugin) { p.Versions = []string{"2.0.0"} },
		"returned an empty list":               func(p *plugin.Plugin) { p.Versions = nil },
		"is no name of a CSI driver":           func(p *plugin.Plugin) { p.Name = "../x" },
		"is no name of a CSI driver ":          func(p *plugin.Plugin) { p.Name = strings.Repeat("a", 64) },
		"another driver, that does not answer": func(p *plugin.Plugin) { p.Name, p.Endpoint = "e", w.seen+"/plugins/none.sock" },
	} {
		p := w.plugin()
		p.Name, p.Socket = "e.example", "e.sock"
		change(&p)
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		err := w.m.Register(ctx, p)
		cancel()
		require.Error(t, err, why)
		if !strings.Contains(why, ",") {
			require.ErrorContains(t, err, strings.TrimSpace(why))
		}
	}
	w.m.Deregister(w.plugin())
	w.mu.Lock()
	require.Empty(t, w.told.Spec.Drivers)
	require.Equal(t, []string{name}, w.gone)
	w.mu.Unlock()
	require.Empty(t, w.m.Facts().NodeIDs)

	for why, cfg := range map[string]csidriver.Config{
		"calls this node by 300 bytes":      {NodeID: strings.Repeat("n", 300)},
		"a node may not give itself":        {Segments: map[string]string{"node-restriction.kubernetes.io/x": "y"}},
		"is no label":                       {Segments: map[string]string{"a b": "c"}},
		"detected topology value collision": {Segments: map[string]string{"zone": "z2"}},
	} {
		w.mu.Lock()
		w.node = &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "a1", Labels: map[string]string{"zone": "z1"}}}
		w.mu.Unlock()
		cfg.Name, cfg.Dir, cfg.Socket = name, w.disk, filepath.Join(w.root, "plugins", "bad", "csi.sock")
		d, err := csidriver.Start(cfg)
		require.NoError(t, err)
		p := w.plugin()
		p.Endpoint = filepath.Join(w.seen, "plugins", "bad", "csi.sock")
		require.ErrorContains(t, w.m.Register(t.Context(), p), why)
		d.Stop()
		require.Empty(t, w.m.Facts().Labels)
	}
}

// TestDamagedRecords: what cannot be read, or is not what it says, is left alone.
func TestDamagedRecords(t *testing.T) {
	w := newWorld(t)
	w.driver(csidriver.Config{})
	w.mount(Request{Pod: w.pod("u1"), Volume: "data", PV: w.pv("v1")})
	w.kill()
	dir := filepath.Join(w.root, "csi", publishedDir)
	for file, body := range map[string]string{
		"a.json": "", "b.json": "{", "u9_x.json": `{"Driver":"d.example","Handle":"v","UID":"u9","Volume":"x","Path":"../../etc"}`,
		"u8_x.json": `{"Driver":"../d","Handle":"v","UID":"u8","Volume":"x","Path":"pods/u8"}`, "u7_x.json": `{"Driver":"d.example","Handle":"v","UID":"u6","Volume":"x","Path":"pods/u7"}`,
		"huge.json": strings.Repeat(" ", 1<<20),
	} {
		require.NoError(t, os.WriteFile(filepath.Join(dir, file), []byte(body), 0o600))
	}
	require.NoError(t, os.Symlink("/etc/passwd", filepath.Join(dir, "l.json")))
	w.start()
	require.Equal(t, []types.UID{"u1"}, w.m.Pods())
	_, _, err := w.m.records.load()
	for _, file := range []string{"a.json", "b.json", "u9_x", "u8_x", "u7_x", "huge", "l.json"} {
		require.ErrorContains(t, err, file)
	}
	w.register()
	w.release("u1")
	found, err := filepath.Glob(filepath.Join(w.root, "csi", stagedDir, "*"))
	require.NoError(t, err)
	require.Eventually(t, func() bool {
		found, _ = filepath.Glob(filepath.Join(w.root, "csi", stagedDir, "*"))
		return len(found) == 0
	}, 10*time.Second, time.Millisecond)
}

// TestRepublish: a driver that asks for it publishes again, when the time has come, and one
// that fails then takes nothing from the pod.
func TestRepublish(t *testing.T) {
	w := newWorld(t)
	yes := true
	w.driverIs(func(s *storagev1.CSIDriverSpec) { s.RequiresRepublish = &yes })
	var mu sync.Mutex
	now, fails := time.Now(), false
	w.m.cfg.Now = func() time.Time { mu.Lock(); defer mu.Unlock(); return now }
	d := w.driver(csidriver.Config{Before: func(_ context.Context, method string, _ any) error {
		mu.Lock()
		defer mu.Unlock()
		if fails && method == "NodePublishVolume" {
			return status.Error(codes.Internal, "not now")
		}
		return nil
	}})
	published := func() (n int) {
		for _, c := range d.Calls() {
			if strings.HasPrefix(c, "NodePublishVolume") {
				n++
			}
		}
		return n
	}
	r := Request{Pod: w.pod("u1"), Volume: "data", PV: w.pv("v1")}
	path := w.mount(r)
	w.written(path)
	_, again, err := w.m.Mount(r)
	require.NoError(t, err)
	require.Equal(t, now.Add(republishEvery), again)
	require.Equal(t, 1, published())
	for i := range 3 {
		mu.Lock()
		now, fails = now.Add(republishEvery), i == 1
		mu.Unlock()
		_, again, err = w.m.Mount(r)
		require.NoError(t, err)
		require.True(t, again.After(now))
		require.Eventually(t, func() bool { return published() == 2+i }, 10*time.Second, time.Millisecond)
		require.Eventually(t, func() bool { w.m.mu.Lock(); defer w.m.mu.Unlock(); return !w.m.volumes[r.key()].busy }, 10*time.Second, time.Millisecond)
		require.FileExists(t, filepath.Join(path, "f"))
	}
	w.release("u1")
	w.empty()
}

// TestPlan: what is next of a volume.
func TestPlan(t *testing.T) {
	t.Parallel()
	now := time.Now()
	a, b := user{"a", "v"}, user{"b", "v"}
	want := &Request{}
	done, half := &published{Done: true}, &published{}
	on, off := &staged{Done: true}, &staged{}
	for what, tt := range map[string]struct {
		s    state
		f    facts
		put  map[deed]backOff
		next deed
		wake time.Duration
	}{
		"nothing known":                 {},
		"staged before published":       {s: state{uses: map[user]use{a: {want: want}}}, f: facts{stages: true}, next: deed{stage, a}},
		"half staged is staged again":   {s: state{staged: off, uses: map[user]use{a: {want: want}}}, f: facts{stages: true}, next: deed{stage, a}},
		"staged, so published":          {s: state{staged: on, uses: map[user]use{a: {want: want}}}, f: facts{stages: true}, next: deed{publish, a}},
		"a driver that does not stage":  {s: state{uses: map[user]use{a: {want: want}}}, next: deed{publish, a}},
		"inline is not staged":          {s: state{uses: map[user]use{a: {want: &Request{Inline: true}}}}, f: facts{stages: true}, next: deed{publish, a}},
		"half published again":          {s: state{staged: on, uses: map[user]use{a: {want: want, rec: half}}}, f: facts{stages: true}, next: deed{publish, a}},
		"at rest":                       {s: state{staged: on, uses: map[user]use{a: {want: want, rec: done}}}, f: facts{stages: true}},
		"once more":                     {s: state{staged: on, uses: map[user]use{a: {want: want, rec: done, again: true}}}, f: facts{stages: true}, next: deed{publish, a}},
		"grows":                         {s: state{staged: on, uses: map[user]use{a: {want: want, rec: done, grow: 1}}}, f: facts{stages: true}, next: deed{expand, a}},
		"who goes goes first":           {s: state{staged: on, uses: map[user]use{a: {want: want}, b: {rec: done}}}, f: facts{stages: true}, next: deed{unpublish, b}},
		"half published is taken back":  {s: state{staged: on, uses: map[user]use{b: {rec: half}}}, f: facts{stages: true}, next: deed{unpublish, b}},
		"not unstaged under a pod":      {s: state{staged: on, uses: map[user]use{b: {rec: done}}}, put: map[deed]backOff{{unpublish, b}: {until: now.Add(time.Second)}}, wake: time.Second},
		"not unstaged before who comes": {s: state{staged: on, uses: map[user]use{a: {want: want}}}, f: facts{stages: true, blocked: map[user]string{a: "x"}}},
		"unstaged at last":              {s: state{staged: off}, f: facts{stages: true}, next: deed{unstage, user{}}},
		"blocked":                       {s: state{uses: map[user]use{a: {want: want}, b: {want: want}}}, f: facts{blocked: map[user]string{a: "x"}}, next: deed{publish, b}},
		"put off for all":               {s: state{uses: map[user]use{a: {want: want}, b: {want: want}}}, f: facts{stages: true}, put: map[deed]backOff{{stage, user{}}: {until: now.Add(time.Minute)}}, wake: time.Minute},
		"put off for one":               {s: state{uses: map[user]use{a: {want: want}, b: {want: want}}}, put: map[deed]backOff{{publish, a}: {until: now.Add(time.Minute)}}, next: deed{publish, b}},
		"left by an agent before":       {s: state{staged: on, uses: map[user]use{b: {rec: done, left: true}}}, f: facts{stages: true}},
		"no driver":                     {s: state{staged: on, uses: map[user]use{b: {rec: done}}}, f: facts{absent: "gone"}},
	} {
		before := maps.Clone(tt.s.uses)
		next, wake := plan(&tt.s, tt.f, tt.put, now)
		require.Equal(t, tt.next, next, what)
		if tt.wake > 0 {
			require.Equal(t, now.Add(tt.wake), wake, what)
		} else if next.kind == nothing {
			require.True(t, wake.IsZero(), what)
		}
		require.Equal(t, before, tt.s.uses, what)
	}
	delay := backOff{}
	var delays []time.Duration
	for range 11 {
		delay = delay.after(now)
		delays = append(delays, delay.delay)
	}
	require.Equal(t, firstDelay, delays[0])
	require.Equal(t, lastDelay, delays[10])
	require.True(t, slices.IsSorted(delays))
	require.False(t, isFinal(errors.New("no answer")))
}
