package containerd

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/distribution/reference"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtimev1 "k8s.io/cri-api/pkg/apis/runtime/v1"

	"timonel/agent/registry"
)

// managed marks an image for containerd's CRI.
var managed = map[string]string{"io.cri-containerd.image": "managed"}

// maxDownloads is how many layers of an image are fetched at a time, as containerd's CRI does.
const maxDownloads = 3

// puller is CRI's image service, but that it does not pull: containerd's reads what a
// registry sends as it likes, whole and of any length, in the process that all pods of the
// node need. What registries say is read here, through the bounds of package registry, and
// containerd is given what is content.
type puller struct {
	runtimev1.ImageServiceClient
	runtime *Runtime
	hosts   string
}

// PullFrom has images pulled with the hosts that dir configures. Call it once, before use.
func (r *Runtime) PullFrom(dir string) {
	r.Images = &puller{ImageServiceClient: r.Images, runtime: r, hosts: dir}
}

// PullImage implements runtimev1.ImageServiceClient. Errors read as those of containerd's.
func (p *puller) PullImage(ctx context.Context, req *runtimev1.PullImageRequest, _ ...grpc.CallOption) (*runtimev1.PullImageResponse, error) {
	named, err := reference.ParseDockerRef(req.GetImage().GetImage())
	if err != nil {
		return nil, status.Errorf(codes.InvalidArgument, "failed to parse image reference %q: %v", req.GetImage().GetImage(), err)
	}
	id, err := p.pull(ctx, named, req.GetAuth())
	if err != nil {
		return nil, fmt.Errorf("failed to pull and unpack image %q: %w", named, err)
	}
	return &runtimev1.PullImageResponse{ImageRef: id}, nil
}

func (p *puller) pull(ctx context.Context, named reference.Named, auth *runtimev1.AuthConfig) (id string, err error) {
	user, secret, err := registry.Credentials(auth)
	if err != nil {
		return "", err
	}
	resolver := registry.New(registry.Config{HostsDir: p.hosts, User: user, Secret: secret})
	defer resolver.Close()
	ctx = registry.Quiet(namespaces.WithNamespace(ctx, Namespace))
	c := p.runtime.client
	ctx, done, err := c.WithLease(ctx)
	if err != nil {
		return "", err
	}
	defer func() { err = errors.Join(err, ignoreNotFound(done(context.WithoutCancel(ctx)))) }()
	content := c.ContentStore()
	image, err := c.Pull(ctx, named.String(),
		client.WithResolver(resolver), client.WithImageHandlerWrapper(registry.Check(content)),
		client.WithPullLabels(managed), client.WithMaxConcurrentDownloads(maxDownloads),
		client.WithPullUnpack, client.WithPullSnapshotter(snapshotter))
	if err != nil {
		return "", err
	}
	config, err := image.Config(ctx)
	if err != nil {
		return "", fmt.Errorf("configuration of the image: %w", err)
	}
	id = config.Digest.String()
	// By these names CRI knows it beside its own.
	names := []string{id}
	if _, ok := named.(reference.Tagged); ok {
		names = append(names, reference.TrimNamed(named).Name()+"@"+image.Target().Digest.String())
	}
	for _, name := range names {
		if err := p.name(ctx, name, image.Target()); err != nil {
			return "", fmt.Errorf("name the image %s: %w", name, err)
		}
	}
	return id, p.wait(ctx, named.String(), id)
}

func ignoreNotFound(err error) error {
	if errdefs.IsNotFound(err) {
		return nil
	}
	return err
}

// name makes a name lead to an image.
func (p *puller) name(ctx context.Context, name string, target ocispec.Descriptor) error {
	store, image := p.runtime.client.ImageService(), images.Image{Name: name, Target: target, Labels: managed}
	_, err := store.Create(ctx, image)
	if errdefs.IsAlreadyExists(err) {
		_, err = store.Update(ctx, image, "target", "labels")
	}
	return err
}

// wait waits for CRI to have heard that a name leads to an image.
func (p *puller) wait(ctx context.Context, name, id string) error {
	ctx, cancel := context.WithTimeoutCause(ctx, 10*time.Second, fmt.Errorf("image %s was pulled, but CRI does not list it as %s", name, id))
	defer cancel()
	for {
		resp, err := p.ImageStatus(ctx, &runtimev1.ImageStatusRequest{Image: &runtimev1.ImageSpec{Image: name}})
		if err == nil && resp.GetImage().GetId() == id {
			return nil
		}
		select {
		case <-ctx.Done():
			return errors.Join(context.Cause(ctx), err)
		case <-time.After(10 * time.Millisecond):
		}
	}
}
