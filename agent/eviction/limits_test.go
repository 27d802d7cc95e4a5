package eviction

import (
	"testing"

	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
)

const mib = 1 << 20

func emptyDir(name, limit string, medium corev1.StorageMedium) corev1.Volume {
	e := &corev1.EmptyDirVolumeSource{Medium: medium}
	if limit != "" {
		q := resource.MustParse(limit)
		e.SizeLimit = &q
	}
	return corev1.Volume{Name: name, VolumeSource: corev1.VolumeSource{EmptyDir: e}}
}

func limited(name, limit string) corev1.Container {
	c := corev1.Container{Name: name}
	if limit != "" {
		c.Resources.Limits = corev1.ResourceList{corev1.ResourceEphemeralStorage: resource.MustParse(limit)}
	}
	return c
}

func TestOverLimit(t *testing.T) {
	t.Parallel()
	always := corev1.ContainerRestartPolicyAlways
	sidecar := limited("side", "10Mi")
	sidecar.RestartPolicy = &always
	for _, tc := range []struct {
		name      string
		volumes   []corev1.Volume
		init      []corev1.Container
		main      []corev1.Container
		usage     Usage
		ownImages bool
		want      string
	}{
		{name: "no limits", volumes: []corev1.Volume{emptyDir("x", "", "")}, main: []corev1.Container{limited("c", "")},
			usage: Usage{Volumes: map[string]Disk{"x": {Bytes: 1 << 50}}}},
		{name: "as much as the limit", volumes: []corev1.Volume{emptyDir("x", "10Mi", "")},
			usage: Usage{Volumes: map[string]Disk{"x": {Bytes: 10 * mib}}}},
		{name: "an emptyDir", volumes: []corev1.Volume{emptyDir("y", "10Mi", ""), emptyDir("x", "10Mi", "")},
			usage: Usage{Volumes: map[string]Disk{"x": {Bytes: 10*mib + 1}, "y": {Bytes: mib}}},
			want:  `Usage of EmptyDir volume "x" exceeds the limit "10Mi". `},
		{name: "a limit of zero is none", volumes: []corev1.Volume{emptyDir("x", "0", "")},
			usage: Usage{Volumes: map[string]Disk{"x": {Bytes: 1}}}},
		{name: "on memory it is the kernel's", volumes: []corev1.Volume{emptyDir("x", "10Mi", corev1.StorageMediumMemory)},
			usage: Usage{Volumes: map[string]Disk{"x": {Bytes: 20 * mib}}}},
		{name: "a container", main: []corev1.Container{limited("a", "10Mi"), limited("b", "50Mi")},
			usage: Usage{Containers: []ContainerUsage{{Name: "a", Rootfs: Disk{Bytes: 6 * mib}, Logs: Disk{Bytes: 5 * mib}}}},
			want:  `Container a exceeded its local ephemeral storage limit "10Mi". `},
		{name: "its layer is elsewhere", main: []corev1.Container{limited("a", "10Mi"), limited("b", "50Mi")}, ownImages: true,
			usage: Usage{Containers: []ContainerUsage{{Name: "a", Rootfs: Disk{Bytes: 6 * mib}, Logs: Disk{Bytes: 5 * mib}}}}},
		{name: "its log alone", main: []corev1.Container{limited("a", "10Mi"), limited("b", "50Mi")}, ownImages: true,
			usage: Usage{Containers: []ContainerUsage{{Name: "a", Logs: Disk{Bytes: 11 * mib}}}},
			want:  `Container a exceeded its local ephemeral storage limit "10Mi". `},
		{name: "a sidecar", init: []corev1.Container{sidecar}, main: []corev1.Container{limited("b", "50Mi")},
			usage: Usage{Containers: []ContainerUsage{{Name: "side", Rootfs: Disk{Bytes: 11 * mib}}}},
			want:  `Container side exceeded its local ephemeral storage limit "10Mi". `},
		{name: "an init container", init: []corev1.Container{limited("i", "10Mi")}, main: []corev1.Container{limited("b", "50Mi")},
			usage: Usage{Containers: []ContainerUsage{{Name: "i", Rootfs: Disk{Bytes: 11 * mib}}}}},
		{name: "the pod", main: []corev1.Container{limited("a", "10Mi"), limited("b", "10Mi")}, volumes: []corev1.Volume{emptyDir("x", "", "")},
			usage: Usage{Volumes: map[string]Disk{"x": {Bytes: 12 * mib}}, Other: Disk{Bytes: 2 * mib},
				Containers: []ContainerUsage{{Name: "a", Rootfs: Disk{Bytes: 4 * mib}, Logs: Disk{Bytes: 2*mib + 1}}}},
			want: `Pod ephemeral local storage usage exceeds the total limit of containers 20Mi. `},
		{name: "the pod, just not", main: []corev1.Container{limited("a", "10Mi"), limited("b", "10Mi")}, volumes: []corev1.Volume{emptyDir("x", "", "")},
			usage: Usage{Volumes: map[string]Disk{"x": {Bytes: 12 * mib}}, Other: Disk{Bytes: 2 * mib},
				Containers: []ContainerUsage{{Name: "a", Rootfs: Disk{Bytes: 4 * mib}, Logs: Disk{Bytes: 2 * mib}}}}},
		{name: "a container without a limit takes the others'", main: []corev1.Container{limited("a", "10Mi"), limited("b", "")},
			usage: Usage{Containers: []ContainerUsage{{Name: "b", Rootfs: Disk{Bytes: 11 * mib}}}},
			want:  `Pod ephemeral local storage usage exceeds the total limit of containers 10Mi. `},
		{name: "the emptyDir is named first", volumes: []corev1.Volume{emptyDir("x", "1Gi", "")}, main: []corev1.Container{limited("a", "10Mi")},
			usage: Usage{Volumes: map[string]Disk{"x": {Bytes: 2 << 30}}},
			want:  `Usage of EmptyDir volume "x" exceeds the limit "1Gi". `},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			pod := &corev1.Pod{Spec: corev1.PodSpec{Volumes: tc.volumes, InitContainers: tc.init, Containers: tc.main}}
			message, over := OverLimit(pod, &tc.usage, tc.ownImages)
			require.Equal(t, tc.want, message)
			require.Equal(t, tc.want != "", over)
		})
	}
}
