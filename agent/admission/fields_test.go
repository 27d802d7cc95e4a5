package admission

import (
	"flag"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/version"
	"k8s.io/component-helpers/nodedeclaredfeatures"
	"k8s.io/component-helpers/nodedeclaredfeatures/features"
	"k8s.io/utils/ptr"
)

var update = flag.Bool("update", false, "write docs/pod-fields.md")

// upstream walks the types below v1.PodSpec, but not what is inside fields that
// stop says are not carried out. It returns the Go name of each field.
func upstream(stop func(field string) bool) map[string]string {
	out := map[string]string{}
	seen := map[reflect.Type]bool{}
	var walk func(t reflect.Type, as string)
	walk = func(t reflect.Type, as string) {
		for t.Kind() == reflect.Pointer || t.Kind() == reflect.Slice || t.Kind() == reflect.Map {
			t = t.Elem()
		}
		if t.Kind() != reflect.Struct || t.PkgPath() != reflect.TypeFor[corev1.PodSpec]().PkgPath() || as == "" && seen[t] {
			return
		}
		if as == "" {
			as, seen[t] = t.Name(), true
		}
		for i := range t.NumField() {
			f := t.Field(i)
			json, _, _ := strings.Cut(f.Tag.Get("json"), ",")
			if f.Anonymous && json == "" {
				walk(f.Type, as) // inlined: its fields are as's
				continue
			}
			name := as + "." + json
			out[name] = f.Name
			if !stop(name) {
				walk(f.Type, "")
			}
		}
	}
	walk(reflect.TypeFor[corev1.PodSpec](), "")
	return out
}

func listed(t *testing.T) map[string]Field {
	t.Helper()
	out := map[string]Field{}
	for _, f := range Fields() {
		require.NotContains(t, out, f.Name, "listed twice")
		out[f.Name] = f
	}
	return out
}

func carriedOut(f Field) bool { return f.Verdict == Done || f.Verdict == Partly }

// The list names every field that upstream's types have, and no other.
func TestFieldsAreUpstreams(t *testing.T) {
	t.Parallel()
	list := listed(t)
	want := upstream(func(name string) bool { f, ok := list[name]; return ok && !carriedOut(f) })
	for _, name := range slices.Sorted(maps.Keys(want)) {
		require.Contains(t, list, name, "upstream has a field that the list lacks: say in fields_*.go what a node does with it, and refuse it in unsupported.go when it does nothing")
	}
	for name := range list {
		require.Contains(t, want, name, "the list names a field that upstream does not have (any more)")
	}
}

// What is carried out is used by the source of the folder that says so and by
// its tests and stories; what is not carried out claims no folder. What is missing isolates
// nothing and bounds nothing: whoever adds to it has to argue here.
func TestFieldsThatAreDone(t *testing.T) {
	t.Parallel()
	list := listed(t)
	goNames := upstream(func(name string) bool { f, ok := list[name]; return ok && !carriedOut(f) })
	sources, tests, stories := map[string]string{}, map[string]string{}, map[string]string{}
	for _, dir := range []string{"pod", "volume", "csi", "image", "admission"} {
		files, err := filepath.Glob(filepath.Join("..", dir, "*.go"))
		require.NoError(t, err)
		require.NotEmpty(t, files)
		if dir != "admission" { // what a real agent does with pods, too
			whole, err := filepath.Glob(filepath.Join("..", "*_test.go"))
			require.NoError(t, err)
			files = append(files, whole...)
		}
		for _, file := range files {
			if dir == "admission" && strings.HasPrefix(filepath.Base(file), "fields") && !strings.HasSuffix(file, "_test.go") {
				continue
			}
			raw, err := os.ReadFile(file)
			require.NoError(t, err)
			if strings.HasSuffix(file, "_test.go") {
				tests[dir] += string(raw)
			} else {
				sources[dir] += string(raw)
			}
		}
		told, err := filepath.Glob(filepath.Join("..", dir, "testdata", "*.txt"))
		require.NoError(t, err)
		for _, file := range told {
			raw, err := os.ReadFile(file)
			require.NoError(t, err)
			stories[dir] += string(raw)
		}
	}
	// Read where nothing names them: by a helper of upstream's that takes the whole.
	inside := map[string]string{
		"NodeSelector": "nodeaffinity.GetRequiredNodeAffinity", "NodeSelectorTerm": "nodeaffinity.GetRequiredNodeAffinity",
		"NodeSelectorRequirement": "nodeaffinity.GetRequiredNodeAffinity", "NodeAffinity": "nodeaffinity.GetRequiredNodeAffinity",
		"Affinity": "nodeaffinity.GetRequiredNodeAffinity", "PodSpec.nodeSelector": "nodeaffinity.GetRequiredNodeAffinity", "PodSpec.affinity": "nodeaffinity.GetRequiredNodeAffinity",
		"Toleration": "FindMatchingUntoleratedTaint", "HTTPGetAction": "NewRequestForHTTPGetAction", "HTTPHeader": "NewRequestForHTTPGetAction",
		"ResourceFieldSelector": "ExtractResourceValueByContainerNameAndNodeAllocatable", "PodSpec.overhead": "resource.PodRequests",
		"SecurityContext.runAsUser": "DetermineEffectiveSecurityContext", "SecurityContext.allowPrivilegeEscalation": "AddNoNewPrivileges",
		"ResourceRequirements.requests": "PodRequests", "SecurityContext.appArmorProfile": "apparmor.GetProfile", "PodSecurityContext.appArmorProfile": "apparmor.GetProfile",
	}
	for name, f := range list {
		if !carriedOut(f) {
			assert.Empty(t, f.Where, name)
			continue
		}
		typeName, field, _ := strings.Cut(name, ".")
		used := regexp.MustCompile(`\.` + goNames[name] + `\b`)
		helper := inside[name]
		if helper == "" {
			helper = inside[typeName]
		}
		assert.True(t, used.MatchString(sources[f.Where]) || helper != "" && strings.Contains(sources[f.Where], helper),
			"%s is said to be done in agent/%s, whose source does not use it", name, f.Where)
		tested := regexp.MustCompile(`\b` + goNames[name] + `\b`)
		story := regexp.MustCompile(`\b` + field + `: `)
		assert.True(t, tested.MatchString(tests[f.Where]) || story.MatchString(stories[f.Where]),
			"%s is said to be done in agent/%s, whose tests and stories do not use it", name, f.Where)
	}
	var missing []string
	for name, f := range list {
		if f.Verdict == Missing {
			missing = append(missing, name)
		}
	}
	require.Empty(t, missing)
}

func first(spec *corev1.PodSpec) *corev1.Container { return &spec.Containers[0] }

func withVolume(source corev1.VolumeSource) func(*corev1.PodSpec) {
	return func(s *corev1.PodSpec) {
		s.Volumes = append(s.Volumes, corev1.Volume{Name: "v", VolumeSource: source})
	}
}

func withProjection(p corev1.VolumeProjection) func(*corev1.PodSpec) {
	return withVolume(corev1.VolumeSource{Projected: &corev1.ProjectedVolumeSource{Sources: []corev1.VolumeProjection{p}}})
}

// refusedExamples has, for each field that is refused, pods that use it.
func refusedExamples() map[string][]func(*corev1.PodSpec) {
	one := ptr.To[int64](1)
	type list = []func(*corev1.PodSpec)
	windows := &corev1.WindowsSecurityContextOptions{HostProcess: ptr.To(true)}
	out := map[string]list{
		"PodSpec.os":             {func(s *corev1.PodSpec) { s.OS = &corev1.PodOS{Name: corev1.Windows} }},
		"PodOS.name":             {func(s *corev1.PodSpec) { s.OS = &corev1.PodOS{Name: "plan9"} }},
		"PodSpec.hostUsers":      {func(s *corev1.PodSpec) { s.HostUsers = ptr.To(false) }},
		"PodSpec.resourceClaims": {func(s *corev1.PodSpec) { s.ResourceClaims = []corev1.PodResourceClaim{{Name: "gpu"}} }},

		"PodSecurityContext.windowsOptions": {func(s *corev1.PodSpec) { s.SecurityContext.WindowsOptions = windows }},
		"PodSecurityContext.seLinuxOptions": {func(s *corev1.PodSpec) { s.SecurityContext.SELinuxOptions = &corev1.SELinuxOptions{Type: "t"} }},
		"PodSecurityContext.supplementalGroupsPolicy": {func(s *corev1.PodSpec) {
			s.SecurityContext.SupplementalGroupsPolicy = ptr.To(corev1.SupplementalGroupsPolicyStrict)
		}},
		"PodSecurityContext.sysctls": {
			func(s *corev1.PodSpec) {
				s.SecurityContext.Sysctls = []corev1.Sysctl{{Name: "kernel.msgmax", Value: "1"}}
			},
			func(s *corev1.PodSpec) {
				s.SecurityContext.Sysctls = []corev1.Sysctl{{Name: "net.ipv4.tcp_syncookies", Value: "1"}, {Name: "net/core/somaxconn", Value: "1"}}
			},
			func(s *corev1.PodSpec) {
				s.HostNetwork, s.SecurityContext.Sysctls = true, []corev1.Sysctl{{Name: "net.ipv4.tcp_syncookies", Value: "1"}}
			},
			func(s *corev1.PodSpec) {
				s.HostIPC, s.SecurityContext.Sysctls = true, []corev1.Sysctl{{Name: "kernel/shm_rmid_forced", Value: "1"}}
			},
		},
		"PodSecurityContext.appArmorProfile": {func(s *corev1.PodSpec) {
			s.SecurityContext.AppArmorProfile = &corev1.AppArmorProfile{Type: corev1.AppArmorProfileTypeRuntimeDefault}
		}},
		"SecurityContext.appArmorProfile": {func(s *corev1.PodSpec) {
			first(s).SecurityContext.AppArmorProfile = &corev1.AppArmorProfile{Type: corev1.AppArmorProfileTypeLocalhost, LocalhostProfile: ptr.To("p")}
		}},
		"SecurityContext.seLinuxOptions": {func(s *corev1.PodSpec) { first(s).SecurityContext.SELinuxOptions = &corev1.SELinuxOptions{Level: "s0"} }},
		"SecurityContext.windowsOptions": {func(s *corev1.PodSpec) { first(s).SecurityContext.WindowsOptions = windows }},
		"SecurityContext.procMount":      {func(s *corev1.PodSpec) { first(s).SecurityContext.ProcMount = ptr.To(corev1.UnmaskedProcMount) }},

		"ResourceRequirements.claims": {func(s *corev1.PodSpec) { first(s).Resources.Claims = []corev1.ResourceClaim{{Name: "gpu"}} }, func(s *corev1.PodSpec) {
			s.Resources = &corev1.ResourceRequirements{Claims: []corev1.ResourceClaim{{Name: "gpu"}}}
		}},
		"ContainerRestartRule.action": {func(s *corev1.PodSpec) {
			first(s).RestartPolicyRules = []corev1.ContainerRestartRule{{Action: "Pray"}}
		}},
		"EnvVarSource.fileKeyRef": {func(s *corev1.PodSpec) {
			first(s).Env = []corev1.EnvVar{{Name: "E", ValueFrom: &corev1.EnvVarSource{FileKeyRef: &corev1.FileKeySelector{Key: "k"}}}}
		}},
		"VolumeMount.bindMountOptions": {func(s *corev1.PodSpec) {
			first(s).VolumeMounts = []corev1.VolumeMount{{Name: "v", BindMountOptions: []string{"noexec"}}}
		}},
		"Lifecycle.stopSignal": {func(s *corev1.PodSpec) { first(s).Lifecycle = &corev1.Lifecycle{StopSignal: ptr.To(corev1.SIGUSR1)} }},
		"GRPCAction.mode": {func(s *corev1.PodSpec) {
			first(s).LivenessProbe = &corev1.Probe{ProbeHandler: corev1.ProbeHandler{GRPC: &corev1.GRPCAction{Mode: ptr.To(corev1.GRPCProbeModeTLS)}}}
		}},
		"EmptyDirVolumeSource.medium":         {withVolume(corev1.VolumeSource{EmptyDir: &corev1.EmptyDirVolumeSource{Medium: corev1.StorageMediumHugePages}})},
		"EmptyDirVolumeSource.mode":           {withVolume(corev1.VolumeSource{EmptyDir: &corev1.EmptyDirVolumeSource{Mode: ptr.To[int32](0o700)}})},
		"SecretVolumeSource.defaultUser":      {withVolume(corev1.VolumeSource{Secret: &corev1.SecretVolumeSource{DefaultUser: one}})},
		"ConfigMapVolumeSource.defaultUser":   {withVolume(corev1.VolumeSource{ConfigMap: &corev1.ConfigMapVolumeSource{DefaultUser: one}})},
		"DownwardAPIVolumeSource.defaultUser": {withVolume(corev1.VolumeSource{DownwardAPI: &corev1.DownwardAPIVolumeSource{DefaultUser: one}})},
		"ProjectedVolumeSource.defaultUser":   {withVolume(corev1.VolumeSource{Projected: &corev1.ProjectedVolumeSource{DefaultUser: one}})},
		"ServiceAccountTokenProjection.user":  {withProjection(corev1.VolumeProjection{ServiceAccountToken: &corev1.ServiceAccountTokenProjection{User: one}})},
		"ClusterTrustBundleProjection.user":   {withProjection(corev1.VolumeProjection{ClusterTrustBundle: &corev1.ClusterTrustBundleProjection{User: one}})},
		"PodCertificateProjection.user":       {withProjection(corev1.VolumeProjection{PodCertificate: &corev1.PodCertificateProjection{User: one}})},
	}
	key := []corev1.KeyToPath{{Key: "k", Path: "p", User: one}}
	out["KeyToPath.user"] = list{
		withVolume(corev1.VolumeSource{Secret: &corev1.SecretVolumeSource{Items: key}}),
		withVolume(corev1.VolumeSource{ConfigMap: &corev1.ConfigMapVolumeSource{Items: key}}),
		withProjection(corev1.VolumeProjection{Secret: &corev1.SecretProjection{Items: key}}),
		withProjection(corev1.VolumeProjection{ConfigMap: &corev1.ConfigMapProjection{Items: key}}),
	}
	file := []corev1.DownwardAPIVolumeFile{{Path: "p", User: one}}
	out["DownwardAPIVolumeFile.user"] = list{
		withVolume(corev1.VolumeSource{DownwardAPI: &corev1.DownwardAPIVolumeSource{Items: file}}),
		withProjection(corev1.VolumeProjection{DownwardAPI: &corev1.DownwardAPIProjection{Items: file}}),
	}
	get := &corev1.HTTPGetAction{Protocol: ptr.To(corev1.HTTPProtocolHTTP2)}
	probed := &corev1.Probe{ProbeHandler: corev1.ProbeHandler{HTTPGet: get}}
	out["HTTPGetAction.protocol"] = list{
		func(s *corev1.PodSpec) { first(s).LivenessProbe = probed },
		func(s *corev1.PodSpec) { first(s).ReadinessProbe = probed },
		func(s *corev1.PodSpec) { first(s).StartupProbe = probed },
		func(s *corev1.PodSpec) {
			first(s).Lifecycle = &corev1.Lifecycle{PostStart: &corev1.LifecycleHandler{HTTPGet: get}}
		},
		func(s *corev1.PodSpec) {
			first(s).Lifecycle = &corev1.Lifecycle{PreStop: &corev1.LifecycleHandler{HTTPGet: get}}
		},
	}
	// Each kind of volume that upstream has and this list does not do.
	sources := reflect.TypeFor[corev1.VolumeSource]()
	for i := range sources.NumField() {
		json, _, _ := strings.Cut(sources.Field(i).Tag.Get("json"), ",")
		out["Volume."+json] = list{func(s *corev1.PodSpec) {
			v := corev1.Volume{Name: "v"}
			reflect.ValueOf(&v.VolumeSource).Elem().Field(i).Set(reflect.New(sources.Field(i).Type.Elem()))
			s.Volumes = []corev1.Volume{v}
		}}
	}
	return out
}

// A pod that has a refused field, in any of its containers, is refused, always
// with the same words; and the field is taken when it has a value that is done.
func TestRefusedFields(t *testing.T) {
	t.Parallel()
	examples := refusedExamples()
	node := testNode()
	node.AppArmor, node.SELinux = fmt.Errorf("AppArmor is not enabled on the host"), true
	reasons := map[string]string{
		"PodSpec.os": ReasonOS, "PodOS.name": ReasonOS, "PodSecurityContext.supplementalGroupsPolicy": ReasonSupplementalGroups,
		"PodSecurityContext.sysctls": ReasonSysctl, "PodSecurityContext.appArmorProfile": ReasonAppArmor, "SecurityContext.appArmorProfile": ReasonAppArmor,
	}
	for _, f := range Fields() {
		if f.Verdict != Refused && f.Verdict != Partly || strings.HasPrefix(f.Name, "EphemeralContainer.") {
			continue
		}
		t.Run(f.Name, func(t *testing.T) {
			t.Parallel()
			require.NotEmpty(t, examples[f.Name], "no pod shows that this field is refused")
			for i, change := range examples[f.Name] {
				pod := testPod()
				require.Nil(t, Admit(pod, node))
				change(&pod.Spec)
				check := func(pod *corev1.Pod) {
					before := pod.DeepCopy()
					r := Admit(pod, node)
					require.NotNil(t, r, "example %d", i)
					reason := reasons[f.Name]
					if reason == "" {
						reason = ReasonUnsupported
					}
					require.Equal(t, reason, r.Reason, r.Message)
					require.NotEmpty(t, r.Message)
					require.LessOrEqual(t, len(r.Message), 2048)
					require.Equal(t, r, Admit(pod, node), "not the same words twice")
					require.Equal(t, before, pod)
				}
				check(pod)
				// What a container must not have, a sidecar and an init container must not.
				for _, policy := range []*corev1.ContainerRestartPolicy{nil, ptr.To(corev1.ContainerRestartPolicyAlways)} {
					init := pod.DeepCopy()
					c := init.Spec.Containers[0].DeepCopy()
					c.Name, c.RestartPolicy = "init", policy
					init.Spec.InitContainers = []corev1.Container{*c}
					init.Spec.Containers[0] = testPod().Spec.Containers[0]
					check(init)
				}
			}
		})
	}
}

// What needs a newer runtime or kernel is taken where they are, and of that no more than
// is meant.
func TestWhatANewerRuntimeTakes(t *testing.T) {
	t.Parallel()
	own := func(s *corev1.PodSpec) { s.HostUsers = ptr.To(false) }
	unmasked := func(s *corev1.PodSpec) { first(s).SecurityContext.ProcMount = ptr.To(corev1.UnmaskedProcMount) }
	groups := func(policy corev1.SupplementalGroupsPolicy) func(*corev1.PodSpec) {
		return func(s *corev1.PodSpec) { s.SecurityContext.SupplementalGroupsPolicy = &policy }
	}
	newer := testNode()
	newer.UserNamespaces, newer.GroupsPolicy = true, true
	for _, tc := range []struct {
		name         string
		change       []func(*corev1.PodSpec)
		older, newer string // reasons
	}{
		{"its own users", []func(*corev1.PodSpec){own}, ReasonUnsupported, ""},
		{"all of proc", []func(*corev1.PodSpec){own, unmasked}, ReasonUnsupported, ""},
		{"all of the node's proc", []func(*corev1.PodSpec){unmasked}, ReasonUnsupported, ReasonUnsupported},
		{"its own groups", []func(*corev1.PodSpec){groups(corev1.SupplementalGroupsPolicyStrict)}, ReasonSupplementalGroups, ""},
		{"groups to come", []func(*corev1.PodSpec){groups("Loose")}, ReasonSupplementalGroups, ReasonSupplementalGroups},
	} {
		pod := testPod()
		for _, change := range tc.change {
			change(&pod.Spec)
		}
		for node, want := range map[*Node]string{testNode(): tc.older, newer: tc.newer} {
			r := Admit(pod, node)
			if want == "" {
				require.Nil(t, r, tc.name)
				continue
			}
			require.NotNil(t, r, tc.name)
			require.Equal(t, want, r.Reason, tc.name)
		}
		c := pod.Spec.Containers[0].DeepCopy()
		require.Equal(t, tc.newer == ReasonUnsupported, RefuseEphemeral(pod, c, newer) != nil, "%s: an ephemeral container", tc.name)
	}
	for text, can := range map[string]bool{"6.2.16": false, "6.3.0": true, "6.18.44": true} {
		require.Equal(t, can, (&Node{Kernel: version.MustParseGeneric(text)}).MapsUsers(), text)
	}
	require.False(t, (&Node{}).MapsUsers(), "of an unknown kernel")
}

// The values that are done do not get a pod refused.
func TestValuesThatAreTaken(t *testing.T) {
	t.Parallel()
	for name, change := range map[string]func(*corev1.PodSpec){
		"host's users": func(s *corev1.PodSpec) { s.HostUsers = ptr.To(true) },
		"linux":        func(s *corev1.PodSpec) { s.OS = &corev1.PodOS{Name: corev1.Linux} },
		"a class":      func(s *corev1.PodSpec) { s.RuntimeClassName = ptr.To("gvisor") },
		"groups merged": func(s *corev1.PodSpec) {
			s.SecurityContext.SupplementalGroupsPolicy = ptr.To(corev1.SupplementalGroupsPolicyMerge)
		},
		"safe sysctl": func(s *corev1.PodSpec) {
			s.SecurityContext.Sysctls = []corev1.Sysctl{{Name: "kernel/shm_rmid_forced"}, {Name: "net.ipv4.tcp_rmem"}}
		},
		"AppArmor unconfined": func(s *corev1.PodSpec) {
			s.SecurityContext.AppArmorProfile = &corev1.AppArmorProfile{Type: corev1.AppArmorProfileTypeUnconfined}
		},
		"SELinux without any":   func(s *corev1.PodSpec) { s.SecurityContext.SELinuxOptions = &corev1.SELinuxOptions{Type: "t"} },
		"no options of windows": func(s *corev1.PodSpec) { s.SecurityContext.WindowsOptions = &corev1.WindowsSecurityContextOptions{} },
		"default proc":          func(s *corev1.PodSpec) { first(s).SecurityContext.ProcMount = ptr.To(corev1.DefaultProcMount) },
		"read-only if possible": func(s *corev1.PodSpec) {
			first(s).VolumeMounts = []corev1.VolumeMount{{RecursiveReadOnly: ptr.To(corev1.RecursiveReadOnlyIfPossible)}, {RecursiveReadOnly: ptr.To(corev1.RecursiveReadOnlyDisabled)}}
		},
		"restart rule": func(s *corev1.PodSpec) {
			first(s).RestartPolicyRules = []corev1.ContainerRestartRule{{Action: corev1.ContainerRestartRuleActionRestart}}
		},
		"HTTP and gRPC": func(s *corev1.PodSpec) {
			first(s).LivenessProbe = &corev1.Probe{ProbeHandler: corev1.ProbeHandler{HTTPGet: &corev1.HTTPGetAction{Protocol: ptr.To(corev1.HTTPProtocolHTTP1)}}}
			first(s).ReadinessProbe = &corev1.Probe{ProbeHandler: corev1.ProbeHandler{GRPC: &corev1.GRPCAction{Mode: ptr.To(corev1.GRPCProbeModePlaintext)}}}
		},
		"volumes": func(s *corev1.PodSpec) {
			s.Volumes = []corev1.Volume{
				{Name: "a", VolumeSource: corev1.VolumeSource{EmptyDir: &corev1.EmptyDirVolumeSource{Medium: corev1.StorageMediumMemory}}},
				{Name: "b", VolumeSource: corev1.VolumeSource{HostPath: &corev1.HostPathVolumeSource{Path: "/x"}}},
				{Name: "c", VolumeSource: corev1.VolumeSource{Projected: &corev1.ProjectedVolumeSource{Sources: []corev1.VolumeProjection{{ServiceAccountToken: &corev1.ServiceAccountTokenProjection{}}, {ConfigMap: &corev1.ConfigMapProjection{}}}}}},
			}
		},
		"an ephemeral container": func(s *corev1.PodSpec) {
			s.EphemeralContainers = []corev1.EphemeralContainer{{EphemeralContainerCommon: corev1.EphemeralContainerCommon{Name: "e", SecurityContext: &corev1.SecurityContext{ProcMount: ptr.To(corev1.UnmaskedProcMount)}}}}
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			pod, node := testPod(), testNode()
			node.AppArmor = fmt.Errorf("none")
			change(&pod.Spec)
			require.Nil(t, Admit(pod, node))
		})
	}
}

// What an ephemeral container has and the node does not do is its own to answer for.
func TestRefusedEphemeralContainers(t *testing.T) {
	t.Parallel()
	node := testNode()
	node.AppArmor = fmt.Errorf("AppArmor is not enabled on the host")
	plain := corev1.Container{Name: "debug", Image: "i", SecurityContext: &corev1.SecurityContext{Privileged: ptr.To(true)}}
	require.Nil(t, RefuseEphemeral(testPod(), &plain, node))
	for want, change := range map[string]func(*corev1.Container){
		"procMount: Unmasked": func(c *corev1.Container) { c.SecurityContext.ProcMount = ptr.To(corev1.UnmaskedProcMount) },
		"Cannot enforce AppArmor": func(c *corev1.Container) {
			c.SecurityContext.AppArmorProfile = &corev1.AppArmorProfile{Type: corev1.AppArmorProfileTypeRuntimeDefault}
		},
	} {
		c := plain.DeepCopy()
		change(c)
		r := RefuseEphemeral(testPod(), c, node)
		require.NotNil(t, r, want)
		require.Contains(t, r.Message, want)
	}
}

// A pod cannot make its own status and events large.
func TestMessageIsBounded(t *testing.T) {
	t.Parallel()
	pod := testPod()
	for i := range 1000 {
		pod.Spec.Volumes = append(pod.Spec.Volumes, corev1.Volume{Name: fmt.Sprintf("v%d", i), VolumeSource: corev1.VolumeSource{NFS: &corev1.NFSVolumeSource{}}})
	}
	r := Admit(pod, testNode())
	require.NotNil(t, r)
	require.Contains(t, r.Message, "and 992 more")
	require.Less(t, len(r.Message), 2048)
}

// docs/pod-fields.md is what the list says.
func TestPage(t *testing.T) {
	t.Parallel()
	path := filepath.Join("..", "..", "docs", "pod-fields.md")
	want := page()
	if *update {
		require.NoError(t, os.WriteFile(path, []byte(want), 0o644))
	}
	have, err := os.ReadFile(path)
	require.NoError(t, err)
	require.Equal(t, want, string(have), "make it again: go test ./agent/admission -run TestPage -update")
}

func page() string {
	var b strings.Builder
	b.WriteString(`# What a node does with each field of a pod

Made from the list in ` + "`agent/admission`" + ` by ` + "`go test ./agent/admission -run TestPage -update`" + `.

A field that a node does not carry out is refused, not ignored. A refused pod is
` + "`Failed`" + ` with the kubelet's reason and a message that begins with
` + "`Pod was rejected:`" + `, has a warning event of the same reason, and nothing of it is
ever started. A pod is asked about once, before anything of it runs: an agent that
is upgraded does not end pods that run with a field that it would refuse, but says
so in an event of reason ` + "`PodFeatureUnsupported`" + `.

Besides its fields, a pod is refused for what the node has: ` + "`OutOfcpu`" + `,
` + "`OutOfmemory`, `OutOfephemeral-storage`, `OutOfpods`" + `, ` + "`OutOfhugepages-…`" + `,
` + "`NodeAffinity`, `NodeName`, `NodePorts`, `TaintToleration`" + ` (NoExecute taints),
` + "`PodOSSelectorNodeLabelDoesNotMatch`" + `. Critical pods do not make room for
themselves on the node as with the kubelet; the scheduler does that.

A running pod's containers get other resources in place (` + "`pods/resize`" + `). What the
node can never give, the pod's own resources, and restarts for a resize in a pod that
does not restart Always are answered with the condition ` + "`PodResizePending`" + `, reason
` + "`Infeasible`" + `; what others have at the time with ` + "`Deferred`" + `. The pod keeps what it has.
`)
	for _, section := range []struct {
		title    string
		verdicts []Verdict
	}{
		{"Refused", []Verdict{Refused}}, {"Refused for some values", []Verdict{Partly}}, {"Not done, and the pod runs without", []Verdict{Missing}},
		{"Meaningless on a node", []Verdict{Meaningless}}, {"Done", []Verdict{Done}},
	} {
		fmt.Fprintf(&b, "\n## %s\n\n", section.title)
		if section.verdicts[0] == Done {
			byType := map[string][]string{}
			var order []string
			for _, f := range Fields() {
				if typeName, name, _ := strings.Cut(f.Name, "."); f.Verdict == Done {
					if byType[typeName] == nil {
						order = append(order, typeName)
					}
					if f.Note != "" {
						name += " (" + f.Note + ")"
					}
					byType[typeName] = append(byType[typeName], name)
				}
			}
			for _, typeName := range order {
				fmt.Fprintf(&b, "- **%s**: %s\n", typeName, strings.Join(byType[typeName], ", "))
			}
			continue
		}
		for _, f := range Fields() {
			if slices.Contains(section.verdicts, f.Verdict) {
				fmt.Fprintf(&b, "- `%s`", f.Name)
				if f.Note != "" {
					fmt.Fprintf(&b, ": %s", f.Note)
				}
				b.WriteString("\n")
			}
		}
	}
	return b.String()
}

func testPod() *corev1.Pod {
	return &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: "p", UID: "u"},
		Spec: corev1.PodSpec{
			NodeName: "n", SecurityContext: &corev1.PodSecurityContext{},
			Containers: []corev1.Container{{Name: "c", SecurityContext: &corev1.SecurityContext{}}},
		},
	}
}

func TestUnsafeSysctls(t *testing.T) {
	t.Parallel()
	pod := func(name string, change func(*corev1.PodSpec)) *corev1.Pod {
		p := &corev1.Pod{Spec: corev1.PodSpec{SecurityContext: &corev1.PodSecurityContext{Sysctls: []corev1.Sysctl{{Name: name, Value: "1"}}}}}
		if change != nil {
			change(&p.Spec)
		}
		return p
	}
	node := &Node{UnsafeSysctls: []string{"kernel.msgmax", "net.core.*"}}
	for _, name := range []string{"kernel.msgmax", "kernel/msgmax", "net.core.somaxconn", "net/core/somaxconn", "kernel.shm_rmid_forced"} {
		require.Nil(t, Refuse(pod(name, nil), node), name)
	}
	for _, name := range []string{"kernel.msgmax2", "kernel.msg", "net.corex", "vm.swappiness", "net.ipv4.ip_forward"} {
		r := Refuse(pod(name, nil), node)
		require.NotNil(t, r, name)
		require.Equal(t, ReasonSysctl, r.Reason)
	}
	r := Refuse(pod("net.core.somaxconn", func(s *corev1.PodSpec) { s.HostNetwork = true }), node)
	require.NotNil(t, r, "it would be the machine's")
	require.Contains(t, r.Message, "not allowed with host")

	require.NoError(t, CheckUnsafeSysctls([]string{"kernel.msg*", "kernel.shmmax", "net.*", "fs.mqueue.msg_max", "kernel.sem"}))
	for _, bad := range []string{"", "*", "vm.*", "kernel.*", "net/core/*", "net.*.x", "kernel.panic"} {
		require.ErrorContains(t, CheckUnsafeSysctls([]string{"net.*", bad}), bad, bad)
	}
}

// Before Linux 5.12 nothing makes mounts read-only with all below them, and it is refused
// where a pod insists.
func TestRecursiveReadOnly(t *testing.T) {
	t.Parallel()
	pod := func(mode corev1.RecursiveReadOnlyMode) *corev1.Pod {
		return &corev1.Pod{Spec: corev1.PodSpec{Containers: []corev1.Container{{Name: "c", VolumeMounts: []corev1.VolumeMount{
			{Name: "v", ReadOnly: true, RecursiveReadOnly: &mode}}}}}}
	}
	for _, tt := range []struct {
		kernel  string
		mode    corev1.RecursiveReadOnlyMode
		refused bool
	}{
		{"5.11", corev1.RecursiveReadOnlyEnabled, true}, {"5.11", corev1.RecursiveReadOnlyIfPossible, false}, {"5.11", corev1.RecursiveReadOnlyDisabled, false},
		{"5.12", corev1.RecursiveReadOnlyEnabled, false}, {"6.8.1", corev1.RecursiveReadOnlyEnabled, false}, {"", corev1.RecursiveReadOnlyEnabled, true},
	} {
		node := &Node{}
		if tt.kernel != "" {
			node.Kernel = version.MustParseGeneric(tt.kernel)
		}
		r := Refuse(pod(tt.mode), node)
		require.Equal(t, tt.refused, r != nil, "%s on %q", tt.mode, tt.kernel)
		if r != nil {
			require.Contains(t, r.Message, `volume "v" requested recursive read-only mode, but it is not supported by the runtime`)
		}
	}
}

// A pod that needs a feature which the node declares is taken, and no other: the scheduler
// goes by what the Node says.
func TestDeclaredFeatures(t *testing.T) {
	t.Parallel()
	pod := testPod()
	first(&pod.Spec).RestartPolicy = ptr.To(corev1.ContainerRestartPolicyNever)
	first(&pod.Spec).RestartPolicyRules = []corev1.ContainerRestartRule{{Action: corev1.ContainerRestartRuleActionRestartAllContainers}}
	require.Nil(t, Admit(pod, testNode()))
	framework := nodedeclaredfeatures.New(slices.Clone(features.AllFeatures))
	needs, err := framework.InferForPodScheduling(&nodedeclaredfeatures.PodInfo{Spec: &pod.Spec}, kubernetes)
	require.NoError(t, err)
	got, err := framework.MatchNode(needs, &corev1.Node{Status: corev1.NodeStatus{DeclaredFeatures: DeclaredFeatures}})
	require.NoError(t, err)
	require.True(t, got.IsMatch)
	none, err := framework.MatchNode(needs, &corev1.Node{})
	require.NoError(t, err)
	require.False(t, none.IsMatch, "nothing is needed: the test says nothing")
}
