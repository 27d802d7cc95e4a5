package medium

import (
	"errors"
	"maps"
	"math/rand/v2"
	"slices"
	"sync"
	"syscall"
)

// sector is what is written whole or not at all.
const sector = 512

// Disk is a disk with its files. Its methods may be called concurrently.
type Disk struct {
	// OnCut, if not nil, is told when CutIn cuts the power, while locks are held.
	OnCut func()
	// Off is what a process is told whose power is off; nil lets it believe that it goes
	// on, in a world of its own.
	Off error

	mu      sync.Mutex
	random  *rand.Rand
	files   map[string]*content
	life    int
	cutIn   int
	failIn  int
	failing bool
}

// content is what is on the disk of a file, and the sectors that were written since
// the last sync of it.
type content struct {
	certain []byte
	dirty   map[int64][]byte
}

// New returns an empty disk.
func New(random *rand.Rand) *Disk {
	return &Disk{random: random, files: map[string]*content{}}
}

// Errors of writes and syncs.
var (
	ErrNoSpace = error(&failure{"write", syscall.ENOSPC})
	ErrNoSync  = error(&failure{"sync", syscall.EIO})
)

type failure struct {
	what string
	err  error
}

func (e *failure) Error() string { return e.what + ": " + e.err.Error() }
func (e *failure) Unwrap() error { return e.err }

// CutIn cuts the power at the n-th write or sync from now; 0: never.
func (d *Disk) CutIn(n int) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.cutIn = n
}

// Fail has half of all writes and syncs fail, or ends that.
func (d *Disk) Fail(on bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.failing = on
}

// FailAt has the n-th write or sync from now fail.
func (d *Disk) FailAt(n int) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.failIn = n
}

// Cut cuts the power: files that are open reach the disk no more.
func (d *Disk) Cut() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.cut()
}

func (d *Disk) cut() {
	for _, name := range slices.Sorted(maps.Keys(d.files)) {
		d.files[name].lottery(d.random)
	}
	d.life++
	d.cutIn, d.failIn, d.failing = 0, 0, false
}

// Clear makes the disk empty.
func (d *Disk) Clear() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.life++
	d.cutIn, d.failIn, d.failing = 0, 0, false
	clear(d.files)
}

// Step is a write of something that is not simulated here. It reports whether the
// power is off for the process of a life (see Life), and whether the write fails.
func (d *Disk) Step(life int) (off, fails bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.step(life)
}

// Life is the number of the power's life: files that are opened now are of it.
func (d *Disk) Life() int {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.life
}

// step is one write or sync. d.mu is held.
func (d *Disk) step(life int) (off, fails bool) {
	if life != d.life || d.strike() {
		return true, false
	}
	return false, d.fails()
}

// fails reports that this is a write or sync that fails.
func (d *Disk) fails() bool {
	if d.failIn > 0 {
		d.failIn--
		return d.failIn == 0
	}
	return d.failing && d.random.IntN(2) == 0
}

// strike reports that this is where the power is cut.
func (d *Disk) strike() bool {
	if d.cutIn == 0 {
		return false
	}
	if d.cutIn--; d.cutIn > 0 {
		return false
	}
	d.cut()
	if d.OnCut != nil {
		d.OnCut()
	}
	return true
}

func (d *Disk) file(name string) *content {
	c := d.files[name]
	if c == nil {
		c = &content{dirty: map[int64][]byte{}}
		d.files[name] = c
	}
	return c
}

// lottery decides about each sector that is not synced, and forgets which these were.
func (c *content) lottery(random *rand.Rand) {
	for _, s := range slices.Sorted(maps.Keys(c.dirty)) {
		if random.IntN(2) == 0 {
			c.put(s, c.dirty[s])
		}
	}
	clear(c.dirty)
}

func (c *content) sync() {
	for s, b := range c.dirty {
		c.put(s, b)
	}
	clear(c.dirty)
}

func (c *content) put(s int64, b []byte) {
	c.grow(int64(len(b)) + s*sector)
	copy(c.certain[s*sector:], b)
}

func (c *content) grow(size int64) {
	if n := size - int64(len(c.certain)); n > 0 {
		c.certain = append(c.certain, make([]byte, n)...)
	}
}

// write notes that a process wrote: now is what its page cache has of a sector.
func (c *content) write(off int64, size int, now func(b []byte, off int64) (int, error)) error {
	first := off / sector
	b := make([]byte, (off+int64(size)+sector-1)/sector*sector-first*sector)
	n, err := now(b, first*sector)
	if err != nil && n == 0 {
		return err
	}
	for i := 0; i < n; i += sector {
		c.dirty[first+int64(i/sector)] = b[i:min(i+sector, n):min(i+sector, n)]
	}
	return nil
}

// File is a file of a fixed size as one process sees it.
type File struct {
	d    *Disk
	c    *content
	life int
	now  []byte
}

// Open opens a file, and makes it of zeros if there is none.
func (d *Disk) Open(name string, size int64) *File {
	d.mu.Lock()
	defer d.mu.Unlock()
	c := d.file(name)
	c.grow(size)
	return &File{d: d, c: c, life: d.life, now: slices.Clone(c.certain)}
}

// ReadAt implements io.ReaderAt.
func (f *File) ReadAt(b []byte, off int64) (int, error) {
	f.d.mu.Lock()
	defer f.d.mu.Unlock()
	return f.read(b, off)
}

func (f *File) read(b []byte, off int64) (int, error) {
	if off >= int64(len(f.now)) {
		return 0, errors.New("behind the end of the file")
	}
	return copy(b, f.now[off:]), nil
}

// WriteAt implements io.WriterAt.
func (f *File) WriteAt(b []byte, off int64) (int, error) {
	f.d.mu.Lock()
	defer f.d.mu.Unlock()
	if off+int64(len(b)) > int64(len(f.now)) {
		return 0, ErrNoSpace
	}
	return f.d.write(f.life, f.c, b, off, func(b []byte) error { copy(f.now[off:], b); return nil }, f.read)
}

// write is a write of a process: to is its page cache, from which now reads. d.mu is
// held.
func (d *Disk) write(life int, c *content, b []byte, off int64, to func([]byte) error, now func([]byte, int64) (int, error)) (int, error) {
	if life != d.life {
		return len(b), errors.Join(to(b), d.Off)
	}
	fails, n := d.fails(), len(b)
	if fails {
		n = d.random.IntN(len(b) + 1)
	}
	if err := to(b[:n]); err != nil {
		return 0, err
	}
	if err := c.write(off, n, now); err != nil {
		return 0, err
	}
	if d.strike() { // of what was just written, too, it leaves this and that
		return len(b), errors.Join(to(b), d.Off)
	}
	if fails {
		return n, ErrNoSpace
	}
	return len(b), nil
}

// Sync makes what was written last.
func (f *File) Sync() error {
	f.d.mu.Lock()
	defer f.d.mu.Unlock()
	return f.d.sync(f.life, f.c)
}

func (d *Disk) sync(life int, c *content) error {
	off, fails := d.step(life)
	switch {
	case off:
		return d.Off
	case fails:
		c.lottery(d.random)
		return ErrNoSync
	}
	c.sync()
	return nil
}

// Close implements io.Closer.
func (f *File) Close() error { return nil }
