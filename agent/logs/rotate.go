package logs

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"
	runtimev1 "k8s.io/cri-api/pkg/apis/runtime/v1"

	"timonel/agent/hostile"
)

// reopenTimeout is for how long containerd may take to open a log anew.
const reopenTimeout = 20 * time.Second

// log is one container's log: of all that rotate it and read it there is one.
type log struct {
	s    *Logs
	rel  string // below Config.Dir
	refs int    // s.mu guards it

	// step is held by who moves, cuts or removes files. It is taken before mu.
	step sync.Mutex
	seen file // what N.log was when last looked at; step guards it

	mu      sync.Mutex
	making  string               // key of the file that is being compressed
	seq     int64                // how often it was rotated since this was made
	older   []generation         // what was rotated since then and is there, oldest first
	readers map[*source]struct{} // who has one of the files open
	rotated chan struct{}        // closed and replaced at each rotation
	ended   <-chan struct{}      // closed when the container has ended; nil: not known
}

// generation is one rotated file of a log, by its place in the order.
type generation struct {
	seq int64
	key string
}

// file tells one file from another that has its name.
type file struct {
	dev, ino uint64
}

func fileOf(st *unix.Stat_t) file { return file{uint64(st.Dev), st.Ino} }

func (l *log) base() string { return filepath.Base(l.rel) }

// open opens the folder that the log is in.
func (l *log) open() (*hostile.Root, error) {
	root, err := hostile.OpenRoot(l.s.cfg.Dir)
	if err != nil {
		return nil, err
	}
	defer root.Close()
	return root.OpenRoot(filepath.Dir(l.rel))
}

// ignoreMissing is nil for what is not there: it went with its pod, or is gone meanwhile.
func ignoreMissing(err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

// list finds the rotated files. l.step is held.
func (l *log) list(ctx context.Context, dir *hostile.Root) []kept {
	l.mu.Lock()
	making := l.making
	l.mu.Unlock()
	have, err := list(ctx, dir, l.base(), making)
	if err != nil && ctx.Err() == nil {
		l.s.warn(l.rel, "tidy the rotated files of a log", err)
	}
	return have
}

// rotate moves what was written aside and has containerd begin a new file. size
// is how much it is. Of the older ones as many stay as there is room for.
func (l *log) rotate(ctx context.Context, dir *hostile.Root, id string, size int64) error {
	have := l.makeRoom(ctx, dir, l.list(ctx, dir), l.s.cfg.MaxFiles-2, l.s.cfg.room()-size)
	last := ""
	if len(have) > 0 {
		last = have[len(have)-1].key
	}
	key, err := l.moveAside(dir, last)
	if err != nil {
		return err
	}
	if err := l.reopen(ctx, id); err != nil {
		// The name is not left empty: who reads the log finds it, and should
		// containerd open it later all the same, it goes on in the same file.
		if back := dir.RenameNew(l.base()+"."+key, l.base()); back != nil && !errors.Is(back, fs.ErrExist) {
			return errors.Join(err, back)
		} else if back == nil {
			return err
		}
		// It did open it.
	}
	l.mu.Lock()
	l.older = slices.DeleteFunc(l.older, func(g generation) bool { // removed by somebody else
		return !slices.ContainsFunc(have, func(k kept) bool { return k.key == g.key })
	})
	l.older = append(l.older, generation{l.seq, key})
	l.seq++
	close(l.rotated)
	l.rotated = make(chan struct{})
	l.mu.Unlock()
	return nil
}

// moveAside renames the log to the next free name.
func (l *log) moveAside(dir *hostile.Root, last string) (key string, err error) {
	key = last
	for range 1000 {
		key = nextKey(l.s.cfg.Now(), key)
		if err = dir.RenameNew(l.base(), l.base()+"."+key); !errors.Is(err, fs.ErrExist) {
			return key, err
		}
	}
	return "", err
}

func (l *log) reopen(ctx context.Context, id string) error {
	ctx, cancel := context.WithTimeout(ctx, reopenTimeout)
	defer cancel()
	if _, err := l.s.cfg.Runtime.ReopenContainerLog(ctx, &runtimev1.ReopenContainerLogRequest{ContainerId: id}); err != nil {
		return fmt.Errorf("open the log of container %s anew: %w", id, err)
	}
	return nil
}

// makeRoom removes the oldest until there are no more than count and they are no
// more than size bytes together. Readers of those end there.
func (l *log) makeRoom(ctx context.Context, dir *hostile.Root, have []kept, count int, size int64) []kept {
	var sum int64
	for _, k := range have {
		sum += k.size
	}
	for len(have) > 0 && (len(have) > count || sum > size) {
		if err := dir.RemoveAll(ctx, have[0].name); err != nil {
			l.s.warn(l.rel, "remove the oldest rotated file of a log", err)
		}
		l.drop(have[0].key)
		sum -= have[0].size
		have = have[1:]
	}
	return have
}

// drop takes the file of a key from its readers, so that what is removed needs
// no room any more, however slow they are.
func (l *log) drop(key string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for i, g := range l.older {
		if g.key != key {
			continue
		}
		l.older = slices.Delete(l.older, i, i+1)
		l.close(g.seq)
		return
	}
}

// close takes a file from its readers. l.mu is held.
func (l *log) close(seq int64) {
	for r := range l.readers {
		if r.seq == seq {
			r.taken()
		}
	}
}

// shorten cuts a rotated file that is larger than all may be together: the agent
// or containerd was away while it was written. It is left by containerd first.
func (l *log) shorten(ctx context.Context) error {
	k, err := l.tooLong(ctx)
	if err != nil || k == nil {
		return err
	}
	l.waitLeft(ctx, k.name)
	l.step.Lock()
	defer l.step.Unlock()
	dir, err := l.open()
	if err != nil {
		return err
	}
	defer dir.Close()
	err = dir.KeepTail(k.name, k.name+tmpSuffix, l.s.cfg.room())
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil // there was no room for it meanwhile
	case err != nil:
		// What cannot be cut goes: a disk that is full has no room for a part of it.
		l.drop(k.key)
		return errors.Join(err, dir.RemoveAll(ctx, k.name))
	}
	l.detach(k.key)
	return nil
}

// tooLong finds the newest rotated file if it is longer than all may be.
func (l *log) tooLong(ctx context.Context) (*kept, error) {
	l.step.Lock()
	defer l.step.Unlock()
	dir, err := l.open()
	if err != nil {
		return nil, ignoreMissing(err)
	}
	defer dir.Close()
	have := l.list(ctx, dir)
	if len(have) == 0 || have[len(have)-1].size <= l.s.cfg.room() {
		return nil, nil
	}
	return &have[len(have)-1], nil
}

// waitLeft waits until nobody writes to a file of the log, for as long as
// containerd may take.
func (l *log) waitLeft(ctx context.Context, name string) {
	dir, err := l.open()
	if err != nil {
		return
	}
	defer dir.Close()
	until := time.After(lingering)
	for {
		if busy, err := written(dir, name); err != nil || !busy {
			return
		}
		select {
		case <-ctx.Done():
			return
		case <-until:
			return
		case <-time.After(leastInterval):
		}
	}
}

// detach takes the file of a key from its readers; they go on with the next.
func (l *log) detach(key string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, g := range l.older {
		if g.key == key {
			l.close(g.seq)
		}
	}
}

// bury brings the log of a container that has ended to what it may be: it is not
// rotated any more, so that its last words stay where they are looked for.
func (l *log) bury(ctx context.Context) error {
	l.step.Lock()
	defer l.step.Unlock()
	dir, err := l.open()
	if err != nil {
		return ignoreMissing(err)
	}
	defer dir.Close()
	have := l.list(ctx, dir)
	st, err := dir.Lstat(l.base())
	if errors.Is(err, fs.ErrNotExist) && len(have) > 0 && !have[len(have)-1].gz {
		// It ended between the rename and the opening of the new file.
		newest := have[len(have)-1]
		if err := dir.RenameNew(newest.name, l.base()); err != nil {
			return err
		}
		l.drop(newest.key)
		have = have[:len(have)-1]
		st, err = dir.Lstat(l.base())
	}
	if err != nil {
		return ignoreMissing(err)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		return nil
	}
	most := l.s.cfg.room() + l.s.cfg.MaxSize
	l.makeRoom(ctx, dir, have, l.s.cfg.MaxFiles-1, most-st.Size)
	if st.Size <= most {
		return nil
	}
	err = dir.KeepTail(l.base(), l.base()+"."+nextKey(l.s.cfg.Now(), "")+tmpSuffix, most)
	if err != nil {
		return errors.Join(err, dir.Remove(l.base()))
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.close(l.seq)
	return nil
}
