package pod

import (
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	certificatesv1 "k8s.io/api/certificates/v1"
	corev1 "k8s.io/api/core/v1"
	nodev1 "k8s.io/api/node/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// objects are ConfigMaps and Secrets by name.
type objects struct {
	maps    map[string]map[string]string
	secrets map[string]map[string][]byte
}

func (o objects) ConfigMap(_, name string) (*corev1.ConfigMap, bool) {
	d, ok := o.maps[name]
	return &corev1.ConfigMap{Data: d}, ok
}

func (o objects) Secret(_, name string) (*corev1.Secret, bool) {
	d, ok := o.secrets[name]
	return &corev1.Secret{Data: d}, ok
}

func (objects) PersistentVolumeClaim(_, _ string) (*corev1.PersistentVolumeClaim, bool) {
	return nil, false
}

func (objects) PersistentVolume(string) (*corev1.PersistentVolume, bool) { return nil, false }

func (objects) ClusterTrustBundle(string) (*certificatesv1.ClusterTrustBundle, bool) {
	return nil, false
}

func (objects) RuntimeClass(name string) (*nodev1.RuntimeClass, bool) {
	return &nodev1.RuntimeClass{Handler: "of-" + name}, name != "unknown"
}

func (objects) PodCertificateRequest(_, _ string) (*certificatesv1.PodCertificateRequest, bool) {
	return nil, false
}

func (objects) ClusterTrustBundles(string) []*certificatesv1.ClusterTrustBundle { return nil }

func TestEnvironment(t *testing.T) {
	t.Parallel()
	m := &Manager{cfg: Config{
		Objects: objects{maps: map[string]map[string]string{"cm": {"a": "1", "b": "2"}}, secrets: map[string]map[string][]byte{"s": {"k": []byte("v")}}},
		HostIPs: func() []string { return []string{"192.168.0.1", "fd00::1"} },
		Capacity: func() corev1.ResourceList {
			return corev1.ResourceList{corev1.ResourceCPU: resource.MustParse("4"), corev1.ResourceMemory: resource.MustParse("8Gi")}
		},
		KubernetesServiceIP: "10.96.0.1",
	}}
	pod := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: "p", Namespace: "ns", Labels: map[string]string{"l": "x"}}, Spec: corev1.PodSpec{NodeName: "n1"}}
	yes := true
	fromMap := func(name, key string, optional *bool) *corev1.EnvVarSource {
		return &corev1.EnvVarSource{ConfigMapKeyRef: &corev1.ConfigMapKeySelector{LocalObjectReference: corev1.LocalObjectReference{Name: name}, Key: key, Optional: optional}}
	}
	field := func(path string) *corev1.EnvVarSource {
		return &corev1.EnvVarSource{FieldRef: &corev1.ObjectFieldSelector{FieldPath: path}}
	}
	for _, tc := range []struct {
		name      string
		container corev1.Container
		want      map[string]string
		err       string
	}{
		{"the API's address", corev1.Container{}, map[string]string{"KUBERNETES_SERVICE_HOST": "10.96.0.1", "KUBERNETES_PORT": "tcp://10.96.0.1:443"}, ""},
		{"expansion in order", corev1.Container{Env: []corev1.EnvVar{{Name: "A", Value: "x"}, {Name: "B", Value: "$(A)y$(LATER)$$(A)"}, {Name: "LATER", Value: "z"}}},
			map[string]string{"B": "xy$(LATER)$(A)"}, ""},
		{"services can be expanded", corev1.Container{Env: []corev1.EnvVar{{Name: "URL", Value: "https://$(KUBERNETES_SERVICE_HOST)"}}}, map[string]string{"URL": "https://10.96.0.1"}, ""},
		{"env wins over envFrom", corev1.Container{
			EnvFrom: []corev1.EnvFromSource{{ConfigMapRef: &corev1.ConfigMapEnvSource{LocalObjectReference: corev1.LocalObjectReference{Name: "cm"}}}},
			Env:     []corev1.EnvVar{{Name: "a", Value: "mine-$(b)"}},
		}, map[string]string{"a": "mine-2", "b": "2"}, ""},
		{"a prefix", corev1.Container{EnvFrom: []corev1.EnvFromSource{{Prefix: "P_", SecretRef: &corev1.SecretEnvSource{LocalObjectReference: corev1.LocalObjectReference{Name: "s"}}}}},
			map[string]string{"P_k": "v"}, ""},
		{"fields", corev1.Container{Env: []corev1.EnvVar{
			{Name: "NODE", ValueFrom: field("spec.nodeName")}, {Name: "IP", ValueFrom: field("status.podIP")}, {Name: "HOSTS", ValueFrom: field("status.hostIPs")}, {Name: "L", ValueFrom: field("metadata.labels['l']")},
		}}, map[string]string{"NODE": "n1", "IP": "10.0.0.9", "HOSTS": "192.168.0.1,fd00::1", "L": "x"}, ""},
		{"an absent limit is the node's size", corev1.Container{Name: "c", Env: []corev1.EnvVar{{Name: "M", ValueFrom: &corev1.EnvVarSource{ResourceFieldRef: &corev1.ResourceFieldSelector{Resource: "limits.memory", Divisor: resource.MustParse("1Gi")}}}}},
			map[string]string{"M": "8"}, ""},
		{"optional and absent", corev1.Container{Env: []corev1.EnvVar{{Name: "X", ValueFrom: fromMap("none", "k", &yes)}, {Name: "Y", ValueFrom: fromMap("cm", "none", &yes)}}}, nil, ""},
		{"no such map", corev1.Container{Env: []corev1.EnvVar{{Name: "X", ValueFrom: fromMap("none", "k", nil)}}}, nil, `configmap "none" not found`},
		{"no such key", corev1.Container{Env: []corev1.EnvVar{{Name: "X", ValueFrom: fromMap("cm", "none", nil)}}}, nil, "couldn't find key none in ConfigMap ns/cm"},
		{"envFrom of nothing", corev1.Container{EnvFrom: []corev1.EnvFromSource{{SecretRef: &corev1.SecretEnvSource{LocalObjectReference: corev1.LocalObjectReference{Name: "none"}}}}}, nil, `secret "none" not found`},
		{"no such field", corev1.Container{Env: []corev1.EnvVar{{Name: "X", ValueFrom: field("spec.nothing")}}}, nil, "environment variable X"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			p := pod.DeepCopy()
			p.Spec.Containers = []corev1.Container{tc.container}
			env, err := m.environment(p, &p.Spec.Containers[0], []string{"10.0.0.9"})
			if tc.err != "" {
				require.ErrorContains(t, err, tc.err)
				return
			}
			require.NoError(t, err)
			values := env.values()
			for k, v := range tc.want {
				require.Equal(t, v, values[k], k)
			}
			for _, k := range []string{"X", "Y"} {
				require.NotContains(t, values, k)
			}
		})
	}
}

// TestServiceLinks: containers have the variables of the Services of their namespace,
// unless the pod does not want them, and always those of the API.
func TestServiceLinks(t *testing.T) {
	t.Parallel()
	port := func(name string, n int32, p corev1.Protocol) corev1.ServicePort {
		return corev1.ServicePort{Name: name, Port: n, Protocol: p}
	}
	service := func(name, ip string, ports ...corev1.ServicePort) *corev1.Service {
		return &corev1.Service{ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: name}, Spec: corev1.ServiceSpec{ClusterIP: ip, Ports: ports}}
	}
	var unknown error
	m := &Manager{cfg: Config{
		Objects: objects{}, KubernetesServiceIP: "10.96.0.1", HostIPs: func() []string { return nil },
		Services: func(namespace string) ([]*corev1.Service, error) {
			require.Equal(t, "ns", namespace)
			return []*corev1.Service{
				service("my-web", "10.96.0.7", port("http", 80, corev1.ProtocolTCP), port("dns-udp", 53, corev1.ProtocolUDP)),
				service("headless", "None", port("", 80, corev1.ProtocolTCP)),
				service("elsewhere", "", port("", 80, corev1.ProtocolTCP)),
				service("odd", "10.96.0.8"),
				service("kubernetes", "10.96.0.9", port("", 80, corev1.ProtocolTCP)),
			}, unknown
		},
	}}
	pod := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: "p", Namespace: "ns"}, Spec: corev1.PodSpec{Containers: []corev1.Container{{
		Name: "c", Env: []corev1.EnvVar{{Name: "MY_WEB_PORT", Value: "mine"}, {Name: "URL", Value: "http://$(MY_WEB_SERVICE_HOST):$(MY_WEB_SERVICE_PORT_HTTP)"}},
	}}}}
	environment := func() map[string]string {
		env, err := m.environment(pod, &pod.Spec.Containers[0], nil)
		require.NoError(t, err)
		require.Len(t, env, len(env.values()), "no name comes twice")
		return env.values()
	}
	api := map[string]string{
		"KUBERNETES_SERVICE_HOST": "10.96.0.1", "KUBERNETES_SERVICE_PORT": "443", "KUBERNETES_SERVICE_PORT_HTTPS": "443",
		"KUBERNETES_PORT": "tcp://10.96.0.1:443", "KUBERNETES_PORT_443_TCP": "tcp://10.96.0.1:443", "KUBERNETES_PORT_443_TCP_PROTO": "tcp",
		"KUBERNETES_PORT_443_TCP_PORT": "443", "KUBERNETES_PORT_443_TCP_ADDR": "10.96.0.1",
	}
	want := map[string]string{
		"MY_WEB_PORT": "mine", "URL": "http://10.96.0.7:80",
		"MY_WEB_SERVICE_HOST": "10.96.0.7", "MY_WEB_SERVICE_PORT": "80", "MY_WEB_SERVICE_PORT_HTTP": "80", "MY_WEB_SERVICE_PORT_DNS_UDP": "53",
		"MY_WEB_PORT_80_TCP": "tcp://10.96.0.7:80", "MY_WEB_PORT_80_TCP_PROTO": "tcp", "MY_WEB_PORT_80_TCP_PORT": "80", "MY_WEB_PORT_80_TCP_ADDR": "10.96.0.7",
		"MY_WEB_PORT_53_UDP": "udp://10.96.0.7:53", "MY_WEB_PORT_53_UDP_PROTO": "udp", "MY_WEB_PORT_53_UDP_PORT": "53", "MY_WEB_PORT_53_UDP_ADDR": "10.96.0.7",
		// What a Service of the pod's own namespace that is called kubernetes has beside.
		"KUBERNETES_PORT_80_TCP": "tcp://10.96.0.9:80", "KUBERNETES_PORT_80_TCP_PROTO": "tcp", "KUBERNETES_PORT_80_TCP_PORT": "80", "KUBERNETES_PORT_80_TCP_ADDR": "10.96.0.9",
	}
	maps.Copy(want, api)
	require.Equal(t, want, environment())

	unknown = errors.New("not read yet")
	_, err := m.environment(pod, &pod.Spec.Containers[0], nil)
	require.ErrorIs(t, err, unknown)

	pod.Spec.EnableServiceLinks = new(bool)
	want = maps.Clone(api)
	want["MY_WEB_PORT"], want["URL"] = "mine", "http://$(MY_WEB_SERVICE_HOST):$(MY_WEB_SERVICE_PORT_HTTP)"
	require.Equal(t, want, environment(), "what it does not ask for it does not wait for")

	// More than a process can be started with is said, and what helps.
	pod.Spec.EnableServiceLinks, unknown = nil, nil
	m.cfg.Services = func(string) (out []*corev1.Service, err error) {
		for i := range 30000 {
			out = append(out, service(fmt.Sprintf("service-%d", i), "10.96.0.7", port("", 80, corev1.ProtocolTCP)))
		}
		return out, nil
	}
	_, err = m.environment(pod, &pod.Spec.Containers[0], nil)
	require.ErrorContains(t, err, "spec.enableServiceLinks: false")
}

// TestTextHasABound: a few bytes of a pod ask for any number of bytes in its
// variables, arguments and paths.
func TestTextHasABound(t *testing.T) {
	t.Parallel()
	m := NewManager(Config{
		Objects: objects{maps: map[string]map[string]string{"big": {"k": strings.Repeat("x", 1<<20)}, "many": manyKeys(100000)}},
		HostIPs: func() []string { return nil }, Capacity: func() corev1.ResourceList { return nil }, Logger: slog.New(slog.DiscardHandler),
	})
	from := func(name string, times int) (out []corev1.EnvFromSource) {
		for i := range times {
			out = append(out, corev1.EnvFromSource{Prefix: fmt.Sprintf("P%d_", i), ConfigMapRef: &corev1.ConfigMapEnvSource{LocalObjectReference: corev1.LocalObjectReference{Name: name}}})
		}
		return out
	}
	grown := []corev1.EnvVar{{Name: "A0", Value: strings.Repeat("x", 1000)}}
	for i := range 5 {
		grown = append(grown, corev1.EnvVar{Name: fmt.Sprintf("A%d", i+1), Value: strings.Repeat(fmt.Sprintf("$(A%d)", i), 10)})
	}
	big := []corev1.EnvVar{{Name: "A", Value: strings.Repeat("x", 1<<20)}}
	for _, tc := range []struct {
		name      string
		container corev1.Container
		err       string
	}{
		{"a ConfigMap under many prefixes", corev1.Container{EnvFrom: from("big", 50)}, "environment variables: they are longer than 6 MiB"},
		{"many small variables", corev1.Container{EnvFrom: from("many", 50)}, "environment variables: they are longer than 6 MiB"},
		{"variables of variables", corev1.Container{Env: grown}, "environment variables: they are longer than 6 MiB"},
		{"commands", corev1.Container{Env: big, Command: []string{strings.Repeat("$(A)", 7)}}, "command and arguments: they are longer than 6 MiB"},
		{"arguments", corev1.Container{Env: big, Args: []string{"$(A)", "$(A)", "$(A)", "$(A)", "$(A)", "$(A)"}}, "command and arguments: they are longer than 6 MiB"},
		{"a sub path", corev1.Container{Env: big, VolumeMounts: []corev1.VolumeMount{{Name: "v", MountPath: "/v", SubPathExpr: "$(A)"}}}, "longer than a path can be"},
		{"what fits", corev1.Container{Env: big, EnvFrom: from("big", 4)}, ""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			pod := &corev1.Pod{Spec: corev1.PodSpec{Containers: []corev1.Container{tc.container}}}
			w := &worker{m: m, known: known{volumes: map[string]string{"v": t.TempDir()}}}
			c := &pod.Spec.Containers[0]
			env, err := m.environment(pod, c, nil)
			if err == nil {
				_, _, err = commandLine(c, env)
			}
			if err == nil {
				_, err = w.mounts(pod, c, env, nil)
			}
			if tc.err == "" {
				require.NoError(t, err)
				return
			}
			require.ErrorContains(t, err, tc.err)
		})
	}
}

func manyKeys(n int) map[string]string {
	out := map[string]string{}
	for i := range n {
		out[strconv.Itoa(i)] = ""
	}
	return out
}

func TestResources(t *testing.T) {
	t.Parallel()
	list := func(cpu, memory string) corev1.ResourceList {
		out := corev1.ResourceList{}
		if cpu != "" {
			out[corev1.ResourceCPU] = resource.MustParse(cpu)
		}
		if memory != "" {
			out[corev1.ResourceMemory] = resource.MustParse(memory)
		}
		return out
	}
	capacity := list("4", "10Gi")
	for _, tc := range []struct {
		name                       string
		requests, limits           corev1.ResourceList
		shares, quota, memory, oom int64
		parent                     string
	}{
		{"best effort", nil, nil, 2, 0, 0, 1000, "/root/besteffort/podu"},
		{"guaranteed", list("500m", "1Gi"), list("500m", "1Gi"), 512, 50000, 1 << 30, -997, "/root/podu"},
		{"burstable", list("100m", "1Gi"), list("1", ""), 102, 100000, 0, 900, "/root/burstable/podu"},
		{"a limit is a request", nil, list("2", ""), 2048, 200000, 0, 999, "/root/burstable/podu"},
		{"least", list("1m", ""), list("1m", ""), 2, 1000, 0, 999, "/root/burstable/podu"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			pod := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{UID: "u"}, Spec: corev1.PodSpec{Containers: []corev1.Container{{Name: "c", Resources: corev1.ResourceRequirements{Requests: tc.requests, Limits: tc.limits}}}}}
			r := containerResources(pod, &pod.Spec.Containers[0], capacity)
			require.Equal(t, []int64{tc.shares, tc.quota, tc.memory, tc.oom}, []int64{r.CpuShares, r.CpuQuota, r.MemoryLimitInBytes, r.OomScoreAdj})
			require.Equal(t, tc.parent, cgroupParent("/root", pod))
		})
	}
}

func TestTerminationMessage(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	said, empty, logs := filepath.Join(dir, "said"), filepath.Join(dir, "empty"), filepath.Join(dir, "log")
	require.NoError(t, os.WriteFile(said, []byte("my last words"), 0o600))
	require.NoError(t, os.WriteFile(empty, nil, 0o600))
	require.NoError(t, os.WriteFile(logs, []byte("2026-01-01T00:00:00Z stdout F one\n2026-01-01T00:00:00Z stderr P tw\n2026-01-01T00:00:00Z stderr F o\n"), 0o600))
	fallback := string(corev1.TerminationMessageFallbackToLogsOnError)
	for _, tc := range []struct {
		name string
		c    container
		want string
	}{
		{"the file", container{messageFile: said, messagePolicy: fallback, logPath: logs, exitCode: 1}, "my last words"},
		{"the log when it failed", container{messageFile: empty, messagePolicy: fallback, logPath: logs, exitCode: 1}, "one\ntwo\n"},
		{"not the log when it succeeded", container{messageFile: empty, messagePolicy: fallback, logPath: logs, message: "cri"}, "cri"},
		{"not the log unless asked", container{messageFile: empty, logPath: logs, exitCode: 1}, ""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			require.Equal(t, tc.want, terminationMessage(&tc.c))
		})
	}
}
