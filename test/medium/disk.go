package medium

import (
	"errors"
	"maps"
	"math/rand/v2"
	"slices"
	"sync"
	"syscall"
)

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
	full    bool
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

// FailSync has the n-th sync of a file from now fail, and cuts the power at the write or
// sync that is number cut after that; 0: it does not.
func (d *Disk) FailSync(name string, n, cut int) {
	d.mu.Lock()
	defer d.mu.Unlock()
	c := d.file(name)
	c.failIn, c.cutIn = n, cut
}

// Fill makes the disk full, or makes room: of the writes, only those to what files have
// already go through.
func (d *Disk) Fill(on bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.full = on
}

// Cut cuts the power: files that are open reach the disk no more.
func (d *Disk) Cut() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.cut()
}

func (d *Disk) cut() {
	for _, name := range slices.Sorted(maps.Keys(d.files)) {
		c := d.files[name]
		c.lottery(d.random)
		c.cached, c.latest = nil, nil
	}
	d.over()
}

// over ends the lives of processes, and with them what was to fail.
func (d *Disk) over() {
	d.life++
	d.calm()
}

// Calm ends what fails now, and what is to fail later.
func (d *Disk) Calm() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.calm()
}

func (d *Disk) calm() {
	d.cutIn, d.failIn, d.failing = 0, 0, false
	for _, c := range d.files {
		c.failIn, c.cutIn = 0, 0
	}
}

// Kill ends the process and leaves the power on: files that are open reach the disk no
// more, and files that are opened then are as the process saw them.
func (d *Disk) Kill() {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, c := range d.files {
		if c.latest != nil {
			c.cached, c.latest = c.latest(), nil
		}
	}
	d.over()
}

// Clear makes the disk empty.
func (d *Disk) Clear() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.over()
	d.full = false
	clear(d.files)
}

// Step is a write of something that is not simulated here and needs room. It reports
// whether the process of a life (see Life) is over, and whether the write fails.
func (d *Disk) Step(life int) (over bool, err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	switch off, fails := d.step(life); {
	case off:
		return true, nil
	case d.full:
		return false, ErrNoSpace
	case fails:
		return false, ErrNoSync
	}
	return false, nil
}

// Life is the number of processes that are over: files that are opened now are of it.
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

// write is a write of a process: to is its page cache, from which now reads. d.mu is
// held.
func (d *Disk) write(life int, c *content, b []byte, off int64, to func([]byte) error, now func([]byte, int64) (int, error)) (int, error) {
	if life != d.life {
		return len(b), errors.Join(to(b), d.Off)
	}
	if end := off + int64(len(b)); end > c.room {
		if d.full {
			return 0, ErrNoSpace
		}
		c.room = end
	}
	fails, n := d.fails(), len(b)
	if fails {
		n = d.random.IntN(len(b) + 1)
	}
	if err := to(b[:n]); err != nil {
		return 0, err
	}
	if err := c.write(d.random, off, n, now); err != nil {
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

func (d *Disk) sync(life int, c *content) error {
	off, fails := d.step(life)
	if !off && c.failIn > 0 {
		if c.failIn--; c.failIn == 0 {
			fails, d.cutIn = true, c.cutIn
		}
	}
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
