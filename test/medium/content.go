package medium

import (
	"maps"
	"math/rand/v2"
	"slices"
)

// sector is what is written whole or not at all.
const sector = 512

// content is what is on the disk of a file, and the sectors that were written since
// the last sync of it.
type content struct {
	certain []byte
	dirty   map[int64][]byte
	room    int64 // that it has on the disk: its first bytes

	failIn, cutIn int // see Disk.FailSync

	cached []byte        // what the page cache has of it, after a process that was killed
	latest func() []byte // what it has, nil if nobody has the file open
}

func (d *Disk) file(name string) *content {
	c := d.files[name]
	if c == nil {
		c = &content{dirty: map[int64][]byte{}}
		d.files[name] = c
	}
	return c
}

// seen is what a process sees that opens the file.
func (c *content) seen() []byte {
	if c.cached != nil {
		return slices.Clone(c.cached)
	}
	return slices.Clone(c.certain)
}

// lottery decides about each sector that is not synced, or about all of them at once, and
// forgets which these were.
func (c *content) lottery(random *rand.Rand) {
	share := []int{0, 2, 2, 4}[random.IntN(4)] // of four
	for _, s := range slices.Sorted(maps.Keys(c.dirty)) {
		if random.IntN(4) < share {
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

// write notes that a process wrote: now is what its page cache has of a sector. What the
// page cache had before may have been written back, without a sync.
func (c *content) write(random *rand.Rand, off int64, size int, now func(b []byte, off int64) (int, error)) error {
	first := off / sector
	b := make([]byte, (off+int64(size)+sector-1)/sector*sector-first*sector)
	n, err := now(b, first*sector)
	if err != nil && n == 0 {
		return err
	}
	for i := 0; i < n; i += sector {
		s := first + int64(i/sector)
		if before, ok := c.dirty[s]; ok && random.IntN(2) == 0 {
			c.put(s, before)
		}
		c.dirty[s] = b[i:min(i+sector, n):min(i+sector, n)]
	}
	return nil
}
