package pod

import (
	"context"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"google.golang.org/grpc"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	runtimev1 "k8s.io/cri-api/pkg/apis/runtime/v1"
	"k8s.io/utils/ptr"

	"timonel/agent/volume"
)

// oneImage is CRI's image service with one image that says nothing of a user.
type oneImage struct{ runtimev1.ImageServiceClient }

func (oneImage) ImageStatus(context.Context, *runtimev1.ImageStatusRequest, ...grpc.CallOption) (*runtimev1.ImageStatusResponse, error) {
	return &runtimev1.ImageStatusResponse{Image: &runtimev1.Image{Id: "sha256:1"}}, nil
}

// noStatuses keeps nothing.
type noStatuses struct {
	statuses map[types.UID]*corev1.PodStatus
}

func (s noStatuses) Status(uid types.UID) (*corev1.PodStatus, bool) {
	st, ok := s.statuses[uid]
	return st, ok
}
func (noStatuses) SetStatus(types.UID, *corev1.PodStatus) {}
func (noStatuses) ForgetStatus(types.UID)                 {}

// cri is all that CRI is told of a pod with one sidecar and one container, as
// text, without what the node chose.
func cri(t *testing.T, pod *corev1.Pod) string {
	t.Helper()
	dir := t.TempDir()
	resolv := filepath.Join(dir, "resolv.conf")
	require.NoError(t, os.WriteFile(resolv, []byte("nameserver 9.9.9.9\n"), 0o600))
	objects := objects{maps: map[string]map[string]string{"cm": {"k": "v"}}, secrets: map[string]map[string][]byte{"s": {"k": []byte("w")}}}
	m := &Manager{
		cfg: Config{
			Dir: dir, CgroupRoot: "/root", SeccompDir: "/seccomp", Images: oneImage{}, Objects: objects, Statuses: noStatuses{},
			HostIPs: func() []string { return []string{"192.168.0.1"} },
			Capacity: func() corev1.ResourceList {
				return corev1.ResourceList{corev1.ResourceCPU: resource.MustParse("4"), corev1.ResourceMemory: resource.MustParse("8Gi")}
			},
			DNS: func() DNS { return DNS{Servers: []string{"10.96.0.10"}, Domain: "cluster.local"} }, ResolvConf: resolv,
		},
		log:     slog.New(slog.DiscardHandler),
		volumes: volume.New(volume.Config{Dir: filepath.Join(dir, "pods"), Logger: slog.New(slog.DiscardHandler)}),
	}
	w := newWorker(m, pod)
	w.ctx = t.Context()
	data := filepath.Join(dir, "data")
	require.NoError(t, os.MkdirAll(filepath.Join(data, "sub"), 0o750))
	w.known.volumes = volume.Mounts{"data": data}
	box, err := w.sandboxConfig(pod, 0)
	require.NoError(t, err)
	var b strings.Builder
	handler, err := m.runtimeHandler(pod)
	require.NoError(t, err)
	b.WriteString(handler + box.String() + podResources(pod).String())
	for _, list := range [][]corev1.Container{pod.Spec.InitContainers, pod.Spec.Containers} {
		for i := range list {
			cfg, err := w.containerConfig(pod, start{spec: &list[i]}, "sha256:1", []string{"10.1.0.2"})
			require.NoError(t, err)
			b.WriteString(cfg.String())
		}
	}
	if raw, err := os.ReadFile(filepath.Join(m.volumes.PodDir(pod.UID), "etc-hosts")); err == nil {
		b.Write(raw)
	}
	return strings.ReplaceAll(b.String(), dir, "DIR")
}

func fieldPod() *corev1.Pod {
	return &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: "p", UID: "u"},
		Spec: corev1.PodSpec{
			DNSPolicy: corev1.DNSClusterFirst, SecurityContext: &corev1.PodSecurityContext{},
			InitContainers: []corev1.Container{{Name: "side", RestartPolicy: ptr.To(corev1.ContainerRestartPolicyAlways)}},
			Containers:     []corev1.Container{{Name: "c", SecurityContext: &corev1.SecurityContext{}}},
		},
	}
}

// Each of these fields changes what CRI is told, and only a change of it does.
func TestFieldsReachCRI(t *testing.T) {
	t.Parallel()
	resources := func(name corev1.ResourceName, q string) corev1.ResourceList {
		return corev1.ResourceList{name: resource.MustParse(q)}
	}
	c := func(f func(*corev1.Container)) func(*corev1.PodSpec) {
		return func(s *corev1.PodSpec) { f(&s.Containers[0]) }
	}
	env := func(e corev1.EnvVarSource) func(*corev1.PodSpec) {
		return c(func(c *corev1.Container) { c.Env = []corev1.EnvVar{{Name: "E", ValueFrom: &e}} })
	}
	mount := func(m corev1.VolumeMount) func(*corev1.PodSpec) {
		m.Name = "data"
		if m.MountPath == "" {
			m.MountPath = "/data"
		}
		return c(func(c *corev1.Container) {
			c.Env = []corev1.EnvVar{{Name: "SUB", Value: "sub"}}
			c.VolumeMounts = []corev1.VolumeMount{m}
		})
	}
	port := func(p corev1.ContainerPort) func(*corev1.PodSpec) {
		p.ContainerPort = 80
		return c(func(c *corev1.Container) { c.Ports = []corev1.ContainerPort{p} })
	}
	base := cri(t, fieldPod())
	require.Equal(t, base, cri(t, fieldPod()))
	for _, tc := range []struct {
		name   string
		change func(*corev1.PodSpec)
		than   func(*corev1.PodSpec) // nil: than the pod without
		want   string
	}{
		{"hostname", func(s *corev1.PodSpec) { s.Hostname = "other" }, nil, `hostname:"other"`},
		{"subdomain", func(s *corev1.PodSpec) { s.Subdomain = "sub" }, nil, "p.sub.ns.svc.cluster.local"},
		{"setHostnameAsFQDN", func(s *corev1.PodSpec) { s.Subdomain, s.SetHostnameAsFQDN = "sub", ptr.To(true) }, nil, `hostname:"p.sub.ns.svc.cluster.local"`},
		{"hostnameOverride", func(s *corev1.PodSpec) { s.HostnameOverride = ptr.To("mine.example.com") }, nil, `hostname:"mine.example.com"`},
		{"hostAliases", func(s *corev1.PodSpec) {
			s.HostAliases = []corev1.HostAlias{{IP: "1.2.3.4", Hostnames: []string{"db"}}}
		}, nil, "1.2.3.4\tdb"},
		{"hostNetwork", func(s *corev1.PodSpec) { s.HostNetwork = true }, nil, "network:NODE"},
		{"hostPID", func(s *corev1.PodSpec) { s.HostPID = true }, nil, "pid:NODE"},
		{"hostIPC", func(s *corev1.PodSpec) { s.HostIPC = true }, nil, "ipc:NODE"},
		{"shareProcessNamespace", func(s *corev1.PodSpec) { s.ShareProcessNamespace = ptr.To(true) }, nil, "namespace_options:{}"},
		{"dnsPolicy", func(s *corev1.PodSpec) { s.DNSPolicy = corev1.DNSDefault }, nil, `servers:"9.9.9.9"`},
		{"dnsConfig", func(s *corev1.PodSpec) { s.DNSConfig = &corev1.PodDNSConfig{Searches: []string{"example.com"}} }, nil, `"example.com"`},
		{"terminationGracePeriodSeconds", func(s *corev1.PodSpec) { s.TerminationGracePeriodSeconds = ptr.To[int64](77) }, nil, `value:"77"`},
		{"sysctls", func(s *corev1.PodSpec) {
			s.SecurityContext.Sysctls = []corev1.Sysctl{{Name: "net/ipv4/tcp_syncookies", Value: "0"}}
		}, nil, "net.ipv4.tcp_syncookies"},
		{"overhead", func(s *corev1.PodSpec) {
			s.Containers[0].Resources.Requests, s.Overhead = resources("cpu", "1"), resources("cpu", "1")
		}, nil, "cpu_shares:2048"},
		{"overhead for the runtime", func(s *corev1.PodSpec) { s.Overhead = resources("memory", "7Mi") }, nil, "overhead:{cpu_shares:2 memory_limit_in_bytes:7340032"},
		{"runtimeClassName", func(s *corev1.PodSpec) { s.RuntimeClassName = ptr.To("gvisor") }, nil, "of-gvisor"},
		{"resources of the pod", func(s *corev1.PodSpec) {
			s.Resources = &corev1.ResourceRequirements{Limits: resources("memory", "1Gi"), Requests: resources("cpu", "500m")}
		}, nil, "memory_limit_in_bytes:1073741824"},
		{"cpu of the pod", func(s *corev1.PodSpec) { s.Resources = &corev1.ResourceRequirements{Limits: resources("cpu", "500m")} }, nil, "cpu_quota:50000"},
		{"priorityClassName", func(s *corev1.PodSpec) {
			s.PriorityClassName, s.Containers[0].Resources.Requests = "system-node-critical", resources("memory", "1Mi")
		}, nil, "oom_score_adj:-997"},

		{"supplementalGroupsPolicy", func(s *corev1.PodSpec) {
			s.SecurityContext.SupplementalGroupsPolicy = ptr.To(corev1.SupplementalGroupsPolicyStrict)
		}, nil, "supplemental_groups_policy:Strict"},

		{"command", c(func(c *corev1.Container) { c.Command = []string{"run"} }), nil, `command:"run"`},
		{"args", c(func(c *corev1.Container) { c.Args = []string{"-v"} }), nil, `args:"-v"`},
		{"workingDir", c(func(c *corev1.Container) { c.WorkingDir = "/srv" }), nil, `working_dir:"/srv"`},
		{"stdin", c(func(c *corev1.Container) { c.Stdin = true }), nil, "stdin:true"},
		{"stdinOnce", c(func(c *corev1.Container) { c.StdinOnce = true }), nil, "stdin_once:true"},
		{"tty", c(func(c *corev1.Container) { c.TTY = true }), nil, "tty:true"},
		{"terminationMessagePath", c(func(c *corev1.Container) { c.TerminationMessagePath = "/last" }), nil, `container_path:"/last"`},
		{"terminationMessagePolicy", c(func(c *corev1.Container) {
			c.TerminationMessagePolicy = corev1.TerminationMessageFallbackToLogsOnError
		}), nil, "FallbackToLogsOnError"},
		{"cpu limit", c(func(c *corev1.Container) { c.Resources.Limits = resources("cpu", "2") }), nil, "cpu_quota:200000"},
		{"cpu request", c(func(c *corev1.Container) { c.Resources.Requests = resources("cpu", "2") }), nil, "cpu_shares:2048"},
		{"memory limit", c(func(c *corev1.Container) { c.Resources.Limits = resources("memory", "1Mi") }), nil, "memory_limit_in_bytes:1048576"},

		{"hostPort", port(corev1.ContainerPort{HostPort: 8080}), nil, "host_port:8080"},
		{"hostIP", port(corev1.ContainerPort{HostPort: 8080, HostIP: "10.0.0.1"}), nil, `host_ip:"10.0.0.1"`},
		{"protocol", port(corev1.ContainerPort{HostPort: 8080, Protocol: corev1.ProtocolUDP}), nil, "protocol:UDP"},
		{"hostPort of a sidecar", func(s *corev1.PodSpec) {
			s.InitContainers[0].Ports = []corev1.ContainerPort{{ContainerPort: 81, HostPort: 8081}}
		}, nil, "host_port:8081"},

		{"value", c(func(c *corev1.Container) { c.Env = []corev1.EnvVar{{Name: "E", Value: "x"}} }), nil, `key:"E"`},
		{"resourceFieldRef of another container", func(s *corev1.PodSpec) {
			s.InitContainers[0].Resources.Limits = resources("cpu", "3")
			env(corev1.EnvVarSource{ResourceFieldRef: &corev1.ResourceFieldSelector{ContainerName: "side", Resource: "limits.cpu"}})(s)
		}, nil, `value:"3"`},
		{"fieldRef", env(corev1.EnvVarSource{FieldRef: &corev1.ObjectFieldSelector{FieldPath: "metadata.uid"}}), nil, `key:"E"`},

		{"mountPath", mount(corev1.VolumeMount{MountPath: "/elsewhere"}), nil, `container_path:"/elsewhere"`},
		{"readOnly", mount(corev1.VolumeMount{ReadOnly: true}), mount(corev1.VolumeMount{}), "readonly:true"},
		{"mountPropagation to the container", mount(corev1.VolumeMount{MountPropagation: ptr.To(corev1.MountPropagationHostToContainer)}), mount(corev1.VolumeMount{}), "PROPAGATION_HOST_TO_CONTAINER"},
		{"mountPropagation both ways", mount(corev1.VolumeMount{MountPropagation: ptr.To(corev1.MountPropagationBidirectional)}), mount(corev1.VolumeMount{}), "PROPAGATION_BIDIRECTIONAL"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			pod, than := fieldPod(), base
			tc.change(&pod.Spec)
			if tc.than != nil {
				other := fieldPod()
				tc.than(&other.Spec)
				than = cri(t, other)
			}
			got := cri(t, pod)
			require.NotEqual(t, than, got)
			require.Contains(t, strings.ReplaceAll(got, "  ", " "), tc.want)
			require.NotContains(t, strings.ReplaceAll(than, "  ", " "), tc.want)
		})
	}
}

// A pod's limits are its own, its containers', or none.
func TestPodLevelResources(t *testing.T) {
	t.Parallel()
	cpu := func(q string) corev1.ResourceList {
		return corev1.ResourceList{corev1.ResourceCPU: resource.MustParse(q), corev1.ResourceMemory: resource.MustParse("1Gi")}
	}
	pod := fieldPod()
	require.Zero(t, podResources(pod).CpuQuota)
	pod.Spec.Containers[0].Resources.Limits = cpu("1")
	require.Zero(t, podResources(pod).CpuQuota, "the sidecar has no limit, so the pod has none")
	pod.Spec.Resources = &corev1.ResourceRequirements{Limits: cpu("2"), Requests: cpu("1500m")}
	r := podResources(pod)
	require.Equal(t, []int64{200000, 1536, 1 << 30}, []int64{r.CpuQuota, r.CpuShares, r.MemoryLimitInBytes})
	side := containerResources(pod, &pod.Spec.InitContainers[0], cpu("8"))
	require.Equal(t, []int64{200000, 1 << 30}, []int64{side.CpuQuota, side.MemoryLimitInBytes}, "a container without a limit has its pod's")
	own := containerResources(pod, &pod.Spec.Containers[0], cpu("8"))
	require.Equal(t, int64(100000), own.CpuQuota)
}

// What running a pod takes is in its cgroup, and the runtime is told of it beside what the
// containers have.
func TestOverheadIsCountedOnce(t *testing.T) {
	t.Parallel()
	pod := fieldPod()
	pod.Spec.InitContainers = nil
	list := func(cpu, memory string) corev1.ResourceList {
		return corev1.ResourceList{corev1.ResourceCPU: resource.MustParse(cpu), corev1.ResourceMemory: resource.MustParse(memory)}
	}
	pod.Spec.Containers[0].Resources = corev1.ResourceRequirements{Limits: list("1", "1Gi"), Requests: list("1", "1Gi")}
	require.Nil(t, overhead(pod))
	pod.Spec.Overhead = list("500m", "512Mi")
	numbers := func(r *runtimev1.LinuxContainerResources) []int64 {
		return []int64{r.CpuShares, r.CpuQuota, r.MemoryLimitInBytes}
	}
	require.Equal(t, []int64{1536, 150000, 1536 << 20}, numbers(podResources(pod)))
	require.Equal(t, []int64{1024, 100000, 1024 << 20}, numbers(sandboxResources(pod)))
	require.Equal(t, []int64{512, 50000, 512 << 20}, numbers(overhead(pod)))
}

func TestUnknownRuntimeClass(t *testing.T) {
	t.Parallel()
	pod := fieldPod()
	m := &Manager{cfg: Config{Objects: objects{}}}
	for name, want := range map[*string]string{nil: "", ptr.To(""): "", ptr.To("a"): "of-a"} {
		pod.Spec.RuntimeClassName = name
		got, err := m.runtimeHandler(pod)
		require.NoError(t, err)
		require.Equal(t, want, got)
	}
	pod.Spec.RuntimeClassName = ptr.To("unknown")
	_, err := m.runtimeHandler(pod)
	require.EqualError(t, err, `runtimeclass.node.k8s.io "unknown" not found`)
}

// Best-effort pods together have the least there is, burstable ones what they
// request, guaranteed ones are beside them.
func TestClassWeights(t *testing.T) {
	t.Parallel()
	pod := func(request, limit string) *corev1.Pod {
		p := fieldPod()
		p.Spec.InitContainers = nil
		r := &p.Spec.Containers[0].Resources
		if request != "" {
			r.Requests = corev1.ResourceList{corev1.ResourceCPU: resource.MustParse(request), corev1.ResourceMemory: resource.MustParse("1Mi")}
		}
		if limit != "" {
			r.Limits = corev1.ResourceList{corev1.ResourceCPU: resource.MustParse(limit), corev1.ResourceMemory: resource.MustParse("1Mi")}
		}
		return p
	}
	four := corev1.ResourceList{corev1.ResourceCPU: resource.MustParse("4")}
	for _, tc := range []struct {
		name string
		pods []*corev1.Pod
		want weights
	}{
		{"nobody", nil, weights{4096, 2, 2}},
		{"best effort", []*corev1.Pod{pod("", ""), pod("", "")}, weights{4096, 2, 2}},
		{"burstable add up", []*corev1.Pod{pod("500m", ""), pod("1", "2"), pod("", "")}, weights{4096, 1536, 2}},
		{"guaranteed do not count", []*corev1.Pod{pod("2", "2"), pod("500m", "")}, weights{4096, 512, 2}},
	} {
		require.Equal(t, tc.want, classWeights(tc.pods, four), tc.name)
	}
}
