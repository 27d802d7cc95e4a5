package pod

import (
	"testing"

	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"
)

// A status says of each mount that is read-only whether what is mounted below is so too.
func TestMountsInStatus(t *testing.T) {
	t.Parallel()
	mount := func(path string, readOnly bool, mode corev1.RecursiveReadOnlyMode) corev1.VolumeMount {
		m := corev1.VolumeMount{Name: "v", MountPath: path, ReadOnly: readOnly}
		if mode != "" {
			m.RecursiveReadOnly = &mode
		}
		return m
	}
	pod := fieldPod()
	pod.Spec.InitContainers = nil
	pod.Spec.Containers[0].VolumeMounts = []corev1.VolumeMount{
		mount("/rw", false, ""), mount("/ro", true, ""), mount("/no", true, corev1.RecursiveReadOnlyDisabled),
		mount("/if", true, corev1.RecursiveReadOnlyIfPossible), mount("/yes", true, corev1.RecursiveReadOnlyEnabled),
	}
	for _, possible := range []bool{true, false} {
		sealed := corev1.RecursiveReadOnlyDisabled
		if possible {
			sealed = corev1.RecursiveReadOnlyEnabled
		}
		st := makeStatus(statusInput{want: want{pod: pod}, seen: &seen{known: &known{}, old: &corev1.PodStatus{}, sealing: possible}, now: epoch})
		var got []string
		for _, m := range st.ContainerStatuses[0].VolumeMounts {
			mode := corev1.RecursiveReadOnlyMode("none")
			if m.RecursiveReadOnly != nil {
				mode = *m.RecursiveReadOnly
			}
			require.Equal(t, []any{"v", m.MountPath != "/rw"}, []any{m.Name, m.ReadOnly})
			got = append(got, m.MountPath+" "+string(mode))
		}
		require.Equal(t, []string{"/rw none", "/ro Disabled", "/no Disabled", "/if " + string(sealed), "/yes " + string(sealed)}, got)
	}
}
