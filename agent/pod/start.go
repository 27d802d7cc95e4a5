package pod

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	runtimev1 "k8s.io/cri-api/pkg/apis/runtime/v1"

	"timonel/agent/hostile"
	"timonel/agent/image"
	"timonel/agent/volume"
)

// Waiting reasons, as the kubelet's.
const (
	reasonCreating     = "ContainerCreating"
	reasonInitializing = "PodInitializing"
	reasonCrashLoop    = "CrashLoopBackOff"
	reasonConfigError  = "CreateContainerConfigError"
	reasonCreateError  = "CreateContainerError"
	reasonRunError     = "RunContainerError"
	reasonUnsupported  = "UnsupportedVolume"
	reasonSandboxError = "FailedCreatePodSandBox"
	reasonKill         = "FailedKillPod" // of an event alone
)

// backOffMessages say that a container that ended is not started again yet, in an event
// and in the status.
func backOffMessages(pod *corev1.Pod, name string, delay time.Duration) (short, long string) {
	whose := fmt.Sprintf("%s_%s(%s)", pod.Name, pod.Namespace, pod.UID)
	return fmt.Sprintf("Back-off restarting failed container %s in pod %s", name, whose),
		fmt.Sprintf("back-off %s restarting failed container=%s pod=%s", delay, name, whose)
}

// makeLogDir makes the folder of a pod's logs, or of one of its containers in it.
func makeLogDir(dir, container string) error {
	logs, err := hostile.MakeRoot(filepath.Dir(dir), 0o755)
	if err != nil {
		return err
	}
	defer logs.Close()
	made, err := logs.MkdirAll(filepath.Join(filepath.Base(dir), container), 0o755, -1, -1)
	if err != nil {
		return err
	}
	return made.Close()
}

// makeVolumes makes the pod's volumes, or brings them up to date.
func (w *worker) makeVolumes(want *want, s *seen) {
	pod := want.pod
	s.volumesOf = want.shown // one that fails is put off, and tried again for that reason
	var ips []string
	if box := s.current(); box != nil {
		ips = box.ips
	}
	ctx, done := w.whileWanted(want)
	defer done()
	mounts, refresh, err := w.m.volumes.Setup(ctx, pod, ips)
	if err != nil {
		if ctx.Err() != nil {
			return
		}
		reason, message := reasonCreating, mountMessage(err)
		if errors.Is(err, volume.ErrUnsupported) {
			reason = reasonUnsupported
		}
		if !errors.Is(err, volume.ErrPending) { // nothing has failed
			w.eventOnce(pod, corev1.EventTypeWarning, eventOf(message), message, "")
		}
		w.putOff(waitVolumes, reason, message)
		if s.volumes != nil { // what was mounted before stays as it is
			s.refreshAt = w.waits[waitVolumes].until
		}
		return
	}
	w.waits.done(waitVolumes)
	s.volumes, s.refreshAt = mounts, refresh
}

// mountMessage is what is said of volumes that are not there. What CSI says of one is in
// upstream's words already.
func mountMessage(err error) string {
	text := strings.ReplaceAll(rpcText(err), "\n", "; ")
	if strings.HasPrefix(text, "MountVolume.") || strings.HasPrefix(text, "MapVolume.") {
		return text
	}
	return "MountVolume failed: " + text
}

// eventOf is the reason of an event with a message of mountMessage.
func eventOf(message string) string {
	if strings.HasPrefix(message, "MapVolume.") {
		return "FailedMapVolume"
	}
	return "FailedMount"
}

// makeSandbox makes the pod's sandbox: its namespaces, network and cgroup.
func (w *worker) makeSandbox(want *want, s *seen, attempt uint32) outcome {
	pod := want.pod
	id, err := w.runSandbox(pod, attempt)
	if w.ctx.Err() != nil {
		return rest
	}
	if err != nil {
		message := "Failed to create pod sandbox: " + rpcText(err)
		w.eventOnce(pod, corev1.EventTypeWarning, reasonSandboxError, message, "")
		w.log.Warn("create sandbox", "error", rpcText(err))
		w.putOff(waitSandbox, reasonCreating, message)
		return failed
	}
	w.waits.done(waitSandbox)
	s.applied = want.given
	w.m.own(id, w.uid)
	w.mu.Lock()
	w.want.shown++ // the pod has an address now, which some volumes show
	w.mu.Unlock()
	return look
}

func (w *worker) runSandbox(pod *corev1.Pod, attempt uint32) (id string, err error) {
	if !pod.Spec.HostNetwork && !w.m.cfg.NetworkReady() {
		return "", errors.New("the pod network is not ready: this node has no pod CIDR yet")
	}
	handler, err := w.m.runtimeHandler(pod)
	if err != nil {
		return "", err
	}
	cfg, err := w.sandboxConfig(pod, attempt)
	if err != nil {
		return "", err
	}
	if err := w.tellDNS(pod); err != nil {
		return "", err
	}
	if err := makeLogDir(cfg.LogDirectory, ""); err != nil {
		return "", err
	}
	if err := w.applyCgroup(pod); err != nil {
		return "", err
	}
	ctx, cancel := context.WithTimeout(w.ctx, callTimeout)
	defer cancel()
	if attempt > 0 {
		w.event(pod, corev1.EventTypeNormal, "SandboxChanged", "Pod sandbox changed, it will be killed and re-created.", "")
	}
	resp, err := w.m.cfg.Runtime.RunPodSandbox(ctx, &runtimev1.RunPodSandboxRequest{Config: cfg, RuntimeHandler: handler})
	if err != nil {
		return "", err
	}
	return resp.PodSandboxId, nil
}

// runtimeHandler is the one of the pod's RuntimeClass; empty: the node's default.
func (m *Manager) runtimeHandler(pod *corev1.Pod) (string, error) {
	name := pod.Spec.RuntimeClassName
	if name == nil || *name == "" {
		return "", nil
	}
	class, ok := m.cfg.Objects.RuntimeClass(*name)
	if !ok {
		return "", fmt.Errorf("runtimeclass.node.k8s.io %q not found", *name)
	}
	return class.Handler, nil
}

func (w *worker) applyCgroup(pod *corev1.Pod) error {
	return w.limitPod(cgroupParent(w.m.cfg.CgroupRoot, pod), podResources(pod))
}

// start starts one container if its image is there, and has it pulled if it is to be.
func (w *worker) start(pod *corev1.Pod, s *seen, st start) outcome {
	name, box := st.spec.Name, s.current()
	fail := func(reason string, err error) outcome {
		if w.ctx.Err() == nil {
			w.eventOnce(pod, corev1.EventTypeWarning, "Failed", "Error: "+rpcText(err), name)
			w.putOff(waitStart(name), reason, rpcText(err))
		}
		return replan
	}
	boxConfig, err := w.sandboxConfig(pod, box.attempt)
	if err != nil {
		return fail(reasonConfigError, err)
	}
	res, err := w.imageVolumes(pod, st.spec, boxConfig)
	if err != nil {
		return fail(reasonCreateError, err)
	}
	if res.State == image.Ready {
		res = w.ensureImage(pod, st.spec, boxConfig, name)
	}
	if res.State != image.Ready {
		s.images[name] = res
		return replan
	}
	if st.ephemeral != nil {
		if st.target, err = targetOf(st.ephemeral, &s.observed); err != nil {
			return fail(reasonConfigError, err)
		}
	}
	ips := s.addresses(box)
	cfg, err := w.containerConfig(pod, st, res.ID, ips)
	if err != nil {
		return fail(reasonConfigError, err)
	}
	if sc := cfg.Linux.SecurityContext; !sc.Privileged { // else there is none
		if err := w.m.loadable(sc.Seccomp); err != nil {
			return fail(reasonCreateError, err)
		}
	}
	if err := makeLogDir(boxConfig.LogDirectory, name); err != nil {
		return fail(reasonCreateError, err)
	}
	ctx, cancel := context.WithTimeout(w.ctx, callTimeout)
	defer cancel()
	// What was made and never started, by an agent that died in between, is in
	// the way of its own name.
	for _, c := range s.containers[name] {
		if c.state == runtimev1.ContainerState_CONTAINER_CREATED || c.state == runtimev1.ContainerState_CONTAINER_UNKNOWN {
			if _, err := w.m.cfg.Runtime.RemoveContainer(ctx, &runtimev1.RemoveContainerRequest{ContainerId: c.id}); err != nil && !notFound(err) {
				return fail(reasonCreateError, err)
			}
		}
	}
	made, err := w.m.cfg.Runtime.CreateContainer(ctx, &runtimev1.CreateContainerRequest{PodSandboxId: box.id, Config: cfg, SandboxConfig: boxConfig})
	if err != nil {
		return fail(reasonCreateError, err)
	}
	id := made.ContainerId
	w.m.own(id, w.uid)
	w.event(pod, corev1.EventTypeNormal, "Created", "Container created", name)
	w.beginHook(id, st.spec)
	if _, err := w.m.cfg.Runtime.StartContainer(ctx, &runtimev1.StartContainerRequest{ContainerId: id}); err != nil {
		w.endHook(id, nil)
		fail(reasonRunError, err)
	} else {
		w.waits.done(waitStart(name))
		w.event(pod, corev1.EventTypeNormal, "Started", "Container started", name)
		w.runPostStart(pod, st.spec, id, ips)
	}
	if st.previous.exited() {
		w.waits.restarted(name, st.previous)
	}
	return look
}

// ensureImage asks for a container's image. Events are about the container told, or about
// the pod if that is empty.
func (w *worker) ensureImage(pod *corev1.Pod, c *corev1.Container, box *runtimev1.PodSandboxConfig, told string) image.Result {
	w.mu.Lock()
	w.imageWait = true // before it is looked for: one that appears in between wakes this worker
	w.mu.Unlock()
	return w.m.images.Ensure(w.ctx, image.Request{
		Pod: pod, Container: c, Secrets: w.pullSecrets(pod), Sandbox: box, Changed: w.wakeUp,
		Event: func(kind, reason, message string) { w.eventOnce(pod, kind, reason, message, told) },
	})
}

// pullSecrets are the pod's and its service account's that exist.
func (w *worker) pullSecrets(pod *corev1.Pod) []*corev1.Secret {
	var out []*corev1.Secret
	for _, ref := range pod.Spec.ImagePullSecrets {
		if s, ok := w.m.cfg.Objects.Secret(pod.Namespace, ref.Name); ok {
			out = append(out, s)
		}
	}
	return out
}
