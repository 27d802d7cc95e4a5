package admission

import (
	"fmt"
	"iter"
	"reflect"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/util/version"
	"k8s.io/component-helpers/nodedeclaredfeatures"
	"k8s.io/component-helpers/nodedeclaredfeatures/features"
	"k8s.io/component-helpers/nodedeclaredfeatures/features/restartallcontainers"
)

// maxNamed is how many fields a message names: it becomes a status and an event.
const maxNamed = 8

// maxMounts is how many mounts of a pod the node itself makes at most. Linux has 100,000 in
// all by default (fs.mount-max), each container's start copies them all, and a pod may name
// tens of thousands: four of those would keep every other pod of the node from starting.
const maxMounts = 1024

const notAvailable = "Pod requires node features that are not available: "

// kubernetes is the version whose node features are asked for.
var kubernetes = version.MustParseGeneric("1.37")

// DeclaredFeatures are those of upstream's that this node has: the scheduler binds no pod
// that needs another.
var DeclaredFeatures = []string{restartallcontainers.RestartAllContainersOnContainerExits}

// declared refuses what upstream has nodes declare before pods may use it, and this one
// does not.
func declared(pod *corev1.Pod, _ *Node) *Rejection {
	framework := nodedeclaredfeatures.New(slices.Clone(features.AllFeatures))
	needs, err := framework.InferForPodScheduling(&nodedeclaredfeatures.PodInfo{Spec: &pod.Spec, Status: &pod.Status}, kubernetes)
	if err != nil {
		return reject(ReasonUnsupported, "Failed to infer pod's feature requirements: %v", err)
	}
	if needs.IsEmpty() {
		return nil
	}
	names, err := framework.Unmap(needs)
	if err != nil {
		return reject(ReasonUnsupported, "Failed to match pod's feature requirements against the node: %v", err)
	}
	names = slices.DeleteFunc(names, func(name string) bool { return slices.Contains(DeclaredFeatures, name) })
	if len(names) == 0 {
		return nil
	}
	return reject(ReasonUnsupported, "%s%s", notAvailable, strings.Join(names, ", "))
}

// unsupported refuses fields that this node does not carry out, and values that
// it does not know: what is new is refused until it is done.
func unsupported(pod *corev1.Pod, node *Node) *Rejection {
	var found []string
	say := func(format string, args ...any) { found = append(found, fmt.Sprintf(format, args...)) }
	spec := &pod.Spec
	users := ownUsers(pod)
	if users && !node.UserNamespaces {
		say("spec.hostUsers: false (user namespaces)")
	}
	if len(spec.ResourceClaims) > 0 {
		say("spec.resourceClaims (dynamic resource allocation)")
	}
	if spec.Resources != nil && len(spec.Resources.Claims) > 0 {
		say("spec.resources.claims (dynamic resource allocation)")
	}
	if sc := spec.SecurityContext; sc != nil {
		unsupportedSecurity("spec.securityContext", users, nil, sc.WindowsOptions, sc.SELinuxOptions, node, say)
	}
	for i := range spec.Volumes {
		unsupportedVolume(&spec.Volumes[i], say)
	}
	mounts := len(spec.Volumes)
	for c := range containers(pod) {
		unsupportedContainer(c, users, node, say)
		mounts += pinned(c)
	}
	if mounts > maxMounts {
		say("%d volumes and mounts with a subPath or recursiveReadOnly (%d at most)", mounts, maxMounts)
	}
	if len(found) == 0 {
		return nil
	}
	if more := len(found) - maxNamed; more > 0 {
		found = append(found[:maxNamed], fmt.Sprintf("and %d more", more))
	}
	return reject(ReasonUnsupported, "%s%s", notAvailable, strings.Join(found, ", "))
}

// containers are those that run with the pod, and before it. Ephemeral ones come
// later: see [RefuseEphemeral].
func containers(pod *corev1.Pod) iter.Seq[*corev1.Container] {
	return func(yield func(*corev1.Container) bool) {
		for _, list := range [][]corev1.Container{pod.Spec.InitContainers, pod.Spec.Containers} {
			for i := range list {
				if !yield(&list[i]) {
					return
				}
			}
		}
	}
}

// pinned counts the mounts of a container that the node makes beside the volumes.
func pinned(c *corev1.Container) (n int) {
	for i := range c.VolumeMounts {
		m := &c.VolumeMounts[i]
		sealed := m.RecursiveReadOnly != nil && *m.RecursiveReadOnly != corev1.RecursiveReadOnlyDisabled
		if m.SubPath != "" || m.SubPathExpr != "" || sealed {
			n++
		}
	}
	return n
}

// RefuseEphemeral says what of an ephemeral container of pod this node does not carry out, or
// nil. One that is refused is not started, and its pod goes on.
func RefuseEphemeral(pod *corev1.Pod, c *corev1.Container, node *Node) *Rejection {
	alone := &corev1.Pod{Spec: corev1.PodSpec{HostUsers: pod.Spec.HostUsers, Containers: []corev1.Container{*c}}}
	if r := appArmor(alone, node); r != nil {
		return r
	}
	return unsupported(alone, node)
}

// ownUsers says whether a pod is in a user namespace of its own.
func ownUsers(pod *corev1.Pod) bool { return pod.Spec.HostUsers != nil && !*pod.Spec.HostUsers }

// unsupportedSecurity: users is whether the pod has a user namespace of its own, without
// which what proc shows is the node's.
func unsupportedSecurity(where string, users bool, proc *corev1.ProcMountType, windows *corev1.WindowsSecurityContextOptions, selinux *corev1.SELinuxOptions, node *Node, say func(string, ...any)) {
	if proc != nil && *proc != corev1.DefaultProcMount && (!users || *proc != corev1.UnmaskedProcMount) {
		say("%s.procMount: %s", where, *proc)
	}
	if windows != nil && *windows != (corev1.WindowsSecurityContextOptions{}) {
		say("%s.windowsOptions", where)
	}
	// Where the kernel has no SELinux there is nothing to label, as upstream's.
	if node.SELinux && selinux != nil && *selinux != (corev1.SELinuxOptions{}) {
		say("%s.seLinuxOptions (this node's containerd does not set labels)", where)
	}
}

func unsupportedContainer(c *corev1.Container, users bool, node *Node, say func(string, ...any)) {
	where := "container " + c.Name + ": "
	if sc := c.SecurityContext; sc != nil {
		unsupportedSecurity(where+"securityContext", users, sc.ProcMount, sc.WindowsOptions, sc.SELinuxOptions, node, say)
	}
	if len(c.Resources.Claims) > 0 {
		say("%sresources.claims (dynamic resource allocation)", where)
	}
	for _, m := range c.VolumeMounts {
		if r := m.RecursiveReadOnly; r != nil && *r != corev1.RecursiveReadOnlyDisabled && *r != corev1.RecursiveReadOnlyIfPossible && !node.RecursiveReadOnly() {
			say("%svolume %q requested recursive read-only mode, but it is not supported by the runtime", where, m.Name)
		}
		if len(m.BindMountOptions) > 0 {
			say("%svolumeMounts[%s].bindMountOptions", where, m.Name)
		}
	}
	for _, e := range c.Env {
		if e.ValueFrom != nil && e.ValueFrom.FileKeyRef != nil {
			say("%senv[%s].valueFrom.fileKeyRef", where, e.Name)
		}
	}
	for _, r := range c.RestartPolicyRules {
		if r.Action != corev1.ContainerRestartRuleActionRestart && r.Action != corev1.ContainerRestartRuleActionRestartAllContainers {
			say("%srestartPolicyRules with action %s", where, r.Action)
		}
	}
	http := func(field string, get *corev1.HTTPGetAction) {
		if get != nil && get.Protocol != nil && *get.Protocol != corev1.HTTPProtocolHTTP1 {
			say("%s%s.httpGet.protocol: %s", where, field, *get.Protocol)
		}
	}
	if l := c.Lifecycle; l != nil {
		if l.StopSignal != nil {
			say("%slifecycle.stopSignal", where)
		}
		if l.PostStart != nil {
			http("lifecycle.postStart", l.PostStart.HTTPGet)
		}
		if l.PreStop != nil {
			http("lifecycle.preStop", l.PreStop.HTTPGet)
		}
	}
	probe := func(field string, p *corev1.Probe) {
		if p == nil {
			return
		}
		http(field, p.HTTPGet)
		if p.GRPC != nil && p.GRPC.Mode != nil && *p.GRPC.Mode != corev1.GRPCProbeModePlaintext {
			say("%s%s.grpc.mode: %s", where, field, *p.GRPC.Mode)
		}
	}
	probe("livenessProbe", c.LivenessProbe)
	probe("readinessProbe", c.ReadinessProbe)
	probe("startupProbe", c.StartupProbe)
}

// volumes are the sources that a node can make; all others are refused.
var volumes = []string{"hostPath", "emptyDir", "secret", "configMap", "downwardAPI", "projected", "persistentVolumeClaim", "ephemeral", "csi", "image"}

// projections are the sources within a projected volume.
var projections = []string{"secret", "configMap", "downwardAPI", "serviceAccountToken", "clusterTrustBundle", "podCertificate"}

// set lists the fields of a struct of pointers that are set, as in YAML.
func set(source any) []string {
	var out []string
	v := reflect.ValueOf(source)
	for i := range v.NumField() {
		if !v.Field(i).IsNil() {
			name, _, _ := strings.Cut(v.Type().Field(i).Tag.Get("json"), ",")
			out = append(out, name)
		}
	}
	return out
}

func unsupportedVolume(v *corev1.Volume, say func(string, ...any)) {
	where := fmt.Sprintf("volume %q: ", v.Name)
	for _, name := range set(v.VolumeSource) {
		if !slices.Contains(volumes, name) {
			say("%s%s (use %s)", where, name, strings.Join(volumes, ", "))
		}
	}
	user := func(field string, u *int64) {
		if u != nil {
			say("%s%s", where, field)
		}
	}
	items := func(list []corev1.KeyToPath) {
		for i := range list {
			user("items[].user", list[i].User)
		}
	}
	files := func(list []corev1.DownwardAPIVolumeFile) {
		for i := range list {
			user("items[].user", list[i].User)
		}
	}
	if s := v.EmptyDir; s != nil {
		if s.Medium != corev1.StorageMediumDefault && s.Medium != corev1.StorageMediumMemory {
			say("%semptyDir.medium: %s", where, s.Medium)
		}
		if s.Mode != nil {
			say("%semptyDir.mode", where)
		}
	}
	if s := v.Secret; s != nil {
		user("secret.defaultUser", s.DefaultUser)
		items(s.Items)
	}
	if s := v.ConfigMap; s != nil {
		user("configMap.defaultUser", s.DefaultUser)
		items(s.Items)
	}
	if s := v.DownwardAPI; s != nil {
		user("downwardAPI.defaultUser", s.DefaultUser)
		files(s.Items)
	}
	if v.Projected == nil {
		return
	}
	user("projected.defaultUser", v.Projected.DefaultUser)
	for _, s := range v.Projected.Sources {
		for _, name := range set(s) {
			if !slices.Contains(projections, name) {
				say("%sprojected %s", where, name)
			}
		}
		switch {
		case s.Secret != nil:
			items(s.Secret.Items)
		case s.ConfigMap != nil:
			items(s.ConfigMap.Items)
		case s.DownwardAPI != nil:
			files(s.DownwardAPI.Items)
		case s.ServiceAccountToken != nil:
			user("serviceAccountToken.user", s.ServiceAccountToken.User)
		case s.ClusterTrustBundle != nil:
			user("clusterTrustBundle.user", s.ClusterTrustBundle.User)
		case s.PodCertificate != nil:
			user("podCertificate.user", s.PodCertificate.User)
		}
	}
}
