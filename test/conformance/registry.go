package main

import (
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
)

// nowhere is the host that the suite's images are named after: registries.yaml.
const nowhere = "127.0.0.1:1"

// serveImages serves the images of an archive to agents that pull them although they have
// them, as pods of the policy Always do: at an address, for whoever has configured
// containerd by folder. What is not in the archive is not found.
func serveImages(archive, folder string, at netip.Addr) (stop func() error, err error) {
	blobs := filepath.Join(folder, "blobs")
	if err := errors.Join(os.RemoveAll(blobs), os.MkdirAll(blobs, 0o755)); err != nil {
		return nil, err
	}
	l, err := net.Listen("tcp", netip.AddrPortFrom(at, 0).String())
	if err != nil {
		return nil, fmt.Errorf("serve images: %w", err)
	}
	server := &http.Server{Handler: registry.New(registry.Logger(log.New(io.Discard, "", 0)), registry.WithBlobHandler(registry.NewDiskBlobHandler(blobs)))}
	done := make(chan error, 1)
	go func() { done <- server.Serve(l) }()
	stop = func() error {
		err := errors.Join(server.Close(), os.RemoveAll(blobs))
		if served := <-done; !errors.Is(served, http.ErrServerClosed) {
			err = errors.Join(err, served)
		}
		return err
	}
	if err := push(archive, l.Addr().String()); err != nil {
		return nil, errors.Join(err, stop())
	}
	hosts := filepath.Join(folder, nowhere)
	if err := os.MkdirAll(hosts, 0o755); err != nil {
		return nil, errors.Join(err, stop())
	}
	config := fmt.Sprintf("server = \"http://%[1]s\"\n[host.\"http://%[1]s\"]\ncapabilities = [\"pull\", \"resolve\"]\n", l.Addr())
	if err := os.WriteFile(filepath.Join(hosts, "hosts.toml"), []byte(config), 0o644); err != nil {
		return nil, errors.Join(err, stop())
	}
	return stop, nil
}

// push puts the images of an archive into a registry.
func push(archive, host string) error {
	open := func() (io.ReadCloser, error) { return os.Open(archive) }
	manifest, err := tarball.LoadManifest(open)
	if err != nil {
		return fmt.Errorf("images of %s: %w", archive, err)
	}
	for _, d := range manifest {
		for _, text := range d.RepoTags {
			tag, err := name.NewTag(text)
			if err != nil {
				return fmt.Errorf("image %q of %s: %w", text, archive, err)
			}
			image, err := tarball.Image(open, &tag)
			if err != nil {
				return fmt.Errorf("image %s of %s: %w", text, archive, err)
			}
			to, err := name.NewTag(host+"/"+tag.RepositoryStr()+":"+tag.TagStr(), name.Insecure)
			if err != nil {
				return fmt.Errorf("image %s of %s: %w", text, archive, err)
			}
			if err := remote.Write(to, image); err != nil {
				return fmt.Errorf("put image %s of %s into a registry: %w", text, archive, err)
			}
		}
	}
	return nil
}
