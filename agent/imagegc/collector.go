package imagegc

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"slices"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	runtimev1 "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// Interval is how often the file system is looked at, as upstream's.
const Interval = 5 * time.Minute

// Reasons of events about the node, as the kubelet's.
const (
	ReasonFreeDiskSpaceFailed = "FreeDiskSpaceFailed"
	ReasonImageGCFailed       = "ImageGCFailed"
	ReasonInvalidDiskCapacity = "InvalidDiskCapacity"
)

// Config is what a collector works with.
type Config struct {
	Images  runtimev1.ImageServiceClient
	Runtime runtimev1.RuntimeServiceClient
	Policy  Policy
	// FileSystem looks at the images' file system.
	FileSystem func(context.Context) (FileSystem, error)
	// Wanted are the full names of the images that pods of this node name.
	Wanted func() map[string]bool
	// Keep says whether an image of that name is never removed.
	Keep func(name string) bool
	// Event tells the cluster about the node.
	Event func(eventType, reason, message string)
	// Interval is how often it looks. Default: Interval.
	Interval time.Duration
	Now      func() time.Time
	Logger   *slog.Logger
}

// Collector removes images of one node.
type Collector struct {
	cfg Config
	log *slog.Logger

	mu      sync.Mutex // of one removal at a time
	records Records
}

// New returns a collector that does nothing until Run.
func New(cfg Config) *Collector {
	if cfg.Interval == 0 {
		cfg.Interval = Interval
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	return &Collector{cfg: cfg, log: cfg.Logger.With("component", "images"), records: Records{}}
}

// Run looks at once and then again and again, until ctx ends.
func (c *Collector) Run(ctx context.Context) error {
	timer := time.NewTimer(0)
	defer timer.Stop()
	failures := 0
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-timer.C:
		}
		err := c.Collect(ctx)
		switch {
		case ctx.Err() != nil:
		case err == nil:
			failures = 0
		default:
			failures++
			c.log.Warn("collect images", "error", err)
			if failures > 1 { // containerd may just be starting
				c.cfg.Event(corev1.EventTypeWarning, ReasonImageGCFailed, err.Error())
			}
		}
		timer.Reset(c.cfg.Interval)
	}
}

// Collect removes images until the file system is below the low threshold, if it
// is above the high one. It is an error when there are not enough.
func (c *Collector) Collect(ctx context.Context) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	images, err := c.look(ctx) // also when nothing is to be removed: it learns what is in use
	if err != nil {
		return err
	}
	if c.cfg.Policy.High >= 100 {
		return nil
	}
	fs, err := c.cfg.FileSystem(ctx)
	if err != nil {
		return fmt.Errorf("look at the file system of images: %w", err)
	}
	if fs.Capacity <= 0 {
		err := errors.New("invalid capacity 0 on image filesystem")
		c.cfg.Event(corev1.EventTypeWarning, ReasonInvalidDiskCapacity, err.Error())
		return err
	}
	excess := c.cfg.Policy.Excess(fs)
	if excess == 0 {
		return nil
	}
	c.log.Info("the file system of images is over the high threshold", "used", fs.Used(), "high", c.cfg.Policy.High, "free", excess)
	freed, err := c.remove(ctx, images, excess)
	if err != nil {
		return fmt.Errorf("wanted to free %d bytes, but freed %d bytes space with errors in image deletion: %w", excess, freed, err)
	}
	if freed < excess {
		message := fmt.Sprintf("Insufficient free disk space on the node's image filesystem (%d%% of %s used). "+
			"Failed to free sufficient space by deleting unused images (freed %d bytes). "+
			"Investigate disk usage, as it could be used by active images, logs, volumes, or other data.",
			fs.Used(), size(fs.Capacity), freed)
		c.cfg.Event(corev1.EventTypeWarning, ReasonFreeDiskSpaceFailed, message)
		return errors.New(message)
	}
	return nil
}

// RemoveUnused removes all images that may be removed, however full the file
// system is.
func (c *Collector) RemoveUnused(ctx context.Context) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	images, err := c.look(ctx)
	if err != nil {
		return err
	}
	_, err = c.remove(ctx, images, math.MaxInt64)
	return err
}

// remove removes images until that many bytes are freed, and returns how many
// were. It goes on after one that cannot be removed.
func (c *Collector) remove(ctx context.Context, images []Image, bytes int64) (freed int64, err error) {
	var errs []error
	for _, m := range c.records.Candidates(images, c.cfg.Policy, c.cfg.Now()) {
		if freed >= bytes || ctx.Err() != nil {
			break
		}
		// A pod may have come since.
		if wanted := c.cfg.Wanted(); slices.ContainsFunc(m.Names, func(n string) bool { return wanted[n] }) {
			continue
		}
		if _, err := c.cfg.Images.RemoveImage(ctx, &runtimev1.RemoveImageRequest{Image: &runtimev1.ImageSpec{Image: m.ID}}); err != nil {
			errs = append(errs, fmt.Errorf("remove image %s: %w", m.ID, err))
			continue
		}
		c.log.Info("removed an image that no pod uses", "image", m.ID, "names", m.Names, "bytes", m.Size)
		delete(c.records, m.ID)
		freed += m.Size
	}
	return freed, errors.Join(errs...)
}

// look sees which images there are and which are in use.
func (c *Collector) look(ctx context.Context) ([]Image, error) {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Minute)
	defer cancel()
	// Images before containers: what a container begins to use in between is seen.
	list, err := c.cfg.Images.ListImages(ctx, &runtimev1.ListImagesRequest{})
	if err != nil {
		return nil, fmt.Errorf("list images: %w", err)
	}
	containers, err := c.cfg.Runtime.ListContainers(ctx, &runtimev1.ListContainersRequest{})
	if err != nil {
		return nil, fmt.Errorf("list containers: %w", err)
	}
	used := c.cfg.Wanted()
	for _, ct := range containers.Containers {
		used[ct.ImageRef], used[ct.ImageId], used[ct.GetImage().GetImage()] = true, true, true
	}
	images := make([]Image, 0, len(list.Images))
	for _, m := range list.Images {
		image := Image{ID: m.Id, Names: slices.Concat(m.RepoTags, m.RepoDigests), Size: int64(min(m.Size, math.MaxInt64)), Pinned: m.Pinned}
		image.Used = used[m.Id] || slices.ContainsFunc(image.Names, func(n string) bool { return used[n] || c.cfg.Keep(n) })
		images = append(images, image)
	}
	c.records.See(images, c.cfg.Now())
	return images, nil
}

// size is a number of bytes for a person.
func size(n int64) string {
	const step = 1024
	if n < step {
		return fmt.Sprintf("%d B", n)
	}
	f, unit := float64(n)/step, 0
	for ; f >= step && unit < 3; unit++ {
		f /= step
	}
	return fmt.Sprintf("%.1f %ciB", f, "KMGT"[unit])
}
