package logs

import (
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"timonel/agent/hostile"
)

// source is one file of a log that is being read. seq and f are guarded by the
// log's mu; who rotates closes f when the file has to go.
type source struct {
	seq int64 // the log's when it was the file that is written to
	f   *os.File
	cut bool // f was taken away before its end was read
}

// taken takes the file away: it has to go. The log's mu is held.
func (s *source) taken() {
	at, err := s.f.Seek(0, io.SeekCurrent)
	var st unix.Stat_t
	if err == nil {
		err = unix.Fstat(int(s.f.Fd()), &st)
	}
	s.cut = err != nil || at < st.Size
	s.f.Close()
}

// Reader reads one log. It belongs to one goroutine.
type Reader struct {
	s       *Logs
	l       *log
	o       Options
	running func(context.Context) (bool, error)
	src     source
	in      io.Reader // src.f, or what it decompresses to
	parser  parser
	flush   func()

	final  bool      // nobody writes to the file any more
	leftBy time.Time // until when its writer is waited for
	lost   bool      // the file was taken away
	swap   bool      // somebody else put another in its place
	over   bool      // the container has ended, says CRI
	asked  time.Time // when it was asked
	wake   chan struct{}
	armed  bool // the next write is told
}

// waits of one that follows.
const (
	// followInterval is how often it looks without being woken.
	followInterval = time.Second
	// leftInterval is how often it asks whether containerd has left a file.
	leftInterval = 10 * time.Millisecond
)

// Read opens a container's log by the path that CRI gives. As upstream, that is
// the file that is written to, not what was rotated. running says whether the
// container does, for one that follows.
func (s *Logs) Read(ctx context.Context, path string, o Options, running func(context.Context) (bool, error)) (*Reader, error) {
	rel := s.below(path)
	if rel == "" {
		return nil, &fs.PathError{Op: "open", Path: path, Err: errors.New("it is not in this node's folder of logs")}
	}
	r := &Reader{s: s, l: s.hold(rel), o: o, running: running, wake: make(chan struct{}, 1)}
	if err := r.open(ctx); err != nil {
		s.release(r.l)
		return nil, err
	}
	return r, nil
}

// Close lets go of the log.
func (r *Reader) Close() {
	if r.s.notify != nil {
		r.s.notify.forget(r.wake)
	}
	r.l.mu.Lock()
	delete(r.l.readers, &r.src)
	r.src.f.Close()
	r.l.mu.Unlock()
	r.s.release(r.l)
}

// open begins with the file that is written to, at its last lines if those are
// asked for.
func (r *Reader) open(ctx context.Context) error {
	dir, done, err := r.l.locked(ctx)
	if err != nil {
		return err
	}
	defer done()
	f, err := dir.Open(r.l.base())
	if err != nil {
		return err
	}
	r.l.mu.Lock()
	r.src = source{seq: r.l.seq, f: f}
	r.in = f
	r.l.readers[&r.src] = struct{}{}
	r.l.mu.Unlock()
	if r.o.TailLines == nil {
		return nil
	}
	size, err := f.Seek(0, io.SeekEnd)
	if err == nil {
		size, err = tailStart(f, size, max(*r.o.TailLines, 0))
	}
	if err == nil {
		_, err = f.Seek(size, io.SeekStart)
	}
	if err != nil {
		r.l.mu.Lock()
		delete(r.l.readers, &r.src)
		r.l.mu.Unlock()
		f.Close()
	}
	return err
}

// locked takes l.step, which is held while containerd opens a log anew, and opens the
// folder that the log is in. done gives both back.
func (l *log) locked(ctx context.Context) (dir *hostile.Root, done func(), err error) {
	for !l.step.TryLock() {
		select {
		case <-ctx.Done():
			return nil, nil, ctx.Err()
		case <-time.After(leftInterval):
		}
	}
	if dir, err = l.open(); err != nil {
		l.step.Unlock()
		return nil, nil, err
	}
	return dir, func() { dir.Close(); l.step.Unlock() }, nil
}

// Copy writes what was asked for to w and calls flush, which may be nil, when
// nothing more comes for now.
func (r *Reader) Copy(ctx context.Context, w io.Writer, flush func()) error {
	out := newOutput(w, r.o)
	r.flush = func() {
		if out.w.Flush() == nil && flush != nil {
			flush()
		}
	}
	err := r.copy(ctx, out)
	if errors.Is(err, errEnough) {
		err = nil
	}
	if err == nil && r.parser.bad && !r.parser.good {
		err = fmt.Errorf("unsupported log format: %s is not in CRI's", r.l.rel)
	}
	return errors.Join(err, out.w.Flush())
}

func (r *Reader) copy(ctx context.Context, out *output) error {
	buf := make([]byte, 32<<10)
	for !out.enough() {
		if err := ctx.Err(); err != nil {
			return err
		}
		n, err := r.in.Read(buf)
		if n > 0 {
			if err := r.parser.feed(buf[:n], out); err != nil {
				return err
			}
			continue
		}
		if errors.Is(err, os.ErrClosed) {
			r.l.mu.Lock()
			r.final, r.lost = true, r.src.cut
			r.l.mu.Unlock()
		} else if err != nil && !errors.Is(err, io.EOF) {
			return fmt.Errorf("read the log: %w", err)
		}
		if !r.o.Follow {
			if r.lost {
				return errors.New("the rest of this log was rotated away before it was read")
			}
			return r.parser.close(out)
		}
		if more, err := r.goOn(ctx, out); err != nil || !more {
			return err
		}
	}
	return nil
}

// goOn does what there is to do at the end of a file for one that follows. more
// says to read again.
func (r *Reader) goOn(ctx context.Context, out *output) (more bool, err error) {
	moved, ended := r.state()
	switch {
	case !moved && !ended:
		return true, r.await(ctx)
	case !r.final:
		// What containerd has for this file still is part of it.
		if r.leftBy.IsZero() {
			r.leftBy = time.Now().Add(lingering)
		}
		r.final = r.left() || time.Now().After(r.leftBy)
		if r.final {
			return true, nil // once more to the end
		}
		return true, r.wait(ctx, leftInterval, nil)
	case moved:
		err := r.next(ctx, out)
		if !errors.Is(err, fs.ErrNotExist) {
			return true, err
		}
		// Nobody has begun another: the pod goes, or somebody removed it.
		if !ended {
			if r.over, err = r.ended(ctx); err != nil {
				return false, err
			}
			return true, r.wait(ctx, busyInterval)
		}
	}
	if err := r.parser.close(out); err != nil {
		return false, err
	}
	if r.lost {
		return false, out.note(lostText)
	}
	return false, nil
}

// lostText stands where lines are missing, for the person who reads.
const lostText = "[lines are missing here: they were rotated away before they were read]"

// state says whether there is another file to go on with, and whether nothing
// more is written.
func (r *Reader) state() (moved, ended bool) {
	r.l.mu.Lock()
	defer r.l.mu.Unlock()
	if r.l.ended != nil {
		select {
		case <-r.l.ended:
			ended = true
		default:
		}
	}
	return r.l.seq > r.src.seq || r.swap, ended || r.over
}

// left says whether nobody writes to the file any more. Where that is not known
// a second has to do.
func (r *Reader) left() bool {
	busy, err := hostile.HasWriter(r.src.f)
	if err != nil {
		return time.Until(r.leftBy) < lingering-time.Second
	}
	return !busy
}

// await waits until there may be more.
func (r *Reader) await(ctx context.Context) (err error) {
	if r.arm() {
		return nil // it may have been written to just before
	}
	r.l.mu.Lock()
	rotated, ended := r.l.rotated, r.l.ended
	moved := r.l.seq > r.src.seq
	r.l.mu.Unlock()
	if moved {
		return nil
	}
	if time.Since(r.asked) >= followInterval {
		if r.over, err = r.ended(ctx); err != nil || r.over {
			return err
		}
		if r.swap, err = r.replaced(ctx); err != nil || r.swap {
			return err
		}
	}
	return r.wait(ctx, followInterval, ended, rotated)
}

// ended asks CRI whether the container has.
func (r *Reader) ended(ctx context.Context) (bool, error) {
	r.asked = time.Now()
	running, err := r.running(ctx)
	return err == nil && !running, err
}

// arm has the next write told, if that is not so yet.
func (r *Reader) arm() bool {
	if r.s.notify == nil || r.armed {
		return false
	}
	select {
	case <-r.wake: // of before
	default:
	}
	r.armed = r.s.notify.arm(r.src.f, r.wake) == nil
	return r.armed
}

// wait shows what was read so far and waits.
func (r *Reader) wait(ctx context.Context, most time.Duration, also ...<-chan struct{}) error {
	r.flush()
	also = append(also, nil, nil)
	timer := time.NewTimer(most)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-r.wake:
		r.armed = false
	case <-also[0]:
	case <-also[1]:
	case <-timer.C:
	}
	return nil
}

// replaced says whether somebody else gave the log's name to another file.
func (r *Reader) replaced(ctx context.Context) (bool, error) {
	dir, done, err := r.l.locked(ctx)
	if err != nil {
		return false, ignoreMissing(err)
	}
	defer done()
	now, err := dir.Lstat(r.l.base())
	if err != nil {
		return false, ignoreMissing(err)
	}
	var have unix.Stat_t
	if err := unix.Fstat(int(r.src.f.Fd()), &have); err != nil {
		return false, nil // it was taken away: the next read says so
	}
	r.l.mu.Lock()
	defer r.l.mu.Unlock()
	return r.l.seq == r.src.seq && now.Mode&unix.S_IFMT == unix.S_IFREG && fileOf(&now) != fileOf(&have), nil
}

// next goes on with the file that was begun after this one.
func (r *Reader) next(ctx context.Context, out *output) error {
	dir, done, err := r.l.locked(ctx)
	if err != nil {
		return err
	}
	defer done()
	r.l.mu.Lock()
	ways := []generation{}
	for _, g := range r.l.older {
		if g.seq > r.src.seq {
			ways = append(ways, g)
		}
	}
	ways = append(ways, generation{seq: r.l.seq})
	r.l.mu.Unlock()
	at := r.src.seq
	for _, g := range ways {
		f, in, err := r.enter(dir, g.key)
		if err != nil {
			if g.key == "" {
				return fmt.Errorf("go on with the log: %w", err)
			}
			continue
		}
		if err := r.parser.close(out); err != nil {
			f.Close()
			return err
		}
		lost := r.lost || g.seq > at+1
		r.l.mu.Lock()
		r.src.f.Close()
		r.src.seq, r.src.f, r.src.cut = g.seq, f, false
		r.l.mu.Unlock()
		// No file that was rotated is written to, but its writer may be late.
		r.in, r.final, r.lost, r.swap, r.armed, r.leftBy = in, in != f, false, false, false, time.Time{}
		if lost {
			return out.note(lostText)
		}
		return nil
	}
	return nil
}

// enter opens the file of a key, or the one that is written to.
func (r *Reader) enter(dir *hostile.Root, key string) (*os.File, io.Reader, error) {
	if key == "" {
		f, err := dir.Open(r.l.base())
		return f, f, err
	}
	name := r.l.base() + "." + key
	f, err := dir.Open(name)
	if err == nil {
		return f, f, nil
	}
	if f, err = dir.Open(name + gzSuffix); err != nil {
		return nil, nil, err
	}
	z, err := gzip.NewReader(f)
	if err != nil {
		f.Close()
		return nil, nil, err
	}
	return f, z, nil
}
