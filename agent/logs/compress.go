package logs

import (
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"

	"golang.org/x/sys/unix"

	"timonel/agent/hostile"
)

// compress compresses the rotated files but the newest, as upstream: containerd
// may have some bytes for that one still, and collectors read it. One is
// compressed at a time on a node.
func (l *log) compress(ctx context.Context) error {
	for ctx.Err() == nil {
		more, err := l.compressOne(ctx)
		if err != nil || !more {
			return err
		}
	}
	return nil
}

func (l *log) compressOne(ctx context.Context) (more bool, err error) {
	select {
	case l.s.packing <- struct{}{}:
		defer func() { <-l.s.packing }()
	case <-ctx.Done():
		return false, nil
	}
	dir, err := l.open()
	if err != nil {
		return false, ignoreMissing(err)
	}
	defer dir.Close()
	k, ok := l.choose(ctx, dir)
	if !ok {
		return false, nil
	}
	defer func() {
		l.mu.Lock()
		l.making = ""
		l.mu.Unlock()
	}()
	plain, err := dir.Open(k.name)
	if err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			return true, nil // there was no room for it meanwhile
		}
		return false, err
	}
	defer plain.Close()
	var st unix.Stat_t
	if err := unix.Fstat(int(plain.Fd()), &st); err != nil {
		return false, fmt.Errorf("stat %s: %w", plain.Name(), err)
	}
	tmp := k.name + tmpSuffix
	if err := pack(ctx, dir, plain, tmp, st.Mode&0o777, st.Size); err != nil {
		return false, errors.Join(err, dir.Remove(tmp))
	}
	l.step.Lock()
	defer l.step.Unlock()
	if now, err := dir.Lstat(k.name); err != nil || fileOf(&now) != fileOf(&st) {
		return true, dir.Remove(tmp)
	}
	if err := dir.Rename(tmp, k.name+gzSuffix); err != nil {
		return false, errors.Join(err, dir.Remove(tmp))
	}
	return true, dir.Remove(k.name)
}

// choose takes the oldest file that is to be compressed.
func (l *log) choose(ctx context.Context, dir *hostile.Root) (kept, bool) {
	l.step.Lock()
	defer l.step.Unlock()
	have := l.list(ctx, dir)
	for i, k := range have {
		if i < len(have)-1 && !k.gz {
			l.mu.Lock()
			l.making = k.key
			l.mu.Unlock()
			return k, true
		}
	}
	return kept{}, false
}

// pack writes the compressed form of the first size bytes of a file.
func pack(ctx context.Context, dir *hostile.Root, plain io.Reader, tmp string, mode uint32, size int64) error {
	if err := dir.Remove(tmp); err != nil {
		return err
	}
	f, err := dir.CreateNew(tmp, mode)
	if err != nil {
		return err
	}
	defer f.Close()
	// What a container wrote is not worth more of the node's time than this.
	z, err := gzip.NewWriterLevel(f, gzip.BestSpeed)
	if err != nil {
		return err
	}
	src := io.LimitReader(plain, size)
	for {
		if err := ctx.Err(); err != nil {
			return err
		}
		_, err := io.CopyN(z, src, 256<<10)
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return fmt.Errorf("compress %s: %w", f.Name(), err)
		}
	}
	if err := z.Close(); err != nil {
		return fmt.Errorf("compress %s: %w", f.Name(), err)
	}
	// The plain one is removed: this one has to be on the disk.
	if err := f.Sync(); err != nil {
		return fmt.Errorf("compress %s: %w", f.Name(), err)
	}
	return nil
}
