package volume

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
)

// TestAPIVolumesHaveABound: a few bytes of a pod ask for the same content again and
// again, which would be in the node's memory.
func TestAPIVolumesHaveABound(t *testing.T) {
	t.Parallel()
	big := strings.Repeat("x", 1<<20)
	objects := &fakeObjects{
		maps:    map[string]*corev1.ConfigMap{"big": {Data: map[string]string{"k": big}}, "small": {Data: map[string]string{"k": "v"}}},
		secrets: map[string]*corev1.Secret{"big": {Data: map[string][]byte{"k": []byte(big)}}},
	}
	m := manager(t, Config{Objects: objects, Allocatable: func() corev1.ResourceList {
		return corev1.ResourceList{corev1.ResourceMemory: resource.MustParse("3Gi")} // of which 96 MiB are a 32nd
	}})
	var keys []corev1.KeyToPath
	var fields []corev1.DownwardAPIVolumeFile
	for i := range 200 {
		keys = append(keys, corev1.KeyToPath{Key: "k", Path: fmt.Sprintf("f%d", i)})
		fields = append(fields, corev1.DownwardAPIVolumeFile{Path: fmt.Sprintf("f%d", i), FieldRef: &corev1.ObjectFieldSelector{FieldPath: "metadata.annotations['a']"}})
	}
	source := func(name string, s corev1.VolumeSource) corev1.Volume {
		return corev1.Volume{Name: name, VolumeSource: s}
	}
	var many []corev1.Volume
	for i := range 120 {
		many = append(many, source(fmt.Sprintf("v%d", i), corev1.VolumeSource{Secret: &corev1.SecretVolumeSource{SecretName: "big"}}))
	}
	for _, tc := range []struct {
		name    string
		volumes []corev1.Volume
	}{
		{"a key as many files", []corev1.Volume{configMapVolume("big", keys...)}},
		{"an annotation as many files", []corev1.Volume{source("v", corev1.VolumeSource{DownwardAPI: &corev1.DownwardAPIVolumeSource{Items: fields}})}},
		{"many volumes", many},
		{"projected", []corev1.Volume{source("v", corev1.VolumeSource{Projected: &corev1.ProjectedVolumeSource{Sources: []corev1.VolumeProjection{
			{Secret: &corev1.SecretProjection{LocalObjectReference: corev1.LocalObjectReference{Name: "big"}, Items: keys[:60]}},
			{ConfigMap: &corev1.ConfigMapProjection{LocalObjectReference: corev1.LocalObjectReference{Name: "big"}, Items: keys[100:160]}},
		}}})}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			pod := newPod(tc.volumes...)
			pod.Annotations = map[string]string{"a": big}
			_, _, err := m.Setup(t.Context(), pod, nil)
			require.ErrorContains(t, err, "more than the 96 MiB of this node's memory")
			require.NoError(t, m.Teardown(t.Context(), pod.UID))
		})
	}
	pod := newPod(configMapVolume("big", keys[:80]...), source("s", corev1.VolumeSource{Secret: &corev1.SecretVolumeSource{SecretName: "big"}}))
	require.Zero(t, m.Memory(pod))
	_, _, err := m.Setup(t.Context(), pod, nil)
	require.NoError(t, err)
	require.InDelta(t, 81<<20, m.Memory(pod), 1<<20, "counts as the pod's")
	require.NoError(t, m.Teardown(t.Context(), pod.UID))
	require.Zero(t, m.Memory(pod))
	_, _, err = m.Setup(t.Context(), newPod(configMapVolume("small", corev1.KeyToPath{Key: "k", Path: strings.Repeat("a/", 400000) + "b"})), nil)
	require.ErrorContains(t, err, "800001 bytes, 4096 are possible")
}

// A file that many items name is read from the pod once.
func TestAFieldIsReadOnce(t *testing.T) {
	t.Parallel()
	pod := newPod()
	pod.Annotations = map[string]string{"a": strings.Repeat("x", 200<<10)}
	m, left := New(Config{Dir: filepath.Join(os.TempDir(), "none")}), int64(1<<40)
	p := payload{manager: m, pod: pod, left: &left}
	var items []corev1.DownwardAPIVolumeFile
	for i := range 1000 {
		items = append(items, corev1.DownwardAPIVolumeFile{Path: fmt.Sprintf("f%d", i), FieldRef: &corev1.ObjectFieldSelector{FieldPath: "metadata.annotations['a']"}})
	}
	require.NoError(t, p.downward(items, 0o644))
	require.Len(t, p.files, 1000)
	for _, e := range p.files {
		require.Same(t, &p.files["f0"].data[0], &e.data[0])
	}
}
