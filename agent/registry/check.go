package registry

import (
	"context"
	"encoding/json"
	"fmt"
	"sync"
	"sync/atomic"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

const (
	// MaxDocument is how long a manifest, an index or a configuration may be: containerd has
	// them in memory, several times over. It is containerd's own bound of the first.
	MaxDocument = 4 << 20
	// maxDocuments is how many of them one image may lead to: an index may name others.
	maxDocuments = 100
	// maxLayers is more than a file system of layers can be made of.
	maxLayers = 500
	// maxUser is the longest name of a user in a configuration.
	maxUser = 1024
)

// Check wraps the handler of a pull so that what must be small is, before it is fetched.
func Check(provider content.Provider) func(images.Handler) images.Handler {
	var configs sync.Map // digests of what manifests call their configuration, whatever it is
	var documents atomic.Int64
	return func(next images.Handler) images.Handler {
		return images.HandlerFunc(func(ctx context.Context, desc ocispec.Descriptor) ([]ocispec.Descriptor, error) {
			if isDocument(desc) {
				if desc.Size > MaxDocument {
					return nil, tooLong("document", desc)
				}
				if documents.Add(1) > maxDocuments {
					return nil, fmt.Errorf("the image leads to more than %d indexes, manifests and configurations", maxDocuments)
				}
			}
			children, err := next.Handle(ctx, desc)
			if err != nil {
				return children, err
			}
			if images.IsManifestType(desc.MediaType) {
				config, err := checkManifest(ctx, provider, desc)
				configs.Store(config, true)
				return children, err
			}
			if _, ok := configs.Load(desc.Digest); ok {
				return children, checkConfig(ctx, provider, desc)
			}
			return children, nil
		})
	}
}

func isDocument(desc ocispec.Descriptor) bool {
	return images.IsManifestType(desc.MediaType) || images.IsIndexType(desc.MediaType) || images.IsConfigType(desc.MediaType)
}

func tooLong(what string, desc ocispec.Descriptor) error {
	return fmt.Errorf("%s %s of the image (%s) has %d bytes: no more than %d are taken", what, desc.Digest, desc.MediaType, desc.Size, MaxDocument)
}

// checkManifest looks at what a manifest that was fetched leads to, and returns the digest of
// its configuration.
func checkManifest(ctx context.Context, provider content.Provider, desc ocispec.Descriptor) (digest.Digest, error) {
	raw, err := content.ReadBlob(ctx, provider, desc)
	if err != nil {
		return "", fmt.Errorf("read manifest %s: %w", desc.Digest, err)
	}
	var m ocispec.Manifest
	if err := json.Unmarshal(raw, &m); err != nil {
		return "", fmt.Errorf("decode manifest %s: %w", desc.Digest, err)
	}
	if m.Config.Size > MaxDocument {
		return "", tooLong("configuration", m.Config)
	}
	if len(m.Layers) > maxLayers {
		return "", fmt.Errorf("the image has %d layers: no more than %d are taken", len(m.Layers), maxLayers)
	}
	return m.Config.Digest, nil
}

// checkConfig looks at a configuration that was fetched.
func checkConfig(ctx context.Context, provider content.Provider, desc ocispec.Descriptor) error {
	raw, err := content.ReadBlob(ctx, provider, desc)
	if err != nil {
		return fmt.Errorf("read configuration %s: %w", desc.Digest, err)
	}
	var c ocispec.Image
	if err := json.Unmarshal(raw, &c); err != nil {
		return fmt.Errorf("decode configuration %s: %w", desc.Digest, err)
	}
	if len(c.Config.User) > maxUser {
		return fmt.Errorf("the image's configuration has a user whose name has %d bytes: no more than %d are taken", len(c.Config.User), maxUser)
	}
	return nil
}
