package pod

import (
	"testing"

	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	runtimev1 "k8s.io/cri-api/pkg/apis/runtime/v1"
	"k8s.io/utils/ptr"
)

// Every field of a pod's and a container's security context has its field in
// CRI's configuration, and the container's own goes first.
func TestSecurityContextToCRI(t *testing.T) {
	t.Parallel()
	type cri = runtimev1.LinuxContainerSecurityContext
	profile := func(kind runtimev1.SecurityProfile_ProfileType, ref string) *runtimev1.SecurityProfile {
		return &runtimev1.SecurityProfile{ProfileType: kind, LocalhostRef: ref}
	}
	seccomp := func(kind corev1.SeccompProfileType, ref string) *corev1.SeccompProfile {
		p := &corev1.SeccompProfile{Type: kind}
		if ref != "" {
			p.LocalhostProfile = &ref
		}
		return p
	}
	armor := func(kind corev1.AppArmorProfileType, ref string) *corev1.AppArmorProfile {
		p := &corev1.AppArmorProfile{Type: kind}
		if ref != "" {
			p.LocalhostProfile = &ref
		}
		return p
	}
	user := func(n int64) *runtimev1.Int64Value { return &runtimev1.Int64Value{Value: n} }
	for _, tc := range []struct {
		name        string
		pod         corev1.PodSecurityContext
		container   corev1.SecurityContext
		annotations map[string]string
		spec        func(*corev1.PodSpec)
		want        func(*cri)
		err         string
	}{
		{name: "nothing is the runtime's seccomp profile and masked paths", want: func(*cri) {}},
		{name: "privileged", container: corev1.SecurityContext{Privileged: ptr.To(true)}, want: func(c *cri) { c.Privileged = true }},
		{name: "capabilities", container: corev1.SecurityContext{Capabilities: &corev1.Capabilities{Add: []corev1.Capability{"NET_ADMIN"}, Drop: []corev1.Capability{"ALL"}}},
			want: func(c *cri) {
				c.Capabilities = &runtimev1.Capability{AddCapabilities: []string{"NET_ADMIN"}, DropCapabilities: []string{"ALL"}}
			}},
		{name: "no privilege escalation", container: corev1.SecurityContext{AllowPrivilegeEscalation: ptr.To(false)}, want: func(c *cri) { c.NoNewPrivs = true }},
		{name: "privilege escalation", container: corev1.SecurityContext{AllowPrivilegeEscalation: ptr.To(true)}, want: func(*cri) {}},
		{name: "read-only root", container: corev1.SecurityContext{ReadOnlyRootFilesystem: ptr.To(true)}, want: func(c *cri) { c.ReadonlyRootfs = true }},
		{name: "default proc", container: corev1.SecurityContext{ProcMount: ptr.To(corev1.DefaultProcMount)}, want: func(*cri) {}},
		{name: "user of the pod", pod: corev1.PodSecurityContext{RunAsUser: ptr.To[int64](7)}, want: func(c *cri) { c.RunAsUser = user(7) }},
		{name: "user of the container", pod: corev1.PodSecurityContext{RunAsUser: ptr.To[int64](7)}, container: corev1.SecurityContext{RunAsUser: ptr.To[int64](8)},
			want: func(c *cri) { c.RunAsUser = user(8) }},
		{name: "group of the pod", pod: corev1.PodSecurityContext{RunAsUser: ptr.To[int64](7), RunAsGroup: ptr.To[int64](5)},
			want: func(c *cri) { c.RunAsUser, c.RunAsGroup = user(7), user(5) }},
		{name: "group of the container, user root", pod: corev1.PodSecurityContext{RunAsGroup: ptr.To[int64](5)}, container: corev1.SecurityContext{RunAsGroup: ptr.To[int64](6)},
			want: func(c *cri) { c.RunAsUser, c.RunAsGroup = user(0), user(6) }},
		{name: "not root, by number", pod: corev1.PodSecurityContext{RunAsNonRoot: ptr.To(true), RunAsUser: ptr.To[int64](7)}, want: func(c *cri) { c.RunAsUser = user(7) }},
		{name: "not root and root", pod: corev1.PodSecurityContext{RunAsNonRoot: ptr.To(true), RunAsUser: ptr.To[int64](0)}, err: "breaks non-root policy"},
		{name: "not root and an image of root's", container: corev1.SecurityContext{RunAsNonRoot: ptr.To(true)}, err: "image will run as root"},
		{name: "SELinux of the pod", pod: corev1.PodSecurityContext{SELinuxOptions: &corev1.SELinuxOptions{User: "u", Role: "r", Type: "t", Level: "l"}},
			want: func(c *cri) { c.SelinuxOptions = &runtimev1.SELinuxOption{User: "u", Role: "r", Type: "t", Level: "l"} }},
		{name: "SELinux of the container", pod: corev1.PodSecurityContext{SELinuxOptions: &corev1.SELinuxOptions{Type: "t"}},
			container: corev1.SecurityContext{SELinuxOptions: &corev1.SELinuxOptions{Type: "own"}},
			want:      func(c *cri) { c.SelinuxOptions = &runtimev1.SELinuxOption{Type: "own"} }},
		{name: "groups", pod: corev1.PodSecurityContext{SupplementalGroups: []int64{1, 2}, FSGroup: ptr.To[int64](3), SupplementalGroupsPolicy: ptr.To(corev1.SupplementalGroupsPolicyMerge)},
			want: func(c *cri) { c.SupplementalGroups = []int64{1, 2, 3} }},
		{name: "host's namespaces", spec: func(s *corev1.PodSpec) { s.HostNetwork, s.HostIPC, s.HostPID = true, true, true },
			want: func(c *cri) {
				c.NamespaceOptions = &runtimev1.NamespaceOption{Network: runtimev1.NamespaceMode_NODE, Ipc: runtimev1.NamespaceMode_NODE, Pid: runtimev1.NamespaceMode_NODE}
			}},
		{name: "processes shared", spec: func(s *corev1.PodSpec) { s.ShareProcessNamespace = ptr.To(true) },
			want: func(c *cri) { c.NamespaceOptions = &runtimev1.NamespaceOption{Pid: runtimev1.NamespaceMode_POD} }},

		{name: "seccomp of the pod", pod: corev1.PodSecurityContext{SeccompProfile: seccomp(corev1.SeccompProfileTypeUnconfined, "")},
			want: func(c *cri) { c.Seccomp = profile(runtimev1.SecurityProfile_Unconfined, "") }},
		{name: "seccomp of the container, from a file", container: corev1.SecurityContext{SeccompProfile: seccomp(corev1.SeccompProfileTypeLocalhost, "a/b.json")},
			want: func(c *cri) { c.Seccomp = profile(runtimev1.SecurityProfile_Localhost, "/seccomp/a/b.json") }},
		{name: "seccomp of the container, none", container: corev1.SecurityContext{SeccompProfile: seccomp(corev1.SeccompProfileTypeUnconfined, "")},
			want: func(c *cri) { c.Seccomp = profile(runtimev1.SecurityProfile_Unconfined, "") }},
		{name: "seccomp of the container, default over none", pod: corev1.PodSecurityContext{SeccompProfile: seccomp(corev1.SeccompProfileTypeUnconfined, "")},
			container: corev1.SecurityContext{SeccompProfile: seccomp(corev1.SeccompProfileTypeRuntimeDefault, "")}, want: func(*cri) {}},
		{name: "seccomp from no file", container: corev1.SecurityContext{SeccompProfile: seccomp(corev1.SeccompProfileTypeLocalhost, "")}, err: "localhostProfile must be set"},
		{name: "seccomp from a file elsewhere", container: corev1.SecurityContext{SeccompProfile: seccomp(corev1.SeccompProfileTypeLocalhost, "../../etc/passwd")}, err: "below the node's folder"},
		{name: "seccomp of a kind to come", container: corev1.SecurityContext{SeccompProfile: seccomp("Wasm", "")}, err: `type "Wasm" is not known`},

		{name: "AppArmor of the pod", pod: corev1.PodSecurityContext{AppArmorProfile: armor(corev1.AppArmorProfileTypeLocalhost, "mine")},
			want: func(c *cri) { c.Apparmor = profile(runtimev1.SecurityProfile_Localhost, "mine") }},
		{name: "AppArmor of the container", pod: corev1.PodSecurityContext{AppArmorProfile: armor(corev1.AppArmorProfileTypeUnconfined, "")},
			container: corev1.SecurityContext{AppArmorProfile: armor(corev1.AppArmorProfileTypeRuntimeDefault, "")},
			want:      func(c *cri) { c.Apparmor = profile(runtimev1.SecurityProfile_RuntimeDefault, "") }},
		{name: "AppArmor by the old annotation", annotations: map[string]string{corev1.DeprecatedAppArmorBetaContainerAnnotationKeyPrefix + "c": "localhost/old"},
			want: func(c *cri) { c.Apparmor = profile(runtimev1.SecurityProfile_Localhost, "old") }},
		{name: "AppArmor without a profile", container: corev1.SecurityContext{AppArmorProfile: armor(corev1.AppArmorProfileTypeLocalhost, "")}, err: "localhostProfile must be set"},
		{name: "AppArmor of a kind to come", container: corev1.SecurityContext{AppArmorProfile: armor("Wasm", "")}, err: `type "Wasm" is not known`},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			// As defaulting does, the pod always has a context of its own.
			pod := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: "p", Annotations: tc.annotations}, Spec: corev1.PodSpec{
				SecurityContext: &tc.pod, Containers: []corev1.Container{{Name: "c", SecurityContext: &tc.container}},
			}}
			if tc.spec != nil {
				tc.spec(&pod.Spec)
			}
			got, err := securityContext(pod, &pod.Spec.Containers[0], nil, "", "/seccomp")
			if tc.err != "" {
				require.ErrorContains(t, err, tc.err)
				return
			}
			require.NoError(t, err)
			want := &cri{
				NamespaceOptions: &runtimev1.NamespaceOption{Pid: runtimev1.NamespaceMode_CONTAINER},
				MaskedPaths:      got.MaskedPaths, ReadonlyPaths: got.ReadonlyPaths,
				Seccomp: profile(runtimev1.SecurityProfile_RuntimeDefault, ""),
			}
			tc.want(want)
			require.Equal(t, want.String(), got.String())
			require.Contains(t, got.MaskedPaths, "/proc/kcore")
			require.Contains(t, got.ReadonlyPaths, "/proc/sys")
		})
	}
}

// TestAnImageCannotBeRoot: of what an image calls its user, nothing is root's in the
// end where the pod must not be. A number beyond a user's is looked up as a name by
// containerd, in the image's own list of users.
func TestAnImageCannotBeRoot(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		name    string
		user    *int64
		byName  string
		context corev1.SecurityContext
		err     string
	}{
		{"a user", ptr.To[int64](1000), "", corev1.SecurityContext{RunAsNonRoot: ptr.To(true)}, ""},
		{"the last user", ptr.To[int64](1<<31 - 1), "", corev1.SecurityContext{RunAsNonRoot: ptr.To(true)}, ""},
		{"root", ptr.To[int64](0), "", corev1.SecurityContext{RunAsNonRoot: ptr.To(true)}, "image will run as root"},
		{"zero in 32 bits", ptr.To[int64](1 << 32), "", corev1.SecurityContext{RunAsNonRoot: ptr.To(true)}, "no user can be"},
		{"beyond a user", ptr.To[int64](1 << 31), "", corev1.SecurityContext{RunAsNonRoot: ptr.To(true)}, "no user can be"},
		{"negative", ptr.To[int64](-1), "", corev1.SecurityContext{RunAsNonRoot: ptr.To(true)}, "no user can be"},
		{"largest", ptr.To[int64](1<<63 - 1), "", corev1.SecurityContext{RunAsNonRoot: ptr.To(true)}, "no user can be"},
		{"negative, where root may be", ptr.To[int64](-1), "", corev1.SecurityContext{}, "no user can be"},
		{"a name", nil, "1000\n0", corev1.SecurityContext{RunAsNonRoot: ptr.To(true)}, "non-numeric user"},
		{"the pod says whom", ptr.To[int64](-1), "", corev1.SecurityContext{RunAsNonRoot: ptr.To(true), RunAsUser: ptr.To[int64](5)}, ""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			got, err := securityContext(&corev1.Pod{}, &corev1.Container{Name: "c", SecurityContext: &tc.context}, tc.user, tc.byName, "")
			if tc.err != "" {
				require.ErrorContains(t, err, tc.err)
				return
			}
			require.NoError(t, err)
			require.Positive(t, got.RunAsUser.Value)
		})
	}
}
