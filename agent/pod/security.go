package pod

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"path/filepath"
	"strconv"

	corev1 "k8s.io/api/core/v1"
	runtimev1 "k8s.io/cri-api/pkg/apis/runtime/v1"
	"k8s.io/kubernetes/pkg/security/apparmor"
	"k8s.io/kubernetes/pkg/securitycontext"

	"timonel/agent/hostile"
)

func namespaces(pod *corev1.Pod) *runtimev1.NamespaceOption {
	o := &runtimev1.NamespaceOption{Pid: runtimev1.NamespaceMode_CONTAINER}
	if pod.Spec.HostNetwork {
		o.Network = runtimev1.NamespaceMode_NODE
	}
	if pod.Spec.HostIPC {
		o.Ipc = runtimev1.NamespaceMode_NODE
	}
	switch {
	case pod.Spec.HostPID:
		o.Pid = runtimev1.NamespaceMode_NODE
	case pod.Spec.ShareProcessNamespace != nil && *pod.Spec.ShareProcessNamespace:
		o.Pid = runtimev1.NamespaceMode_POD
	}
	return o
}

func int64Value(v *int64) *runtimev1.Int64Value {
	if v == nil {
		return nil
	}
	return &runtimev1.Int64Value{Value: *v}
}

func runtimeDefault() *runtimev1.SecurityProfile {
	return &runtimev1.SecurityProfile{ProfileType: runtimev1.SecurityProfile_RuntimeDefault}
}

func sandboxSecurity(pod *corev1.Pod) *runtimev1.LinuxSandboxSecurityContext {
	out := &runtimev1.LinuxSandboxSecurityContext{NamespaceOptions: namespaces(pod), Seccomp: runtimeDefault()}
	for _, list := range [][]corev1.Container{pod.Spec.InitContainers, pod.Spec.Containers} {
		for i := range list {
			if sc := list[i].SecurityContext; sc != nil && sc.Privileged != nil && *sc.Privileged {
				out.Privileged = true
			}
		}
	}
	for i := range pod.Spec.EphemeralContainers {
		if sc := pod.Spec.EphemeralContainers[i].SecurityContext; sc != nil && isTrue(sc.Privileged) {
			out.Privileged = true
		}
	}
	if sc := pod.Spec.SecurityContext; sc != nil {
		out.RunAsUser = int64Value(sc.RunAsUser)
		if sc.RunAsUser != nil {
			out.RunAsGroup = int64Value(sc.RunAsGroup)
		}
		out.SupplementalGroups = supplementalGroups(pod)
		out.SupplementalGroupsPolicy = groupsPolicy(pod)
		out.SelinuxOptions = selinux(sc.SELinuxOptions)
	}
	return out
}

func supplementalGroups(pod *corev1.Pod) []int64 {
	sc := pod.Spec.SecurityContext
	if sc == nil {
		return nil
	}
	groups := append([]int64(nil), sc.SupplementalGroups...)
	if sc.FSGroup != nil {
		groups = append(groups, *sc.FSGroup)
	}
	return groups
}

// groupsPolicy is whether a container has the groups that its image says of its user, beside
// those of the pod.
func groupsPolicy(pod *corev1.Pod) runtimev1.SupplementalGroupsPolicy {
	sc := pod.Spec.SecurityContext
	if sc != nil && sc.SupplementalGroupsPolicy != nil && *sc.SupplementalGroupsPolicy == corev1.SupplementalGroupsPolicyStrict {
		return runtimev1.SupplementalGroupsPolicy_Strict
	}
	return runtimev1.SupplementalGroupsPolicy_Merge
}

func selinux(o *corev1.SELinuxOptions) *runtimev1.SELinuxOption {
	if o == nil {
		return nil
	}
	return &runtimev1.SELinuxOption{User: o.User, Role: o.Role, Type: o.Type, Level: o.Level}
}

// containerSecurity merges the pod's and the container's security context, and
// holds runAsNonRoot against what the image says.
func (w *worker) containerSecurity(pod *corev1.Pod, c *corev1.Container, imageID string) (*runtimev1.LinuxContainerSecurityContext, error) {
	user, name, err := w.imageUser(imageID)
	if err != nil {
		return nil, err
	}
	return securityContext(pod, c, user, name, w.m.cfg.SeccompDir)
}

// securityContext is what CRI is told of a container's security. user or name
// is whom the image runs as, nil and "" when it does not say.
func securityContext(pod *corev1.Pod, c *corev1.Container, user *int64, name, seccompDir string) (*runtimev1.LinuxContainerSecurityContext, error) {
	sc := securitycontext.DetermineEffectiveSecurityContext(pod, c)
	if sc == nil {
		sc = &corev1.SecurityContext{}
	}
	seccomp, err := seccompProfile(pod, c, seccompDir)
	if err != nil {
		return nil, err
	}
	appArmor, err := appArmorProfile(pod, c)
	if err != nil {
		return nil, err
	}
	out := &runtimev1.LinuxContainerSecurityContext{
		NamespaceOptions:   namespaces(pod),
		RunAsUser:          int64Value(sc.RunAsUser),
		SupplementalGroups: supplementalGroups(pod), SupplementalGroupsPolicy: groupsPolicy(pod),
		SelinuxOptions: selinux(sc.SELinuxOptions),
		NoNewPrivs:     securitycontext.AddNoNewPrivileges(sc),
		MaskedPaths:    securitycontext.ConvertToRuntimeMaskedPaths(sc.ProcMount),
		ReadonlyPaths:  securitycontext.ConvertToRuntimeReadonlyPaths(sc.ProcMount),
		Privileged:     isTrue(sc.Privileged),
		ReadonlyRootfs: isTrue(sc.ReadOnlyRootFilesystem),
		Seccomp:        seccomp,
		Apparmor:       appArmor,
	}
	if sc.Capabilities != nil {
		out.Capabilities = &runtimev1.Capability{}
		for _, v := range sc.Capabilities.Add {
			out.Capabilities.AddCapabilities = append(out.Capabilities.AddCapabilities, string(v))
		}
		for _, v := range sc.Capabilities.Drop {
			out.Capabilities.DropCapabilities = append(out.Capabilities.DropCapabilities, string(v))
		}
	}
	// A number that is no user's is taken for a name by some runtimes, and looked up in
	// the image's own list of users, where it may be root's.
	if sc.RunAsUser == nil && user != nil && (*user < 0 || *user > math.MaxInt32) {
		return nil, fmt.Errorf("image will run as user %d, which no user can be: 0 to %d are possible (pod: %q, container: %s)", *user, math.MaxInt32, pod.Name, c.Name)
	}
	if isTrue(sc.RunAsNonRoot) {
		switch {
		case sc.RunAsUser != nil && *sc.RunAsUser == 0:
			return nil, fmt.Errorf("container's runAsUser breaks non-root policy (pod: %q, container: %s)", pod.Name, c.Name)
		case sc.RunAsUser == nil && user == nil && name != "":
			return nil, fmt.Errorf("container has runAsNonRoot and image has non-numeric user (%s), cannot verify user is non-root (pod: %q, container: %s)", name, pod.Name, c.Name)
		case sc.RunAsUser == nil && (user == nil || *user == 0):
			return nil, fmt.Errorf("container has runAsNonRoot and image will run as root (pod: %q, container: %s)", pod.Name, c.Name)
		}
	}
	if sc.RunAsUser == nil {
		// CRI takes the image's user only when told so.
		out.RunAsUser, out.RunAsUsername = int64Value(user), name
	}
	if out.RunAsUser != nil || out.RunAsUsername != "" {
		out.RunAsGroup = int64Value(sc.RunAsGroup)
	} else if sc.RunAsGroup != nil {
		root := int64(0)
		out.RunAsUser, out.RunAsGroup = int64Value(&root), int64Value(sc.RunAsGroup)
	}
	return out, nil
}

// imageUser is the user that an image's configuration names: a number, a name,
// or neither.
func (w *worker) imageUser(imageID string) (*int64, string, error) {
	ctx, cancel := context.WithTimeout(w.ctx, callTimeout)
	defer cancel()
	resp, err := w.m.cfg.Images.ImageStatus(ctx, &runtimev1.ImageStatusRequest{Image: &runtimev1.ImageSpec{Image: imageID}})
	if err != nil {
		return nil, "", fmt.Errorf("inspect image %s: %w", imageID, err)
	}
	if resp.Image == nil {
		return nil, "", fmt.Errorf("image %s has gone", imageID)
	}
	if resp.Image.Uid != nil {
		uid := resp.Image.Uid.Value
		return &uid, "", nil
	}
	if n, err := strconv.ParseInt(resp.Image.Username, 10, 64); err == nil {
		return &n, "", nil
	}
	return nil, resp.Image.Username, nil
}

// seccompProfile is a container's own profile, else its pod's; without one in
// the spec it is the runtime's default, not unconfined. The effective security
// context does not have it: that leaves profiles out.
func seccompProfile(pod *corev1.Pod, c *corev1.Container, dir string) (*runtimev1.SecurityProfile, error) {
	var profile *corev1.SeccompProfile
	if c.SecurityContext != nil {
		profile = c.SecurityContext.SeccompProfile
	}
	if profile == nil && pod.Spec.SecurityContext != nil {
		profile = pod.Spec.SecurityContext.SeccompProfile
	}
	if profile == nil {
		return runtimeDefault(), nil
	}
	switch profile.Type {
	case corev1.SeccompProfileTypeRuntimeDefault:
		return runtimeDefault(), nil
	case corev1.SeccompProfileTypeUnconfined:
		return &runtimev1.SecurityProfile{ProfileType: runtimev1.SecurityProfile_Unconfined}, nil
	case corev1.SeccompProfileTypeLocalhost:
		if profile.LocalhostProfile == nil || *profile.LocalhostProfile == "" {
			return nil, errors.New("localhostProfile must be set if seccompProfile type is Localhost.")
		}
		if !filepath.IsLocal(*profile.LocalhostProfile) {
			return nil, fmt.Errorf("seccompProfile.localhostProfile %q must be a path below the node's folder of profiles", *profile.LocalhostProfile)
		}
		return &runtimev1.SecurityProfile{
			ProfileType:  runtimev1.SecurityProfile_Localhost,
			LocalhostRef: filepath.Join(dir, *profile.LocalhostProfile),
		}, nil
	}
	return nil, fmt.Errorf("seccompProfile.type %q is not known to this node", profile.Type)
}

// maxSeccomp bounds a file of a profile. The runtime's default has some 15 KiB.
const maxSeccomp = 1 << 20

// loadable looks at the file of a Localhost profile, as containerd is about to read it by
// its path, whatever it is: it has to be a regular one, beneath the folder of profiles.
func (m *Manager) loadable(profile *runtimev1.SecurityProfile) error {
	if profile.GetProfileType() != runtimev1.SecurityProfile_Localhost {
		return nil
	}
	fail := func(err error) error {
		return fmt.Errorf("cannot load seccomp profile %q: %w", profile.LocalhostRef, err)
	}
	dir, err := hostile.OpenRoot(m.cfg.SeccompDir)
	if err != nil {
		return fail(err)
	}
	defer dir.Close()
	name, err := filepath.Rel(m.cfg.SeccompDir, profile.LocalhostRef)
	if err != nil {
		return fail(err)
	}
	raw, err := dir.ReadFile(name, maxSeccomp)
	if err != nil {
		return fail(err)
	}
	if !json.Valid(raw) {
		return fail(errors.New("it is not JSON"))
	}
	return nil
}

// appArmorProfile is a container's own profile, else what the deprecated
// annotation says, else its pod's. Whether the kernel can enforce it was asked
// when the pod was accepted.
func appArmorProfile(pod *corev1.Pod, c *corev1.Container) (*runtimev1.SecurityProfile, error) {
	profile := apparmor.GetProfile(pod, c)
	if profile == nil {
		return nil, nil
	}
	switch profile.Type {
	case corev1.AppArmorProfileTypeRuntimeDefault:
		return runtimeDefault(), nil
	case corev1.AppArmorProfileTypeUnconfined:
		return &runtimev1.SecurityProfile{ProfileType: runtimev1.SecurityProfile_Unconfined}, nil
	case corev1.AppArmorProfileTypeLocalhost:
		if profile.LocalhostProfile == nil || *profile.LocalhostProfile == "" {
			return nil, errors.New("localhostProfile must be set if appArmorProfile type is Localhost")
		}
		return &runtimev1.SecurityProfile{ProfileType: runtimev1.SecurityProfile_Localhost, LocalhostRef: *profile.LocalhostProfile}, nil
	}
	return nil, fmt.Errorf("appArmorProfile.type %q is not known to this node", profile.Type)
}
