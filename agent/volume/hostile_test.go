package volume

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// within fails a test in which something blocks: a FIFO that is opened.
func within(t *testing.T, f func()) {
	t.Helper()
	done := make(chan struct{})
	go func() { defer close(done); f() }()
	select {
	case <-done:
	case <-time.After(30 * time.Second):
		t.Fatal("blocks")
	}
}

// apiVolumes are one volume of each kind that shows API data, and what "key" in
// it holds.
func apiVolumes() (*fakeObjects, Tokens, map[string]corev1.VolumeSource) {
	objects := &fakeObjects{
		maps:    map[string]*corev1.ConfigMap{"o": {Data: map[string]string{"key": "data"}}},
		secrets: map[string]*corev1.Secret{"o": {Data: map[string][]byte{"key": []byte("data")}}},
	}
	tokens := func(_ context.Context, _, _ string, tr *authenticationv1.TokenRequest) (*authenticationv1.TokenRequest, error) {
		out := tr.DeepCopy()
		out.Status.Token, out.Status.ExpirationTimestamp = "data", metav1.NewTime(time.Now().Add(time.Hour))
		return out, nil
	}
	ref := corev1.LocalObjectReference{Name: "o"}
	return objects, tokens, map[string]corev1.VolumeSource{
		"configMap":   {ConfigMap: &corev1.ConfigMapVolumeSource{LocalObjectReference: ref}},
		"secret":      {Secret: &corev1.SecretVolumeSource{SecretName: "o"}},
		"downwardAPI": {DownwardAPI: &corev1.DownwardAPIVolumeSource{Items: []corev1.DownwardAPIVolumeFile{{Path: "key", FieldRef: &corev1.ObjectFieldSelector{FieldPath: "metadata.annotations['say']"}}}}},
		"projected":   {Projected: &corev1.ProjectedVolumeSource{Sources: []corev1.VolumeProjection{{ServiceAccountToken: &corev1.ServiceAccountTokenProjection{Path: "key"}}}}},
		"projected configMap in a folder": {Projected: &corev1.ProjectedVolumeSource{Sources: []corev1.VolumeProjection{{ConfigMap: &corev1.ConfigMapProjection{
			LocalObjectReference: ref, Items: []corev1.KeyToPath{{Key: "key", Path: "deep/er/key"}}}}}}},
	}
}

// plants are what a container that can write to a volume may put at a path.
var plants = map[string]func(t *testing.T, path, outside string) error{
	"link to a file":       func(_ *testing.T, path, out string) error { return os.Symlink(filepath.Join(out, "secret"), path) },
	"link to a folder":     func(_ *testing.T, path, out string) error { return os.Symlink(out, path) },
	"link to itself":       func(_ *testing.T, path, _ string) error { return os.Symlink(filepath.Base(path), path) },
	"link to a magic link": func(_ *testing.T, path, _ string) error { return os.Symlink("/proc/self/root", path) },
	"fifo":                 func(_ *testing.T, path, _ string) error { return unix.Mkfifo(path, 0o666) },
	"character device": func(_ *testing.T, path, _ string) error {
		return unix.Mknod(path, unix.S_IFCHR|0o666, int(unix.Mkdev(1, 5)))
	},
	"block device": func(_ *testing.T, path, _ string) error {
		return unix.Mknod(path, unix.S_IFBLK|0o666, int(unix.Mkdev(7, 0)))
	},
	"socket":                   func(_ *testing.T, path, _ string) error { return unix.Mknod(path, unix.S_IFSOCK|0o666, 0) },
	"folder that is not empty": func(_ *testing.T, path, _ string) error { return os.MkdirAll(filepath.Join(path, "a", "b"), 0o755) },
	"huge file": func(_ *testing.T, path, _ string) error {
		if err := os.WriteFile(path, nil, 0o600); err != nil {
			return err
		}
		return os.Truncate(path, 1<<40)
	},
	"mount of a folder": func(t *testing.T, path, out string) error {
		if err := os.Mkdir(path, 0o755); err != nil {
			return err
		}
		t.Cleanup(func() { _ = unix.Unmount(path, unix.MNT_DETACH) })
		return unix.Mount(out, path, "", unix.MS_BIND, "")
	},
}

// TestWhatIsPlantedInAVolumeLeadsNowhere puts everything that there is in place
// of everything that the writer of a volume goes by, in each kind of volume, and
// brings the volume up to date, with the same content and with another.
func TestWhatIsPlantedInAVolumeLeadsNowhere(t *testing.T) {
	t.Parallel()
	_, _, kinds := apiVolumes()
	for kind, source := range kinds {
		for plantName, plant := range plants {
			for _, place := range []string{"key", "..data", "version", "version/key", "foreign", "..data_next", "..data_tmp"} {
				t.Run(kind+"/"+plantName+"/"+strings.ReplaceAll(place, "/", " "), func(t *testing.T) {
					t.Parallel()
					objects, tokens, _ := apiVolumes()
					m := manager(t, Config{Objects: objects, Tokens: tokens})
					pod := newPod(corev1.Volume{Name: "v", VolumeSource: source})
					pod.Annotations = map[string]string{"say": "data"}
					outside := t.TempDir()
					require.NoError(t, os.WriteFile(filepath.Join(outside, "secret"), []byte("SECRET"), 0o600))
					require.NoError(t, os.Chmod(outside, 0o700))

					mounts, _, err := m.Setup(t.Context(), pod, nil)
					require.NoError(t, err)
					dir := mounts["v"]
					version, err := os.Readlink(filepath.Join(dir, "..data"))
					require.NoError(t, err)
					key := "key"
					if kind == "projected configMap in a folder" {
						key = "deep/er/key"
					}
					path := filepath.Join(dir, map[string]string{"version": version, "version/key": filepath.Join(version, key), "key": key}[place])
					if path == dir {
						path = filepath.Join(dir, place)
					}
					if place == "key" {
						path = filepath.Join(dir, strings.Split(key, "/")[0])
					}
					require.NoError(t, os.RemoveAll(path))
					require.NoError(t, plant(t, path, outside))

					check := func(want string) {
						t.Helper()
						if plantName == "mount of a folder" {
							// Never written into; the volume is in error until it is gone.
							_ = hostileUnmount(path)
						}
						within(t, func() {
							_, _, err := m.Setup(t.Context(), pod, nil)
							require.NoError(t, err)
						})
						files := map[string]string{}
						require.NoError(t, filepath.WalkDir(filepath.Join(dir, "..data")+"/", func(p string, d os.DirEntry, err error) error {
							if err == nil && !d.IsDir() {
								require.True(t, d.Type().IsRegular(), p)
								raw, err := os.ReadFile(p)
								require.NoError(t, err)
								rel, err := filepath.Rel(filepath.Join(dir, "..data"), p)
								require.NoError(t, err)
								files[rel] = string(raw)
							}
							return err
						}))
						require.Equal(t, map[string]string{key: want}, files)
						raw, err := os.ReadFile(filepath.Join(dir, key))
						require.NoError(t, err)
						require.Equal(t, want, string(raw))
						entries, err := os.ReadDir(dir)
						require.NoError(t, err)
						require.Len(t, entries, 3, "..data, the version and the key, nothing else")
						entries, err = os.ReadDir(outside)
						require.NoError(t, err)
						require.Len(t, entries, 1)
						raw, err = os.ReadFile(filepath.Join(outside, "secret"))
						require.NoError(t, err)
						require.Equal(t, "SECRET", string(raw))
						info, err := os.Stat(outside)
						require.NoError(t, err)
						require.EqualValues(t, 0o700, info.Mode().Perm())
					}
					if plantName == "mount of a folder" {
						within(t, func() { _, _, _ = m.Setup(t.Context(), pod, nil) })
					}
					check("data")
					if kind == "projected" {
						return // a token does not change
					}
					require.NoError(t, os.RemoveAll(path))
					_ = plant(t, path, outside)
					objects.maps["o"] = &corev1.ConfigMap{Data: map[string]string{"key": "more"}}
					objects.secrets["o"] = &corev1.Secret{Data: map[string][]byte{"key": []byte("more")}}
					pod.Annotations = map[string]string{"say": "more"}
					check("more")
					require.NoError(t, m.Teardown(t.Context(), pod.UID))
					require.NoDirExists(t, m.PodDir(pod.UID))
					require.FileExists(t, filepath.Join(outside, "secret"))
				})
			}
		}
	}
}

func hostileUnmount(path string) error { return unix.Unmount(path, unix.MNT_DETACH) }

// TestSwappingDuringAnUpdate has several attackers that swap the folders and
// links of a volume for others, by renameat2 as fast as they can, while a big
// ConfigMap is replaced again and again.
func TestSwappingDuringAnUpdate(t *testing.T) {
	t.Parallel()
	big := func(round int) *corev1.ConfigMap {
		cm := &corev1.ConfigMap{Data: map[string]string{}}
		for i := range 400 {
			cm.Data["key-"+strconv.Itoa(i)] = fmt.Sprintf("round %d", round)
		}
		return cm
	}
	objects := &fakeObjects{maps: map[string]*corev1.ConfigMap{"cm": big(0)}}
	m := manager(t, Config{Objects: objects})
	gid := int64(4711)
	pod := newPod(configMapVolume("cm"))
	pod.Spec.SecurityContext = &corev1.PodSecurityContext{FSGroup: &gid}
	mounts, _, err := m.Setup(t.Context(), pod, nil)
	require.NoError(t, err)
	dir, outside := mounts["v"], t.TempDir()
	require.NoError(t, os.WriteFile(filepath.Join(outside, "key-1"), []byte("SECRET"), 0o600))

	var stop atomic.Bool
	var wg sync.WaitGroup
	fd, err := unix.Open(dir, unix.O_DIRECTORY|unix.O_RDONLY|unix.O_CLOEXEC, 0)
	require.NoError(t, err)
	var swaps atomic.Int64
	wg.Go(func() { // ..version-* and ..data for a link to the host's folder, and back
		for i := 0; !stop.Load(); i++ {
			entries, err := os.ReadDir(dir)
			if err != nil {
				continue
			}
			for _, e := range entries {
				if !strings.HasPrefix(e.Name(), "..version-") && e.Name() != "..data" && i%16 != 0 {
					continue
				}
				_ = unix.Symlinkat(outside, fd, "trap")
				if unix.Renameat2(fd, "trap", fd, e.Name(), unix.RENAME_EXCHANGE) == nil {
					swaps.Add(1)
					if i%2 == 0 {
						_ = unix.Renameat2(fd, "trap", fd, e.Name(), unix.RENAME_EXCHANGE)
					}
				}
			}
		}
	})
	wg.Go(func() { // a folder of the attacker's, and FIFOs for files
		for !stop.Load() {
			_ = os.Mkdir(filepath.Join(dir, "mine"), 0o777)
			_ = unix.Mkfifo(filepath.Join(dir, "mine", "key-1"), 0o666)
			_ = unix.Renameat2(fd, "mine", fd, "..data", unix.RENAME_EXCHANGE)
			_ = unix.Mkfifo(filepath.Join(dir, "key-2"), 0o666)
		}
	})
	within(t, func() {
		deadline := time.Now().Add(5 * time.Second)
		for round := 1; round < 300 && time.Now().Before(deadline); round++ {
			objects.maps["cm"] = big(round)
			_, _, _ = m.Setup(t.Context(), pod, nil) // may fail: it is being torn
		}
	})
	stop.Store(true)
	wg.Wait()
	unix.Close(fd)
	require.Positive(t, swaps.Load())

	entries, err := os.ReadDir(outside)
	require.NoError(t, err)
	require.Len(t, entries, 1, "nothing was made outside")
	info, err := os.Stat(filepath.Join(outside, "key-1"))
	require.NoError(t, err)
	require.EqualValues(t, 0o600, info.Mode().Perm())
	raw, err := os.ReadFile(filepath.Join(outside, "key-1"))
	require.NoError(t, err)
	require.Equal(t, "SECRET", string(raw))

	t.Log("once it is left alone, the volume is whole again")
	objects.maps["cm"] = &corev1.ConfigMap{Data: map[string]string{"key-1": "one"}}
	_, _, err = m.Setup(t.Context(), pod, nil)
	require.NoError(t, err)
	require.Equal(t, map[string]string{"key-1": "one"}, tree(t, dir))
	require.NoError(t, m.Teardown(t.Context(), pod.UID))
}

// TestATokenIsNeverReadBack is the attack that was found: a link in place of the
// token, and anything that makes the volume be written again.
func TestATokenIsNeverReadBack(t *testing.T) {
	t.Parallel()
	objects, tokens, kinds := apiVolumes()
	m := manager(t, Config{Objects: objects, Tokens: tokens})
	pod := newPod(corev1.Volume{Name: "v", VolumeSource: kinds["projected"]})
	mounts, _, err := m.Setup(t.Context(), pod, nil)
	require.NoError(t, err)
	for _, target := range []string{"/etc/shadow", "/etc/passwd", "../../../../../../../../../etc/passwd"} {
		require.NoError(t, os.Remove(filepath.Join(mounts["v"], "key")))
		require.NoError(t, os.Symlink(target, filepath.Join(mounts["v"], "key")))
		for _, agent := range []*Manager{m, New(m.cfg)} { // this one, and one that starts anew
			_, _, err = agent.Setup(t.Context(), pod, nil)
			require.NoError(t, err)
			require.Equal(t, map[string]string{"key": "data"}, tree(t, mounts["v"]))
		}
	}
}

// TestMissingLinksAreMade has an update that ended after its files were written
// and the link to them was changed.
func TestMissingLinksAreMade(t *testing.T) {
	t.Parallel()
	cm := &corev1.ConfigMap{Data: map[string]string{}}
	want := map[string]string{}
	for i := range 6000 {
		want["key-"+strconv.Itoa(i)] = "x"
	}
	cm.Data = want
	m := manager(t, Config{Objects: &fakeObjects{maps: map[string]*corev1.ConfigMap{"cm": cm}}})
	pod := newPod(configMapVolume("cm"))
	mounts, _, err := m.Setup(t.Context(), pod, nil)
	require.NoError(t, err)
	for i := 5; i < 6000; i++ {
		require.NoError(t, os.Remove(filepath.Join(mounts["v"], "key-"+strconv.Itoa(i))))
	}
	require.NoError(t, os.Symlink("..data/old", filepath.Join(mounts["v"], "old")))
	_, _, err = m.Setup(t.Context(), pod, nil)
	require.NoError(t, err)
	require.Equal(t, want, tree(t, mounts["v"]))
	require.NoFileExists(t, filepath.Join(mounts["v"], "old"))
}

// TestAPIVolumesAreOnMemory of a size that follows what is in them, are
// recognised by the next agent, and go with the pod.
func TestAPIVolumesAreOnMemory(t *testing.T) {
	t.Parallel()
	objects, tokens, kinds := apiVolumes()
	m := manager(t, Config{Objects: objects, Tokens: tokens})
	var list []corev1.Volume
	for _, source := range kinds {
		list = append(list, corev1.Volume{Name: fmt.Sprintf("v%d", len(list)), VolumeSource: source})
		require.True(t, ReadOnly(&list[len(list)-1]))
	}
	pod := newPod(list...)
	pod.Annotations = map[string]string{"say": "data"}
	mounts, _, err := m.Setup(t.Context(), pod, nil)
	require.NoError(t, err)
	_, _, err = New(m.cfg).Setup(t.Context(), pod, nil)
	require.NoError(t, err)
	size := func(path string) int64 {
		var st unix.Statfs_t
		require.NoError(t, unix.Statfs(path, &st))
		require.EqualValues(t, unix.TMPFS_MAGIC, st.Type, path)
		return int64(st.Blocks) * st.Bsize
	}
	points, err := os.ReadFile("/proc/self/mountinfo")
	require.NoError(t, err)
	for _, path := range mounts {
		require.Equal(t, 1, strings.Count(string(points), " "+path+" "), "mounted once")
		require.Less(t, size(path), int64(2<<20))
	}
	grown := map[string]string{}
	for i := range 40 {
		grown["key"+strconv.Itoa(i)] = strings.Repeat("x", 100_000)
	}
	for range 3 {
		objects.maps["o"] = &corev1.ConfigMap{Data: grown}
		for i := range list {
			if s := list[i].ConfigMap; s != nil {
				mounts, _, err = m.Setup(t.Context(), newPod(list[i]), nil)
				require.NoError(t, err)
				require.Equal(t, grown, tree(t, mounts[list[i].Name]))
				require.Less(t, size(mounts[list[i].Name]), int64(12<<20))
			}
		}
		grown["key0"] += "y"
	}
	require.NoError(t, m.Teardown(t.Context(), pod.UID))
	points, err = os.ReadFile("/proc/self/mountinfo")
	require.NoError(t, err)
	require.NotContains(t, string(points), m.cfg.Dir)
}

// TestAFolderOfAnOlderAgent stays where its containers have it mounted.
func TestAFolderOfAnOlderAgent(t *testing.T) {
	t.Parallel()
	objects := &fakeObjects{maps: map[string]*corev1.ConfigMap{"cm": {Data: map[string]string{"one": "1"}}}}
	m := manager(t, Config{Objects: objects})
	pod := newPod(configMapVolume("cm"))
	dir := m.path(pod.UID, "configmap", "v")
	require.NoError(t, os.MkdirAll(filepath.Join(dir, "..version-123"), 0o755))
	require.NoError(t, os.WriteFile(filepath.Join(dir, "..version-123", "one"), []byte("1"), 0o644))
	require.NoError(t, os.Symlink("..version-123", filepath.Join(dir, "..data")))
	require.NoError(t, os.Symlink("..data/one", filepath.Join(dir, "one")))
	before, err := os.Stat(dir)
	require.NoError(t, err)
	_, _, err = m.Setup(t.Context(), pod, nil)
	require.NoError(t, err)
	version, err := os.Readlink(filepath.Join(dir, "..data"))
	require.NoError(t, err)
	require.Equal(t, "..version-123", version, "what has not changed is not written again")
	objects.maps["cm"] = &corev1.ConfigMap{Data: map[string]string{"two": "2"}}
	_, _, err = m.Setup(t.Context(), pod, nil)
	require.NoError(t, err)
	require.Equal(t, map[string]string{"two": "2"}, tree(t, dir))
	after, err := os.Stat(dir)
	require.NoError(t, err)
	require.True(t, os.SameFile(before, after))
}

func TestModes(t *testing.T) {
	t.Parallel()
	gid, uid, other := int64(2000), int64(1000), int64(1001)
	objects, tokens, kinds := apiVolumes()
	for _, tc := range []struct {
		name    string
		kind    string
		spec    corev1.PodSpec
		mode    uint32
		uid     uint32
		gid     uint32
		dirMode uint32
	}{
		{"plain", "configMap", corev1.PodSpec{}, 0o644, 0, 0, 0o755},
		{"fsGroup", "configMap", corev1.PodSpec{SecurityContext: &corev1.PodSecurityContext{FSGroup: &gid}}, 0o644, 0, 2000, 0o2755},
		{"token", "projected", corev1.PodSpec{}, 0o644, 0, 0, 0o755},
		{"token with fsGroup", "projected", corev1.PodSpec{SecurityContext: &corev1.PodSecurityContext{FSGroup: &gid}}, 0o640, 0, 2000, 0o2755},
		{"token of one user", "projected", corev1.PodSpec{SecurityContext: &corev1.PodSecurityContext{RunAsUser: &uid}}, 0o600, 1000, 0, 0o755},
		{"token of one user with fsGroup", "projected", corev1.PodSpec{SecurityContext: &corev1.PodSecurityContext{RunAsUser: &uid, FSGroup: &gid}}, 0o640, 1000, 2000, 0o2755},
		{"token of two users", "projected", corev1.PodSpec{SecurityContext: &corev1.PodSecurityContext{RunAsUser: &uid}, InitContainers: []corev1.Container{{SecurityContext: &corev1.SecurityContext{RunAsUser: &other}}}}, 0o644, 0, 0, 0o755},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			m := manager(t, Config{Objects: objects, Tokens: tokens})
			pod := newPod(corev1.Volume{Name: "v", VolumeSource: kinds[tc.kind]})
			pod.Spec.SecurityContext, pod.Spec.InitContainers, pod.Spec.Containers = tc.spec.SecurityContext, tc.spec.InitContainers, []corev1.Container{{Name: "c"}}
			mounts, _, err := m.Setup(t.Context(), pod, nil)
			require.NoError(t, err)
			var st unix.Stat_t
			require.NoError(t, unix.Stat(filepath.Join(mounts["v"], "key"), &st))
			require.Equal(t, []uint32{tc.mode, tc.uid, tc.gid}, []uint32{st.Mode & 0o7777, st.Uid, st.Gid})
			for _, dir := range []string{"", "..data"} {
				require.NoError(t, unix.Stat(filepath.Join(mounts["v"], dir), &st))
				require.Equal(t, []uint32{tc.dirMode, 0, tc.gid}, []uint32{st.Mode & 0o7777, st.Uid, st.Gid})
			}
		})
	}
}

func TestEmptyDirOnMemoryHasASize(t *testing.T) {
	t.Parallel()
	limit := func(q string) corev1.ResourceRequirements {
		if q == "" {
			return corev1.ResourceRequirements{}
		}
		return corev1.ResourceRequirements{Limits: corev1.ResourceList{corev1.ResourceMemory: resource.MustParse(q)}}
	}
	for _, tc := range []struct {
		name       string
		containers []string // memory limits
		pod        string
		size       string
		want       int64
	}{
		{"what the node gives", []string{""}, "", "", 64 << 20},
		{"the volume's limit", []string{""}, "", "3Mi", 3 << 20},
		{"the pod's limit", []string{"4Mi", "8Mi"}, "", "", 12 << 20},
		{"the less of both", []string{"4Mi"}, "", "5Mi", 4 << 20},
		{"a container without a limit", []string{"4Mi", ""}, "", "", 64 << 20},
		{"a limit of the pod as a whole", []string{"4Mi", ""}, "6Mi", "", 6 << 20},
		{"more than the node gives", []string{"1Gi"}, "", "2Gi", 64 << 20},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			m := manager(t, Config{Allocatable: func() corev1.ResourceList {
				return corev1.ResourceList{corev1.ResourceMemory: resource.MustParse("64Mi")}
			}})
			src := &corev1.EmptyDirVolumeSource{Medium: corev1.StorageMediumMemory}
			if tc.size != "" {
				src.SizeLimit = new(resource.MustParse(tc.size))
			}
			gid := int64(2000)
			pod := newPod(corev1.Volume{Name: "v", VolumeSource: corev1.VolumeSource{EmptyDir: src}})
			pod.Spec.SecurityContext = &corev1.PodSecurityContext{FSGroup: &gid}
			for _, q := range tc.containers {
				pod.Spec.Containers = append(pod.Spec.Containers, corev1.Container{Resources: limit(q)})
			}
			if tc.pod != "" {
				pod.Spec.Resources = new(limit(tc.pod))
			}
			var st unix.Statfs_t
			for range 2 { // again: recognised
				mounts, _, err := m.Setup(t.Context(), pod, nil)
				require.NoError(t, err)
				require.NoError(t, unix.Statfs(mounts["v"], &st))
				require.EqualValues(t, unix.TMPFS_MAGIC, st.Type)
				require.Equal(t, tc.want, int64(st.Blocks)*st.Bsize)
				var fi unix.Stat_t
				require.NoError(t, unix.Stat(mounts["v"], &fi))
				require.Equal(t, []uint32{0o2777, 2000}, []uint32{fi.Mode & 0o7777, fi.Gid})
			}
		})
	}
}

// TestRemovalOfWhatAContainerLeft has an emptyDir with everything in it that
// could lead elsewhere, a deep tree, and a mount that came out of the container.
func TestRemovalOfWhatAContainerLeft(t *testing.T) {
	t.Parallel()
	for _, medium := range []corev1.StorageMedium{corev1.StorageMediumDefault, corev1.StorageMediumMemory} {
		t.Run("medium "+string(medium), func(t *testing.T) {
			t.Parallel()
			m := manager(t, Config{})
			pod := newPod(corev1.Volume{Name: "v", VolumeSource: corev1.VolumeSource{EmptyDir: &corev1.EmptyDirVolumeSource{Medium: medium}}})
			mounts, _, err := m.Setup(t.Context(), pod, nil)
			require.NoError(t, err)
			outside := t.TempDir()
			require.NoError(t, os.WriteFile(filepath.Join(outside, "secret"), []byte("SECRET"), 0o600))
			for name, plant := range plants {
				require.NoError(t, plant(t, filepath.Join(mounts["v"], name), outside))
			}
			require.NoError(t, os.MkdirAll(filepath.Join(mounts["v"], strings.Repeat("d/", 500)), 0o755))
			_, err = m.SubPath(pod, "c", 0, mounts["v"], "d/d")
			require.NoError(t, err)
			mounts, _, err = m.Setup(t.Context(), pod, nil)
			require.NoError(t, err)
			require.DirExists(t, filepath.Join(mounts["v"], "d"), "it is the containers' and stays")
			within(t, func() { require.NoError(t, m.Teardown(t.Context(), pod.UID)) })
			require.NoDirExists(t, m.PodDir(pod.UID))
			require.FileExists(t, filepath.Join(outside, "secret"))
		})
	}
}

func TestSubPathOpensNothing(t *testing.T) {
	t.Parallel()
	for name, plant := range plants {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			m := manager(t, Config{})
			vol, outside := t.TempDir(), t.TempDir()
			require.NoError(t, unix.Chmod(vol, 0o2751))
			require.NoError(t, os.WriteFile(filepath.Join(outside, "secret"), []byte("SECRET"), 0o600))
			require.NoError(t, os.Mkdir(filepath.Join(vol, "folder"), 0o755))
			for _, path := range []string{"x", "folder/x"} {
				require.NoError(t, plant(t, filepath.Join(vol, path), outside))
			}
			require.NoError(t, os.Symlink("folder/x", filepath.Join(vol, "by")))
			for i, sub := range []string{"x", "x/new", "folder/x", "by", "folder/../x"} {
				within(t, func() {
					path, err := m.SubPath(newPod(), "c", i, vol, sub)
					switch {
					case name == "huge file" && sub != "x/new", strings.HasPrefix(name, "folder"), strings.HasPrefix(name, "mount"):
						require.NoError(t, err, sub)
						require.NotEmpty(t, path)
					default:
						require.Error(t, err, sub)
						require.ErrorContains(t, err, `subPath "`+sub+`"`)
					}
				})
			}
			if !strings.HasPrefix(name, "mount") {
				entries, err := os.ReadDir(outside)
				require.NoError(t, err)
				require.Len(t, entries, 1, "nothing is made outside")
			}
			_, err := m.SubPath(newPod(), "c", 9, vol, "new/er")
			require.NoError(t, err)
			var st unix.Stat_t
			require.NoError(t, unix.Stat(filepath.Join(vol, "new/er"), &st))
			require.EqualValues(t, 0o2751, st.Mode&0o7777, "the volume's own mode")
		})
	}
}

// TestSubPathIsWhatWasLookedAt has a container that swaps a folder of the path
// for a link to a folder of the host, while another one is given a mount of it.
func TestSubPathIsWhatWasLookedAt(t *testing.T) {
	t.Parallel()
	m := manager(t, Config{})
	vol, outside := t.TempDir(), t.TempDir()
	require.NoError(t, os.MkdirAll(filepath.Join(outside, "b"), 0o755))
	require.NoError(t, os.WriteFile(filepath.Join(outside, "b", "secret"), nil, 0o600))
	require.NoError(t, os.MkdirAll(filepath.Join(vol, "a", "b"), 0o755))
	require.NoError(t, os.Symlink(outside, filepath.Join(vol, "trap")))
	var stop atomic.Bool
	var wg sync.WaitGroup
	wg.Go(func() {
		for !stop.Load() {
			_ = unix.Renameat2(unix.AT_FDCWD, filepath.Join(vol, "a"), unix.AT_FDCWD, filepath.Join(vol, "trap"), unix.RENAME_EXCHANGE)
		}
	})
	made := 0
	for i := range 400 {
		sub := "a/b"
		if i%4 == 0 {
			sub = "a/new" + strconv.Itoa(i)
		}
		path, err := m.SubPath(newPod(), "c", i%3, vol, sub)
		if err != nil {
			continue
		}
		made++
		require.NoFileExists(t, filepath.Join(path, "secret"))
	}
	stop.Store(true)
	wg.Wait()
	require.Positive(t, made)
	entries, err := os.ReadDir(outside)
	require.NoError(t, err)
	require.Len(t, entries, 1)
	require.NoError(t, m.Teardown(t.Context(), newPod().UID))
	require.FileExists(t, filepath.Join(outside, "b", "secret"))
	require.DirExists(t, vol)
}
