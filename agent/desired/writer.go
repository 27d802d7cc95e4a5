package desired

import (
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"sync"

	"golang.org/x/sys/unix"
)

const (
	positionFile = "position.json"
	tempSuffix   = ".new"
)

// writer brings changes to disk in the background. Changes of one key that
// follow each other fast are written once. A position is written only after
// all changes before it are on the disk; kept statuses are not worth a sync.
type writer struct {
	dir string
	log *slog.Logger

	mu      sync.Mutex
	cond    *sync.Cond
	pending map[key][]byte // nil value: remove
	pos     []byte         // nil: none waiting
	closing bool
	done    chan struct{}
	err     error
}

func newWriter(dir string, log *slog.Logger) *writer {
	w := &writer{dir: dir, log: log, pending: map[key][]byte{}, done: make(chan struct{})}
	w.cond = sync.NewCond(&w.mu)
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
	w.pending[k] = raw
	w.cond.Signal()
}

func (w *writer) position(raw []byte) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.pos = raw
	w.cond.Signal()
}

// close writes what waits and returns the last error.
func (w *writer) close() error {
	w.mu.Lock()
	w.closing = true
	w.cond.Signal()
	w.mu.Unlock()
	<-w.done
	return w.err
}

func (w *writer) run() {
	defer close(w.done)
	for {
		w.mu.Lock()
		for len(w.pending) == 0 && w.pos == nil && !w.closing {
			w.cond.Wait()
		}
		batch, pos, closing := w.pending, w.pos, w.closing
		w.pending, w.pos = map[key][]byte{}, nil
		w.mu.Unlock()
		if len(batch) == 0 && pos == nil && closing {
			return
		}
		if err := w.flush(batch, pos); err != nil {
			w.err = err
			w.log.Error("write the desired state; a restart would begin from an older one", "folder", w.dir, "error", err)
		}
	}
}

func (w *writer) flush(batch map[key][]byte, pos []byte) error {
	for k, raw := range batch {
		path := filepath.Join(w.dir, string(k))
		if raw == nil {
			if err := os.Remove(path); err != nil && !os.IsNotExist(err) {
				return err
			}
			continue
		}
		if err := writeFile(path, raw, filepath.Dir(string(k)) != "status"); err != nil {
			return err
		}
	}
	if pos == nil {
		return nil
	}
	return writeFile(filepath.Join(w.dir, positionFile), pos, true)
}

// writeFile replaces a file so that a reader sees the old or the new content.
func writeFile(path string, raw []byte, sync bool) error {
	temp := path + tempSuffix
	f, err := os.OpenFile(temp, os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o600)
	if os.IsNotExist(err) {
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			return err
		}
		f, err = os.OpenFile(temp, os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o600)
	}
	if err != nil {
		return err
	}
	_, err = f.Write(raw)
	if err == nil && sync {
		err = unix.Fdatasync(int(f.Fd()))
	}
	if closeErr := f.Close(); err == nil {
		err = closeErr
	}
	if err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	return os.Rename(temp, path)
}
