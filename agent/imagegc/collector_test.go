package imagegc

import (
	"context"
	"errors"
	"log/slog"
	"slices"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"google.golang.org/grpc"
	runtimev1 "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// node is one whose images are of 100 bytes each, on a file system of 1,000.
type node struct {
	runtimev1.RuntimeServiceClient
	runtimev1.ImageServiceClient
	images     []*runtimev1.Image
	containers []*runtimev1.Container
	stuck      map[string]bool // cannot be removed
	other      int64           // bytes that are no images
	wanted     map[string]bool
	removing   func(id string)
	events     []string
	failing    error
}

func (n *node) ListImages(context.Context, *runtimev1.ListImagesRequest, ...grpc.CallOption) (*runtimev1.ListImagesResponse, error) {
	return &runtimev1.ListImagesResponse{Images: slices.Clone(n.images)}, n.failing
}

func (n *node) ListContainers(context.Context, *runtimev1.ListContainersRequest, ...grpc.CallOption) (*runtimev1.ListContainersResponse, error) {
	return &runtimev1.ListContainersResponse{Containers: n.containers}, nil
}

func (n *node) RemoveImage(_ context.Context, r *runtimev1.RemoveImageRequest, _ ...grpc.CallOption) (*runtimev1.RemoveImageResponse, error) {
	if n.stuck[r.Image.Image] {
		return nil, errors.New("the disk is read-only")
	}
	n.images = slices.DeleteFunc(n.images, func(m *runtimev1.Image) bool { return m.Id == r.Image.Image })
	if n.removing != nil {
		n.removing(r.Image.Image)
	}
	return &runtimev1.RemoveImageResponse{}, nil
}

func (n *node) ids() []string {
	out := []string{}
	for _, m := range n.images {
		out = append(out, m.Id)
	}
	return out
}

func TestCollector(t *testing.T) {
	t.Parallel()
	var all []string
	for _, id := range "abcdefgh" {
		all = append(all, string(id))
	}
	for _, tc := range []struct {
		name   string
		setup  func(n *node)
		unused bool // RemoveUnused, not Collect
		left   []string
		err    string
		events []string
	}{
		{name: "enough room", setup: func(n *node) { n.other = 0 }, left: all},
		// 800 + 100 of 1000 used: 100 to free.
		{name: "one is enough", setup: func(n *node) { n.other = 100 }, left: all[1:]},
		{name: "those in use stay, whatever has them", setup: func(n *node) {
			n.other = 100
			n.containers = []*runtimev1.Container{
				{ImageRef: "a"}, {ImageId: "b"}, {Image: &runtimev1.ImageSpec{Image: "docker.io/library/c:1"}},
				{ImageRef: "d", State: runtimev1.ContainerState_CONTAINER_EXITED},
			}
			n.wanted["docker.io/library/e:1"] = true
			n.images[5].Pinned = true
		}, left: []string{"a", "b", "c", "d", "e", "f", "h"}},
		{name: "what is to be kept stays", setup: func(n *node) {
			n.other, n.images[0].RepoTags = 100, append(n.images[0].RepoTags, "imported")
		}, left: []string{"a", "c", "d", "e", "f", "g", "h"}},
		{name: "a pod comes meanwhile", setup: func(n *node) {
			n.other = 200
			n.removing = func(string) { n.wanted["docker.io/library/b:1"] = true }
		}, left: []string{"b", "d", "e", "f", "g", "h"}},
		{name: "one that cannot be removed", setup: func(n *node) { n.other, n.stuck = 100, map[string]bool{"a": true} },
			left: []string{"a", "c", "d", "e", "f", "g", "h"}, err: "wanted to free 100 bytes, but freed 100 bytes space with errors in image deletion: remove image a"},
		{name: "not enough", setup: func(n *node) { n.other, n.containers = 1000, []*runtimev1.Container{{ImageRef: "h"}} }, left: []string{"h"},
			err: "Insufficient free disk space", events: []string{"Warning FreeDiskSpaceFailed Insufficient free disk space on the node's image filesystem (100% of 1000 B used). " +
				"Failed to free sufficient space by deleting unused images (freed 700 bytes). " +
				"Investigate disk usage, as it could be used by active images, logs, volumes, or other data."}},
		{name: "all that may go", unused: true, setup: func(n *node) { n.containers = []*runtimev1.Container{{ImageRef: "h"}} }, left: []string{"h"}},
		{name: "containerd does not answer", setup: func(n *node) { n.other, n.failing = 100, errors.New("away") }, left: all, err: "list images: away"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			n := &node{wanted: map[string]bool{}}
			for _, id := range all {
				n.images = append(n.images, &runtimev1.Image{Id: id, Size: 100, RepoTags: []string{"docker.io/library/" + id + ":1"}})
			}
			now := time.Unix(1000, 0)
			c := New(Config{
				Images: n, Runtime: n, Policy: Default(), Now: func() time.Time { return now }, Logger: slog.New(slog.DiscardHandler),
				FileSystem: func(context.Context) (FileSystem, error) {
					return FileSystem{Capacity: 1000, Available: 1000 - n.other - 100*int64(len(n.images))}, nil
				},
				Wanted: func() map[string]bool {
					out := map[string]bool{}
					for name := range n.wanted {
						out[name] = true
					}
					return out
				},
				Keep:  func(name string) bool { return name == "imported" },
				Event: func(kind, reason, message string) { n.events = append(n.events, kind+" "+reason+" "+message) },
			})
			require.NoError(t, c.Collect(t.Context()), "nothing is old enough yet, and there is room")
			tc.setup(n)
			now = now.Add(time.Hour)
			run := c.Collect
			if tc.unused {
				run = c.RemoveUnused
			}
			err := run(t.Context())
			if tc.err == "" {
				require.NoError(t, err)
			} else {
				require.ErrorContains(t, err, tc.err)
			}
			require.Equal(t, tc.left, n.ids())
			require.Equal(t, tc.events, n.events)
		})
	}
}

// A failure is told from the second time on.
func TestFailuresAreTold(t *testing.T) {
	t.Parallel()
	n := &node{failing: errors.New("away")}
	events := make(chan string)
	c := New(Config{
		Images: n, Runtime: n, Policy: Default(), Interval: time.Millisecond, Logger: slog.New(slog.DiscardHandler),
		Event: func(kind, reason, message string) { events <- kind + " " + reason + " " + message },
	})
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- c.Run(ctx) }()
	select {
	case e := <-events:
		require.Equal(t, "Warning ImageGCFailed list images: away", e)
	case <-time.After(time.Minute):
		t.Fatal("nothing is told")
	}
	cancel()
	for {
		select {
		case <-events:
		case err := <-done:
			require.NoError(t, err)
			return
		}
	}
}
