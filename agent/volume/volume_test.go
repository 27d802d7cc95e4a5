package volume

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	authenticationv1 "k8s.io/api/authentication/v1"
	certificatesv1 "k8s.io/api/certificates/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"timonel/agent/hostile"
	"timonel/test/needs"
)

type fakeObjects struct {
	maps    map[string]*corev1.ConfigMap
	secrets map[string]*corev1.Secret
	claims  map[string]*corev1.PersistentVolumeClaim
	volumes map[string]*corev1.PersistentVolume
	bundles map[string]*certificatesv1.ClusterTrustBundle

	requests map[string]*certificatesv1.PodCertificateRequest
}

func (f *fakeObjects) PodCertificateRequest(_, name string) (*certificatesv1.PodCertificateRequest, bool) {
	o, ok := f.requests[name]
	return o, ok
}

func (f *fakeObjects) ClusterTrustBundle(name string) (*certificatesv1.ClusterTrustBundle, bool) {
	o, ok := f.bundles[name]
	return o, ok
}

func (f *fakeObjects) ClusterTrustBundles(signer string) []*certificatesv1.ClusterTrustBundle {
	var out []*certificatesv1.ClusterTrustBundle
	for _, b := range f.bundles {
		if b.Spec.SignerName == signer {
			out = append(out, b)
		}
	}
	return out
}

func (f *fakeObjects) PersistentVolumeClaim(_, name string) (*corev1.PersistentVolumeClaim, bool) {
	o, ok := f.claims[name]
	return o, ok
}

func (f *fakeObjects) PersistentVolume(name string) (*corev1.PersistentVolume, bool) {
	o, ok := f.volumes[name]
	return o, ok
}

func (f *fakeObjects) ConfigMap(_, name string) (*corev1.ConfigMap, bool) {
	o, ok := f.maps[name]
	return o, ok
}

func (f *fakeObjects) Secret(_, name string) (*corev1.Secret, bool) {
	o, ok := f.secrets[name]
	return o, ok
}

// manager makes volumes in a folder of its own.
func manager(t *testing.T, cfg Config) *Manager {
	t.Helper()
	needs.Root(t, "mounts")
	cfg.Dir = filepath.Join(t.TempDir(), "pods")
	t.Cleanup(func() { require.NoError(t, hostile.Unmount(cfg.Dir)) })
	return New(cfg)
}

func newPod(volumes ...corev1.Volume) *corev1.Pod {
	return &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: "p", UID: "uid-1", Labels: map[string]string{"a": "b"}},
		Spec:       corev1.PodSpec{ServiceAccountName: "sa", Volumes: volumes},
	}
}

func configMapVolume(name string, items ...corev1.KeyToPath) corev1.Volume {
	return corev1.Volume{Name: "v", VolumeSource: corev1.VolumeSource{ConfigMap: &corev1.ConfigMapVolumeSource{
		LocalObjectReference: corev1.LocalObjectReference{Name: name}, Items: items,
	}}}
}

func tree(t *testing.T, dir string) map[string]string {
	t.Helper()
	out := map[string]string{}
	entries, err := os.ReadDir(dir)
	require.NoError(t, err)
	for _, e := range entries {
		if e.Name()[0] == '.' {
			continue
		}
		path := filepath.Join(dir, e.Name())
		info, err := os.Stat(path)
		require.NoError(t, err)
		if info.IsDir() {
			sub, err := os.ReadDir(path)
			require.NoError(t, err)
			for _, s := range sub {
				raw, err := os.ReadFile(filepath.Join(path, s.Name()))
				require.NoError(t, err)
				out[e.Name()+"/"+s.Name()] = string(raw)
			}
			continue
		}
		raw, err := os.ReadFile(path)
		require.NoError(t, err)
		out[e.Name()] = string(raw)
	}
	return out
}

func TestContentFollowsItsObject(t *testing.T) {
	t.Parallel()
	objects := &fakeObjects{maps: map[string]*corev1.ConfigMap{"cm": {Data: map[string]string{"one": "1", "two": "2"}, BinaryData: map[string][]byte{"raw": {0xff}}}}}
	m := manager(t, Config{Objects: objects})
	pod := newPod(configMapVolume("cm"))
	mounts, _, err := m.Setup(t.Context(), pod, nil)
	require.NoError(t, err)
	dir := mounts["v"]
	require.Equal(t, map[string]string{"one": "1", "two": "2", "raw": "\xff"}, tree(t, dir))
	version, err := os.Readlink(filepath.Join(dir, "..data"))
	require.NoError(t, err)

	_, _, err = m.Setup(t.Context(), pod, nil)
	require.NoError(t, err)
	same, err := os.Readlink(filepath.Join(dir, "..data"))
	require.NoError(t, err)
	require.Equal(t, version, same, "what has not changed is not written again")

	objects.maps["cm"] = &corev1.ConfigMap{Data: map[string]string{"one": "uno"}}
	_, _, err = m.Setup(t.Context(), pod, nil)
	require.NoError(t, err)
	require.Equal(t, map[string]string{"one": "uno"}, tree(t, dir))
	require.NoDirExists(t, filepath.Join(dir, version))

	require.NoError(t, m.Teardown(t.Context(), pod.UID))
	require.NoDirExists(t, m.PodDir(pod.UID))
}

func TestItemsAndErrors(t *testing.T) {
	t.Parallel()
	yes, secretMode := true, int32(0o400)
	objects := &fakeObjects{
		maps:    map[string]*corev1.ConfigMap{"cm": {Data: map[string]string{"one": "1"}}},
		secrets: map[string]*corev1.Secret{"s": {Data: map[string][]byte{"k": []byte("v")}}},
	}
	for _, tc := range []struct {
		name   string
		volume corev1.VolumeSource
		want   map[string]string
		err    string
	}{
		{"an item in a folder", configMapVolume("cm", corev1.KeyToPath{Key: "one", Path: "deep/file"}).VolumeSource, map[string]string{"deep/file": "1"}, ""},
		{"no such object", configMapVolume("none").VolumeSource, nil, `volume "v": configmap "none" not found`},
		{"no such key", configMapVolume("cm", corev1.KeyToPath{Key: "none", Path: "x"}).VolumeSource, nil, `has no key "none"`},
		{"a path that leaves", configMapVolume("cm", corev1.KeyToPath{Key: "one", Path: "../x"}).VolumeSource, nil, "must be relative"},
		{"optional", corev1.VolumeSource{Secret: &corev1.SecretVolumeSource{SecretName: "none", Optional: &yes}}, map[string]string{}, ""},
		{"secret", corev1.VolumeSource{Secret: &corev1.SecretVolumeSource{SecretName: "s", DefaultMode: &secretMode}}, map[string]string{"k": "v"}, ""},
		{"downward", corev1.VolumeSource{DownwardAPI: &corev1.DownwardAPIVolumeSource{Items: []corev1.DownwardAPIVolumeFile{{Path: "l", FieldRef: &corev1.ObjectFieldSelector{FieldPath: "metadata.labels"}}}}},
			map[string]string{"l": `a="b"`}, ""},
		{"unsupported", corev1.VolumeSource{NFS: &corev1.NFSVolumeSource{Server: "s", Path: "/p"}}, nil, "type nfs are not supported"},
		{"a host path that is a file", corev1.VolumeSource{HostPath: &corev1.HostPathVolumeSource{Path: "/etc/passwd", Type: new(corev1.HostPathDirectory)}}, nil, "is not a directory"},
		{"a host path that is not", corev1.VolumeSource{HostPath: &corev1.HostPathVolumeSource{Path: "/does/not/exist", Type: new(corev1.HostPathSocket)}}, nil, "does not exist"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			m := manager(t, Config{Objects: objects})
			mounts, _, err := m.Setup(t.Context(), newPod(corev1.Volume{Name: "v", VolumeSource: tc.volume}), nil)
			if tc.err != "" {
				require.ErrorContains(t, err, tc.err)
				return
			}
			require.NoError(t, err)
			require.Equal(t, tc.want, tree(t, mounts["v"]))
			if tc.name == "secret" {
				info, err := os.Stat(filepath.Join(mounts["v"], "k"))
				require.NoError(t, err)
				require.Equal(t, fs.FileMode(0o400), info.Mode().Perm())
			}
		})
	}
	_, _, err := New(Config{Dir: t.TempDir()}).Setup(t.Context(), newPod(corev1.Volume{Name: "v", VolumeSource: corev1.VolumeSource{CSI: &corev1.CSIVolumeSource{}}}), nil)
	require.ErrorIs(t, err, ErrUnsupported)
}

func TestTokensAreRenewedAndOutliveOutages(t *testing.T) {
	t.Parallel()
	now := time.Unix(1_700_000_000, 0)
	var asked int
	var refuse error
	m := manager(t, Config{
		Now: func() time.Time { return now },
		Tokens: func(_ context.Context, ns, sa string, tr *authenticationv1.TokenRequest) (*authenticationv1.TokenRequest, error) {
			if refuse != nil {
				return nil, refuse
			}
			asked++
			require.Equal(t, "ns/sa", ns+"/"+sa)
			require.Equal(t, "uid-1", string(tr.Spec.BoundObjectRef.UID))
			out := tr.DeepCopy()
			out.Status.Token = string(rune('A' + asked - 1))
			out.Status.ExpirationTimestamp = metav1.NewTime(now.Add(time.Duration(*tr.Spec.ExpirationSeconds) * time.Second))
			return out, nil
		},
	})
	seconds := int64(1000)
	pod := newPod(corev1.Volume{Name: "v", VolumeSource: corev1.VolumeSource{Projected: &corev1.ProjectedVolumeSource{Sources: []corev1.VolumeProjection{
		{ServiceAccountToken: &corev1.ServiceAccountTokenProjection{Path: "token", ExpirationSeconds: &seconds}},
	}}}})
	setup := func() (string, time.Time) {
		mounts, refresh, err := m.Setup(t.Context(), pod, nil)
		require.NoError(t, err)
		return tree(t, mounts["v"])["token"], refresh
	}
	token, refresh := setup()
	require.Equal(t, "A", token)
	require.Equal(t, now.Add(800*time.Second), refresh)
	now = now.Add(700 * time.Second)
	token, _ = setup()
	require.Equal(t, "A", token, "kept while it is good, by a new agent too")
	now = now.Add(200 * time.Second)
	refuse = errors.New("no controller is connected")
	token, refresh = setup()
	require.Equal(t, "A", token, "kept while none can be had")
	require.Equal(t, now.Add(10*time.Second), refresh)
	refuse = nil
	token, _ = setup()
	require.Equal(t, "B", token)
	now = now.Add(2000 * time.Second)
	refuse = errors.New("no controller is connected")
	_, _, err := m.Setup(t.Context(), pod, nil)
	require.ErrorContains(t, err, "no controller is connected", "an expired token is not shown")
}

func TestSubPathStaysInTheVolume(t *testing.T) {
	m := manager(t, Config{})
	pod := newPod()
	vol := t.TempDir()
	require.NoError(t, os.Symlink("/etc", filepath.Join(vol, "out")))
	require.NoError(t, os.WriteFile(filepath.Join(vol, "file"), []byte("x"), 0o600))
	for _, bad := range []string{"../x", "/etc", "out/passwd", "out"} {
		_, err := m.SubPath(pod, "c", 0, vol, bad)
		require.Error(t, err, bad)
	}
	for i, good := range []string{"file", "new/folder"} {
		path, err := m.SubPath(pod, "c", i, vol, good)
		require.NoError(t, err)
		_, err = os.Stat(path)
		require.NoError(t, err)
		again, err := m.SubPath(pod, "c", i, vol, good)
		require.NoError(t, err)
		require.Equal(t, path, again)
	}
	require.NoError(t, m.Teardown(t.Context(), pod.UID))
	require.FileExists(t, filepath.Join(vol, "file"), "only the bind is removed")
}
