package containerd

import (
	"context"
	"strings"

	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
)

// Layer returns the folder of a container's writable layer on this machine, ""
// when its snapshotter has none (only overlayfs has) or the container is gone.
func (r *Runtime) Layer(ctx context.Context, containerID string) (string, error) {
	ctx = namespaces.WithNamespace(ctx, Namespace)
	c, err := r.client.ContainerService().Get(ctx, containerID)
	if errdefs.IsNotFound(err) {
		return "", nil
	}
	if err != nil {
		return "", err
	}
	if c.Snapshotter == "" || c.SnapshotKey == "" {
		return "", nil
	}
	mounts, err := r.client.SnapshotService(c.Snapshotter).Mounts(ctx, c.SnapshotKey)
	if errdefs.IsNotFound(err) {
		return "", nil
	}
	if err != nil {
		return "", err
	}
	for _, m := range mounts {
		for _, option := range m.Options {
			if dir, ok := strings.CutPrefix(option, "upperdir="); ok {
				return dir, nil
			}
		}
	}
	return "", nil
}
