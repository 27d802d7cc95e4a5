package containerd

import (
	"context"
	"fmt"
	"slices"

	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/image-spec/identity"
	runtimev1 "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// snapshotter is the one that unpacks images.
const snapshotter = "overlayfs"

// MountView mounts what an image holds on a folder of this machine, to be read only. A
// lease of that key keeps the image's layers, whatever becomes of its name, until
// [Runtime.RemoveView]. It can be called again after it failed, or after this process or
// the machine ended in the middle of it; a view of that key of another image is replaced.
func (r *Runtime) MountView(ctx context.Context, key, image, target string) error {
	ctx = namespaces.WithNamespace(ctx, Namespace)
	if _, err := r.client.LeasesService().Create(ctx, leases.WithID(key)); err != nil && !errdefs.IsAlreadyExists(err) {
		return fmt.Errorf("lease for image %s: %w", image, err)
	}
	ctx = leases.WithLease(ctx, key)
	mounts, err := r.view(ctx, key, image)
	if err != nil {
		return fmt.Errorf("view of image %s: %w", image, err)
	}
	for i := range mounts {
		// An image is anybody's: its devices and its programs of other users mean nothing.
		mounts[i].Options = append(slices.Clone(mounts[i].Options), "ro", "nosuid", "nodev", "noexec")
	}
	if err := mount.All(mounts, target); err != nil {
		return fmt.Errorf("mount image %s on %s: %w", image, target, err)
	}
	return nil
}

// image finds an image by its id. Those that CRI pulled have a name that is their id,
// those that were imported only the names that CRI knows of.
func (r *Runtime) image(ctx context.Context, id string) (client.Image, error) {
	image, err := r.client.GetImage(ctx, id)
	if !errdefs.IsNotFound(err) {
		return image, err
	}
	known, statusErr := r.Images.ImageStatus(ctx, &runtimev1.ImageStatusRequest{Image: &runtimev1.ImageSpec{Image: id}})
	if statusErr != nil {
		return nil, statusErr
	}
	for _, name := range slices.Concat(known.GetImage().GetRepoTags(), known.GetImage().GetRepoDigests()) {
		named, err := r.client.GetImage(ctx, name)
		if err != nil {
			continue // it may just have been removed
		}
		if config, err := named.Config(ctx); err == nil && config.Digest.String() == id {
			return named, nil
		}
	}
	return nil, err
}

// view makes a snapshot of an image's layers that cannot be written to, or finds it.
func (r *Runtime) view(ctx context.Context, key, id string) ([]mount.Mount, error) {
	image, err := r.image(ctx, id)
	if err != nil {
		return nil, err
	}
	layers, err := image.RootFS(ctx)
	if err != nil {
		return nil, err
	}
	parent := identity.ChainID(layers).String()
	all := r.client.SnapshotService(snapshotter)
	if found, err := all.Stat(ctx, key); err == nil {
		if found.Kind == snapshots.KindView && found.Parent == parent {
			return all.Mounts(ctx, key)
		}
		if err := all.Remove(ctx, key); err != nil {
			return nil, err
		}
	} else if !errdefs.IsNotFound(err) {
		return nil, err
	}
	mounts, err := all.View(ctx, key, parent)
	if errdefs.IsNotFound(err) { // it was never unpacked, or its layers went with its last container
		if err := image.Unpack(ctx, snapshotter); err != nil {
			return nil, fmt.Errorf("unpack: %w", err)
		}
		mounts, err = all.View(ctx, key, parent)
	}
	return mounts, err
}

// RemoveView removes what [Runtime.MountView] made, once it is not mounted any more. One
// that is not there is no error.
func (r *Runtime) RemoveView(ctx context.Context, key string) error {
	ctx = namespaces.WithNamespace(ctx, Namespace)
	if err := r.client.SnapshotService(snapshotter).Remove(ctx, key); err != nil && !errdefs.IsNotFound(err) {
		return fmt.Errorf("remove view %s: %w", key, err)
	}
	if err := r.client.LeasesService().Delete(ctx, leases.Lease{ID: key}); err != nil && !errdefs.IsNotFound(err) {
		return fmt.Errorf("delete lease %s: %w", key, err)
	}
	return nil
}
