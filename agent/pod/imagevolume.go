package pod

import (
	"fmt"
	"slices"

	corev1 "k8s.io/api/core/v1"
	runtimev1 "k8s.io/cri-api/pkg/apis/runtime/v1"

	"timonel/agent/image"
)

// imageVolumes has the images mounted that are volumes of a container: pulled as their
// policies say, by the pod's secrets, and each once in the life of the pod. It says what
// is so of the first that is not there.
func (w *worker) imageVolumes(pod *corev1.Pod, c *corev1.Container, box *runtimev1.PodSandboxConfig) (image.Result, error) {
	for i := range pod.Spec.Volumes {
		v := &pod.Spec.Volumes[i]
		if v.Image == nil || !slices.ContainsFunc(c.VolumeMounts, func(m corev1.VolumeMount) bool { return m.Name == v.Name }) {
			continue
		}
		has, err := w.m.volumes.HasImage(pod, v.Name)
		if err != nil {
			return image.Result{}, err
		}
		if has {
			continue
		}
		// No container is called so.
		res := w.ensureImage(pod, &corev1.Container{Name: "volume/" + v.Name, Image: v.Image.Reference, ImagePullPolicy: v.Image.PullPolicy}, box, "")
		if res.State == image.Failed && res.Reason != image.ReasonPull { // which was told when it failed
			w.eventOnce(pod, corev1.EventTypeWarning, "Failed", "Error: "+res.Reason, c.Name)
		}
		if res.State != image.Ready {
			return res, nil
		}
		if err := w.m.volumes.MountImage(w.ctx, pod, v.Name, res.ID); err != nil {
			return image.Result{}, fmt.Errorf("ImageVolumeMountFailed: volume %q: %s", v.Name, rpcText(err))
		}
	}
	return image.Result{State: image.Ready}, nil
}
