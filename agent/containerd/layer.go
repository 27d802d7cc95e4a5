package containerd

import (
	"context"
	"encoding/json"
	"fmt"
	"path/filepath"
	"strings"

	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
)

// Beside returns what a container may write on this machine's disk that is neither in
// its layer nor the agent's: the volumes that its image asks for, and its sandbox's
// resolv.conf and host name.
func (r *Runtime) Beside(ctx context.Context, containerID string) ([]string, error) {
	c, err := r.client.ContainerService().Get(namespaces.WithNamespace(ctx, Namespace), containerID)
	if errdefs.IsNotFound(err) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var spec struct {
		Mounts []struct {
			Source string `json:"source"`
		} `json:"mounts"`
	}
	if c.Spec == nil {
		return nil, nil
	}
	if err := json.Unmarshal(c.Spec.GetValue(), &spec); err != nil {
		return nil, fmt.Errorf("container %s: decode its OCI specification: %w", containerID, err)
	}
	const cri = "/io.containerd.grpc.v1.cri/"
	var out []string
	for _, m := range spec.Mounts {
		if _, rest, ok := strings.Cut(m.Source, cri); ok && filepath.IsAbs(m.Source) &&
			(strings.HasPrefix(rest, "containers/"+containerID+"/volumes/") || isSandboxFile(rest)) {
			out = append(out, filepath.Clean(m.Source))
		}
	}
	return out, nil
}

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

// isSandboxFile says whether that is a file of a sandbox below CRI's folder.
func isSandboxFile(path string) bool {
	parts := strings.Split(path, "/")
	return len(parts) == 3 && parts[0] == "sandboxes" && (parts[2] == "resolv.conf" || parts[2] == "hostname" || parts[2] == "hosts")
}
