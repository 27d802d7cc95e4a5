package agent

import (
	"context"
	"errors"
	"fmt"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"
	runtimev1 "k8s.io/cri-api/pkg/apis/runtime/v1"

	"timonel/agent/eviction"
	"timonel/agent/image"
	"timonel/agent/imagegc"
	"timonel/agent/node"
)

// imageFileSystem is where containerd keeps images and containers' layers.
func (a *Agent) imageFileSystem(ctx context.Context) (node.FileSystem, error) {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	resp, err := a.runtime.Images.ImageFsInfo(ctx, &runtimev1.ImageFsInfoRequest{})
	if err != nil {
		return node.FileSystem{}, fmt.Errorf("ask containerd where its images are: %w", err)
	}
	for _, f := range resp.ImageFilesystems {
		if at := f.GetFsId().GetMountpoint(); at != "" {
			return node.FileSystemOf(at)
		}
	}
	return node.FileSystem{}, errors.New("containerd does not say where its images are")
}

// newImageGC makes what removes images that no pod uses.
func (a *Agent) newImageGC() *imagegc.Collector {
	pause, err := image.Normalize(a.cfg.PauseImage)
	if err != nil {
		pause = a.cfg.PauseImage
	}
	return imagegc.New(imagegc.Config{
		Images: a.runtime.Images, Runtime: a.runtime, Policy: *a.cfg.ImageGC, Interval: a.cfg.ImageGCInterval,
		FileSystem: func(ctx context.Context) (imagegc.FileSystem, error) {
			fs, err := a.imageFileSystem(ctx)
			return imagegc.FileSystem{Capacity: fs.Capacity, Available: fs.Available}, err
		},
		Wanted: a.wantedImages,
		Keep:   func(name string) bool { return name == pause || a.images.Imported(name) },
		Event:  a.nodeEvent, Logger: a.log,
	})
}

// Images are pulled as long as there is so much of their file system left. Eviction and the
// removal of unused images begin long before; what this stops is an image that becomes
// larger than the disk while it is unpacked.
const (
	leastImageRoom = 1 << 30 // bytes, or
	leastImagePart = 3       // percent of all, or of inodes, whichever is less
)

// imagesFull says why no image is to be pulled.
func (a *Agent) imagesFull() error {
	ctx, cancel := context.WithTimeout(context.Background(), imagesFullWait)
	defer cancel()
	fs, err := a.imageFileSystem(ctx)
	if err != nil {
		return nil // not known: as before there was a bound
	}
	return checkImageRoom(fs)
}

// imagesFullWait is how long containerd may take to say where its images are.
const imagesFullWait = 5 * time.Second

func checkImageRoom(fs node.FileSystem) error {
	if least := min(leastImageRoom, fs.Capacity/100*leastImagePart); fs.Available < least {
		return fmt.Errorf("the node's disk for images has %d MiB left, and no image is pulled below %d MiB", fs.Available>>20, least>>20)
	}
	if least := fs.Inodes / 100 * leastImagePart; fs.InodesFree < least {
		return fmt.Errorf("the node's disk for images has %d inodes left, and no image is pulled below %d", fs.InodesFree, least)
	}
	return nil
}

// wantedImages are those that pods of this node name, by their full names.
func (a *Agent) wantedImages() map[string]bool {
	out := map[string]bool{}
	for _, pod := range a.pods.Active() {
		for i := range pod.Spec.Volumes {
			if v := pod.Spec.Volumes[i].Image; v != nil {
				if name, err := image.Normalize(v.Reference); err == nil {
					out[name] = true
				}
			}
		}
		for _, list := range [][]corev1.Container{pod.Spec.InitContainers, pod.Spec.Containers} {
			for i := range list {
				if name, err := image.Normalize(list[i].Image); err == nil {
					out[name] = true
				}
			}
		}
		for i := range pod.Spec.EphemeralContainers {
			if name, err := image.Normalize(pod.Spec.EphemeralContainers[i].Image); err == nil {
				out[name] = true
			}
		}
	}
	return out
}

// nodeRoom is what package eviction knows of this machine.
type nodeRoom struct{ a *Agent }

func (n nodeRoom) Observe(ctx context.Context) (eviction.Observations, bool) {
	seen := eviction.Observations{}
	warn := func(err error) {
		if ctx.Err() == nil {
			n.a.log.Warn("see how much of something is left; it counts as enough", "error", err)
		}
	}
	if total, available, err := node.Memory(); err == nil {
		seen[eviction.MemoryAvailable] = eviction.Observation{Available: available, Capacity: total}
	} else {
		warn(err)
	}
	if most, used, err := node.Pids(); err == nil {
		seen[eviction.PIDAvailable] = eviction.Observation{Available: most - used, Capacity: most}
	} else {
		warn(err)
	}
	room := func(fs node.FileSystem, bytes, inodes eviction.Signal) {
		if fs.Capacity > 0 {
			seen[bytes] = eviction.Observation{Available: fs.Available, Capacity: fs.Capacity}
		}
		if fs.Inodes > 0 {
			seen[inodes] = eviction.Observation{Available: fs.InodesFree, Capacity: fs.Inodes}
		}
	}
	own, err := node.FileSystemOf(n.a.cfg.DataDir)
	if err == nil {
		room(own, eviction.NodeFsAvailable, eviction.NodeFsInodesFree)
	} else {
		warn(err)
	}
	images, imagesErr := n.a.imageFileSystem(ctx)
	if imagesErr == nil {
		room(images, eviction.ImageFsAvailable, eviction.ImageFsInodesFree)
	} else {
		warn(imagesErr)
	}
	return seen, err == nil && imagesErr == nil && own.Device != images.Device
}

func (n nodeRoom) RemoveImages(ctx context.Context) error { return n.a.imageGC.RemoveUnused(ctx) }

func (n nodeRoom) Changed() { n.a.kick() }

func (n nodeRoom) Event(eventType, reason, message string) { n.a.nodeEvent(eventType, reason, message) }

// nodeEvent tells the cluster about this node.
func (a *Agent) nodeEvent(eventType, reason, message string) {
	a.event(corev1.ObjectReference{Kind: "Node", APIVersion: "v1", Name: a.cfg.Name, UID: types.UID(a.cfg.Name)}, eventType, reason, message)
}
