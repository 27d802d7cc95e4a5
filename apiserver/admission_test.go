package apiserver

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"timonel/state"
	"timonel/state/storage/storagetest"
)

// Plugins of admission can be turned on and off, and configured by a file.
func TestAdmissionPluginsAreChosen(t *testing.T) {
	file := filepath.Join(t.TempDir(), "admission.yaml")
	err := os.WriteFile(file, []byte(`apiVersion: apiserver.config.k8s.io/v1
kind: AdmissionConfiguration
plugins:
- name: PodSecurity
  configuration:
    apiVersion: pod-security.admission.config.k8s.io/v1
    kind: PodSecurityConfiguration
    defaults: {enforce: baseline, enforce-version: latest}
`), 0o600)
	if err != nil {
		t.Fatal(err)
	}
	f, err := startFixture(storagetest.NewLocalBackend(state.Options{}), nil, func(c *Config) {
		c.EnableAdmission, c.DisableAdmission, c.AdmissionConfig = []string{"AlwaysPullImages"}, []string{"ServiceAccount"}, file
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := f.stop(); err != nil {
			t.Error(err)
		}
	})
	pods := client(t, f.admin()).CoreV1().Pods(metav1.NamespaceDefault)
	ctx := within(t, 30*time.Second)
	pod := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: "a"},
		Spec:       corev1.PodSpec{Containers: []corev1.Container{{Name: "c", Image: "example.com/x:1", ImagePullPolicy: corev1.PullNever}}},
	}
	made, err := pods.Create(ctx, pod, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if policy := made.Spec.Containers[0].ImagePullPolicy; policy != corev1.PullAlways {
		t.Errorf("pull policy %s: AlwaysPullImages is not on", policy)
	}
	if made.Spec.ServiceAccountName != "" {
		t.Errorf("service account %q: ServiceAccount is not off", made.Spec.ServiceAccountName)
	}
	pod.Name, pod.Spec.HostNetwork = "b", true
	if _, err := pods.Create(ctx, pod, metav1.CreateOptions{}); err == nil || !strings.Contains(err.Error(), `violates PodSecurity "baseline:latest"`) {
		t.Errorf("%v, want that PodSecurity refuses it", err)
	}
}

func TestAnUnknownAdmissionPluginIsRefused(t *testing.T) {
	_, err := startFixture(storagetest.NewLocalBackend(state.Options{}), nil, func(c *Config) { c.EnableAdmission = []string{"AlwaysPullImage"} })
	if err == nil || !strings.Contains(err.Error(), `enable-admission-plugins plugin "AlwaysPullImage" is unknown`) {
		t.Errorf("%v, want that it is unknown", err)
	}
}
