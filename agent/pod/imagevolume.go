package pod

import (
	"fmt"
	"slices"

	corev1 "k8s.io/api/core/v1"
	runtimev1 "k8s.io/cri-api/pkg/apis/runtime/v1"

	"timonel/agent/image"
)

// imageVolumes has the images mounted that are volumes of a container: pulled as their
// policies say, by the pod's secrets, and each once in the life of the pod. It says
// whether the container may start; why it may not, if there is more to say than that an
// image is coming.
func (w *worker) imageVolumes(pod *corev1.Pod, c *corev1.Container, box *runtimev1.PodSandboxConfig) (ready bool, why waiting) {
	for i := range pod.Spec.Volumes {
		v := &pod.Spec.Volumes[i]
		if v.Image == nil || !slices.ContainsFunc(c.VolumeMounts, func(m corev1.VolumeMount) bool { return m.Name == v.Name }) {
			continue
		}
		has, err := w.m.volumes.HasImage(pod, v.Name)
		if err != nil {
			return false, waiting{reasonCreateError, err.Error()}
		}
		if has {
			continue
		}
		w.setImageWait() // before it is looked for, as with a container's own
		res := w.m.images.Ensure(w.ctx, image.Request{
			Pod: pod, Secrets: w.pullSecrets(pod), Sandbox: box, Changed: w.wakeUp,
			// No container is called so.
			Container: &corev1.Container{Name: "volume/" + v.Name, Image: v.Image.Reference, ImagePullPolicy: v.Image.PullPolicy},
			Event:     func(kind, reason, message string) { w.eventOnce(pod, kind, reason, message, "") },
		})
		switch res.State {
		case image.Pulling:
			return false, waiting{}
		case image.Failed:
			if !res.Retry.IsZero() {
				w.again(res.Retry)
			}
			if res.Reason != image.ReasonPull { // which was told when it failed
				w.eventOnce(pod, corev1.EventTypeWarning, "Failed", "Error: "+res.Reason, c.Name)
			}
			return false, waiting{res.Reason, res.Message}
		}
		if err := w.m.volumes.MountImage(w.ctx, pod, v.Name, res.ID); err != nil {
			return false, waiting{reasonCreateError, fmt.Sprintf("ImageVolumeMountFailed: volume %q: %s", v.Name, rpcText(err))}
		}
	}
	return true, waiting{}
}
