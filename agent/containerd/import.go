package containerd

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/fsnotify/fsnotify"
	runtimev1 "k8s.io/cri-api/pkg/apis/runtime/v1"

	"timonel/agent/hostile"
	"timonel/internal/durable"
)

// Importer keeps the image archives (*.tar: OCI layout or docker save) of a
// folder imported in containerd.
type Importer struct {
	runtime *Runtime
	dir     string
	record  string
	log     *slog.Logger
	// Load brings one archive in and returns its images' names. It is the runtime's
	// Import, but in tests.
	Load func(ctx context.Context, path string) ([]string, error)
	// Tried is called once every archive that was there at the start was tried.
	Tried func()

	mu    sync.Mutex
	seen  map[string]stamp // by path
	tried bool
}

// stamp tells whether a file is the one that was imported already.
type stamp struct {
	Size    int64     `json:"size"`
	ModTime time.Time `json:"modTime"`
	Images  []string  `json:"images"`
}

// NewImporter returns an importer of dir's archives. It keeps a record, in the
// file of that name, of what it has imported, for the next start.
func NewImporter(r *Runtime, dir, record string, log *slog.Logger) *Importer {
	im := &Importer{runtime: r, dir: dir, record: record, log: log, seen: map[string]stamp{}, tried: dir == ""}
	im.Load = r.Import
	if raw, err := hostile.ReadRegular(record, hostile.MaxOwn); err == nil {
		if err := json.Unmarshal(raw, &im.seen); err != nil {
			im.seen = map[string]stamp{} // imports all again
		}
	}
	return im
}

// Imported says whether an image of that name came from the folder, by this
// importer or one before it: it may be nowhere else.
func (im *Importer) Imported(name string) bool {
	im.mu.Lock()
	defer im.mu.Unlock()
	for _, s := range im.seen {
		if slices.Contains(s.Images, name) {
			return true
		}
	}
	return false
}

// Coming says whether archives that were there at the start have still to be tried, so
// that an image that is nowhere may be on its way.
func (im *Importer) Coming() bool {
	im.mu.Lock()
	defer im.mu.Unlock()
	return !im.tried
}

// done says whether a file is imported and its images are still there.
func (im *Importer) done(ctx context.Context, path string, info fs.FileInfo) bool {
	im.mu.Lock()
	old, ok := im.seen[path]
	im.mu.Unlock()
	if !ok || old.Size != info.Size() || !old.ModTime.Equal(info.ModTime()) {
		return false
	}
	for _, name := range old.Images {
		resp, err := im.runtime.Images.ImageStatus(ctx, &runtimev1.ImageStatusRequest{Image: &runtimev1.ImageSpec{Image: name}})
		if err != nil || resp.Image == nil {
			return false
		}
	}
	return true
}

// ImportAll imports every archive that is new or has changed since this
// importer last saw it. It goes on after a bad file and returns all errors.
func (im *Importer) ImportAll(ctx context.Context) error {
	return im.ImportUntil(ctx, func() bool { return false })
}

// ImportUntil is ImportAll, but that it ends as soon as enough says so, which it asks
// before each archive. The smallest come first.
func (im *Importer) ImportUntil(ctx context.Context, enough func() bool) error {
	paths, err := filepath.Glob(filepath.Join(im.dir, "*.tar"))
	if err != nil {
		return fmt.Errorf("list images in %s: %w", im.dir, err)
	}
	type archive struct {
		path string
		info fs.FileInfo
	}
	var archives []archive
	var errs []error
	for _, path := range paths {
		info, err := stat(path)
		switch {
		case errors.Is(err, fs.ErrNotExist):
		case err != nil:
			errs = append(errs, err)
		default:
			archives = append(archives, archive{path, info})
		}
	}
	slices.SortStableFunc(archives, func(a, b archive) int { return cmp.Compare(a.info.Size(), b.info.Size()) })
	for _, a := range archives {
		if enough() {
			break
		}
		if im.done(ctx, a.path, a.info) {
			continue
		}
		if err := im.load(ctx, a.path, a.info); err != nil {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// load imports one archive and keeps a record of it.
func (im *Importer) load(ctx context.Context, path string, info fs.FileInfo) error {
	names, err := im.Load(ctx, path)
	if err != nil {
		return err
	}
	im.mu.Lock()
	im.seen[path] = stamp{Size: info.Size(), ModTime: info.ModTime(), Images: names}
	raw, err := json.Marshal(im.seen)
	im.mu.Unlock()
	if err != nil {
		return fmt.Errorf("keep a record of imported images: %w", err)
	}
	im.log.Info("imported images", "file", path, "images", strings.Join(names, ","))
	if err := durable.WriteFile(im.record, raw, 0o600); err != nil {
		return fmt.Errorf("keep a record of imported images: %w", err)
	}
	return nil
}

// stat describes an archive. Anything but a regular file is refused, and not
// opened: a FIFO in the folder does not stop the agent.
func stat(path string) (fs.FileInfo, error) {
	f, err := hostile.OpenRegular(path)
	if err != nil {
		return nil, fmt.Errorf("import image: %w", err)
	}
	defer f.Close()
	return f.Stat()
}

// Run imports the archives of the folder, and others as they appear, until ctx ends. An
// archive is read once it has not been written to for a moment. What could not be
// imported is tried again after a while.
func (im *Importer) Run(ctx context.Context) error {
	watcher, err := fsnotify.NewWatcher()
	if err != nil {
		return fmt.Errorf("watch %s: %w", im.dir, err)
	}
	defer watcher.Close()
	if err := watcher.Add(im.dir); err != nil {
		return fmt.Errorf("watch the images folder: %w", err)
	}
	const settle, firstRetry, longestRetry = 500 * time.Millisecond, 10 * time.Second, 5 * time.Minute
	retry := firstRetry
	timer := time.NewTimer(0) // once at once: files may have come before the watch
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case e := <-watcher.Events:
			if strings.HasSuffix(e.Name, ".tar") && e.Op&(fsnotify.Create|fsnotify.Write|fsnotify.Rename) != 0 {
				timer.Reset(settle)
			}
		case err := <-watcher.Errors:
			im.log.Warn("watch the images folder", "folder", im.dir, "error", err)
		case <-timer.C:
			err := im.ImportAll(ctx)
			if ctx.Err() != nil {
				return nil
			}
			im.allTried()
			if err == nil {
				retry = firstRetry
				continue
			}
			im.log.Error("import images", "folder", im.dir, "again in", retry, "error", err)
			timer.Reset(retry)
			retry = min(2*retry, longestRetry)
		}
	}
}

// allTried notes that every archive was tried, and says so once.
func (im *Importer) allTried() {
	im.mu.Lock()
	first := !im.tried
	im.tried = true
	im.mu.Unlock()
	if first && im.Tried != nil {
		im.Tried()
	}
}

// Import reads one archive into containerd, unpacks its images and waits until
// CRI knows them. It returns their names.
func (r *Runtime) Import(ctx context.Context, path string) ([]string, error) {
	f, err := hostile.OpenRegular(path)
	if err != nil {
		return nil, fmt.Errorf("import image: %w", err)
	}
	defer f.Close()
	ctx = namespaces.WithNamespace(ctx, Namespace) // the client's default does not reach all of an import
	imgs, err := r.client.Import(ctx, f, client.WithImageLabels(map[string]string{"io.cri-containerd.image": "managed"}))
	if err != nil {
		return nil, fmt.Errorf("import image %s: %w", path, err)
	}
	if len(imgs) == 0 {
		return nil, fmt.Errorf("import image %s: the archive names no image for this platform", path)
	}
	var names []string
	for _, img := range imgs {
		if err := client.NewImage(r.client, img).Unpack(ctx, snapshotter); err != nil {
			return names, fmt.Errorf("unpack image %s of %s: %w", img.Name, path, err)
		}
		if err := r.waitImage(ctx, img.Name); err != nil {
			return names, err
		}
		names = append(names, img.Name)
	}
	return names, nil
}

// waitImage waits for CRI to have heard of an image that was just imported.
func (r *Runtime) waitImage(ctx context.Context, name string) error {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	for {
		resp, err := r.Images.ImageStatus(ctx, &runtimev1.ImageStatusRequest{Image: &runtimev1.ImageSpec{Image: name}})
		if err == nil && resp.Image != nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("image %s was imported, but CRI does not list it: %w", name, errors.Join(ctx.Err(), err))
		case <-time.After(10 * time.Millisecond):
		}
	}
}
