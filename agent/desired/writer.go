package desired

import (
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

const (
	positionFile = "position.json"
	// newDir holds what is being written, apart from where names are objects'.
	newDir  = "new"
	newFile = "file"
	// A write that failed is tried again after firstRetry, then after twice as long
	// each time, up to lastRetry.
	firstRetry, lastRetry = 100 * time.Millisecond, 15 * time.Second
)

// disk is what the writer does to files; paths are below the store's folder.
type disk interface {
	// replace writes a file so that a reader, also one after a crash, sees the old
	// or the new content. durable waits until the content is on the disk; that it is
	// there by this name needs syncDir.
	replace(path string, raw []byte, durable bool) error
	remove(path string) error
	syncDir(path string) error
}

// writer brings changes to disk in the background. Changes of one key that follow
// each other fast are written once. What failed is put back and tried again until
// it is done, and a position is written only after all changes before it are on
// the disk. Kept statuses are not worth a sync.
type writer struct {
	dir  string
	disk disk
	log  *slog.Logger

	mu       sync.Mutex
	wake     chan struct{}
	pending  map[key][]byte // nil value: remove
	pos      []byte         // nil: none waiting
	stored   map[key]bool   // what may be on the disk
	writing  map[key][]byte // the batch being written
	closing  chan struct{}
	closed   sync.Once
	done     chan struct{}
	err      error // of the last attempt, nil when all is written
	attempts int   // that failed in a row
}

func newWriter(dir string, found []key, log *slog.Logger) (*writer, error) {
	if err := os.RemoveAll(filepath.Join(dir, newDir)); err != nil {
		return nil, fmt.Errorf("remove what an earlier agent was writing: %w", err)
	}
	w := startWriter(dir, found, files{dir}, log)
	return w, nil
}

func startWriter(dir string, found []key, d disk, log *slog.Logger) *writer {
	w := &writer{
		dir: dir, disk: d, log: log, wake: make(chan struct{}, 1), pending: map[key][]byte{}, stored: map[key]bool{},
		closing: make(chan struct{}), done: make(chan struct{}),
	}
	for _, k := range found {
		w.stored[k] = true
	}
	go w.run()
	return w
}

func (w *writer) put(k key, raw []byte) {
	if raw == nil {
		raw = []byte{}
	}
	w.change(k, raw)
}

func (w *writer) remove(k key) { w.change(k, nil) }

func (w *writer) change(k key, raw []byte) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if _, busy := w.writing[k]; raw == nil && !w.stored[k] && !busy {
		// It never came to the disk: while that fails, what comes and goes is not
		// remembered for ever.
		delete(w.pending, k)
		return
	}
	w.pending[k] = raw
	w.signal()
}

func (w *writer) position(raw []byte) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.pos = raw
	w.signal()
}

func (w *writer) signal() {
	select {
	case w.wake <- struct{}{}:
	default:
	}
}

// close writes what waits, once, and returns why that failed.
func (w *writer) close() error {
	w.closed.Do(func() { close(w.closing) })
	<-w.done
	return w.err
}

func (w *writer) run() {
	defer close(w.done)
	retry := time.NewTimer(0)
	defer retry.Stop()
	for {
		last := false
		select {
		case <-w.closing:
			last = true
		case <-retry.C:
		case <-w.wake:
			if w.attempts > 0 {
				continue // the retry takes what came meanwhile along
			}
		}
		if w.flush() {
			retry.Reset(min(firstRetry<<min(w.attempts-1, 10), lastRetry))
		}
		if last {
			return
		}
	}
}

// flush writes what waits. It says whether to try again: then what failed waits
// again, unless something newer of its key does, and so does the position.
func (w *writer) flush() (again bool) {
	w.mu.Lock()
	w.writing, w.pending = w.pending, map[key][]byte{}
	pos := w.pos
	w.pos = nil
	batch := w.writing
	w.mu.Unlock()

	failed, errs := map[key][]byte{}, []error(nil)
	touched, written := map[string][]key{}, map[key]bool{}
	for k, raw := range batch {
		if err := w.write(k, raw); err != nil {
			failed[k] = raw
			errs = append(errs, err)
			continue
		}
		written[k] = raw != nil
		if durable(k) {
			parent := filepath.Dir(string(k))
			touched[parent] = append(touched[parent], k)
		}
	}
	for parent, keys := range touched {
		if err := w.disk.syncDir(parent); err != nil {
			errs = append(errs, err)
			for _, k := range keys {
				failed[k] = batch[k]
			}
		}
	}
	if pos != nil && len(errs) == 0 {
		err := w.disk.replace(positionFile, pos, true)
		if err == nil {
			err = w.disk.syncDir(".")
		}
		if err != nil {
			errs = append(errs, err)
		} else {
			pos = nil
		}
	}

	w.mu.Lock()
	defer w.mu.Unlock()
	for k, raw := range batch {
		if _, bad := failed[k]; raw == nil && !bad {
			delete(w.stored, k)
		} else if written[k] { // if its folder could not be synced, too
			w.stored[k] = true
		}
	}
	for k, raw := range failed {
		if _, newer := w.pending[k]; newer {
			continue
		}
		w.pending[k] = raw
	}
	maps.DeleteFunc(w.pending, func(k key, raw []byte) bool { // removed while it could not be written
		_, bad := failed[k]
		return raw == nil && bad && batch[k] != nil && !w.stored[k]
	})
	w.writing = nil
	if w.pos == nil {
		w.pos = pos
	}
	err := errors.Join(errs...)
	switch {
	case err != nil && w.attempts == 0:
		w.log.Error("write the desired state; trying again, and until then a restart of a node that is cut off would begin from an older one",
			"folder", w.dir, "waiting", len(w.pending), "error", errs[0])
	case err == nil && w.attempts > 0:
		w.log.Info("the desired state can be written again", "folder", w.dir, "attempts", w.attempts)
	}
	w.err = err
	if err == nil {
		w.attempts = 0
		return false
	}
	w.attempts++
	return true
}

func (w *writer) write(k key, raw []byte) error {
	if raw == nil {
		return w.disk.remove(string(k))
	}
	return w.disk.replace(string(k), raw, durable(k))
}

// durable says whether a key is worth a sync.
func durable(k key) bool { return filepath.Dir(string(k)) != "status" }

// files is the real disk.
type files struct{ dir string }

func (f files) replace(path string, raw []byte, durable bool) error {
	path = filepath.Join(f.dir, path)
	// Not beside it: "x.new" may be another object's name, and the longest name
	// there is has no room for more.
	temp := filepath.Join(f.dir, newDir, newFile)
	for _, parent := range []string{filepath.Dir(temp), filepath.Dir(path)} {
		if err := os.MkdirAll(parent, 0o700); err != nil {
			return err
		}
	}
	file, err := os.OpenFile(temp, os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	_, err = file.Write(raw)
	if err == nil && durable {
		err = unix.Fdatasync(int(file.Fd()))
	}
	if closeErr := file.Close(); err == nil {
		err = closeErr
	}
	if err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	err = os.Rename(temp, path)
	if errors.Is(err, unix.EISDIR) || errors.Is(err, unix.ENOTEMPTY) || errors.Is(err, fs.ErrExist) {
		if err := os.RemoveAll(path); err != nil {
			return err
		}
		err = os.Rename(temp, path)
	}
	return err
}

func (f files) remove(path string) error {
	err := os.Remove(filepath.Join(f.dir, path))
	if errors.Is(err, unix.ENOTEMPTY) || errors.Is(err, fs.ErrExist) {
		err = os.RemoveAll(filepath.Join(f.dir, path))
	}
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENOTDIR) {
		return nil
	}
	return err
}

func (f files) syncDir(path string) error {
	d, err := os.Open(filepath.Join(f.dir, path))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer d.Close()
	if err := d.Sync(); err != nil {
		return fmt.Errorf("sync folder %s: %w", d.Name(), err)
	}
	return nil
}
