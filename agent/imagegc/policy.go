package imagegc

import (
	"cmp"
	"fmt"
	"slices"
	"time"
)

// Policy says when images are removed. Percents are of the file system's size
// that are used, by whatever.
type Policy struct {
	// High is the percent from which images are removed; 100: never.
	High int
	// Low is the percent that removing stops at.
	Low int
	// MinAge is for how long an image has to have been there.
	MinAge time.Duration
}

// Default is upstream's.
func Default() Policy { return Policy{High: 85, Low: 80, MinAge: 2 * time.Minute} }

// Validate names the flag that cannot work.
func (p Policy) Validate() error {
	switch {
	case p.High < 0 || p.High > 100:
		return fmt.Errorf("--image-gc-high-threshold %d: want a percent, 0 to 100 (100: images are never removed)", p.High)
	case p.Low < 0 || p.Low > 100:
		return fmt.Errorf("--image-gc-low-threshold %d: want a percent, 0 to 100", p.Low)
	case p.Low >= p.High:
		return fmt.Errorf("--image-gc-low-threshold %d must be less than --image-gc-high-threshold %d", p.Low, p.High)
	case p.MinAge < 0:
		return fmt.Errorf("--minimum-image-ttl-duration %s is negative", p.MinAge)
	}
	return nil
}

// FileSystem is how full the images' file system is, in bytes.
type FileSystem struct{ Capacity, Available int64 }

// Used is the percent that is used.
func (f FileSystem) Used() int {
	if f.Capacity <= 0 {
		return 0
	}
	return 100 - int(float64(min(max(f.Available, 0), f.Capacity))*100/float64(f.Capacity))
}

// Excess is how much is to be freed, 0 while usage is below the high threshold.
func (p Policy) Excess(f FileSystem) int64 {
	if p.High >= 100 || f.Capacity <= 0 || f.Used() < p.High {
		return 0
	}
	return max(int64(float64(f.Capacity)*float64(100-p.Low)/100)-f.Available, 0)
}

// Image is one on the node.
type Image struct {
	ID     string
	Names  []string // tags and digests
	Size   int64
	Pinned bool
	// Used says that a container has it, a pod of the node names it, or that it is
	// to be kept for another reason.
	Used bool
}

// Records are when images were seen first, and in use last, by id.
type Records map[string]Record

// Record is one image's. A zero Used is never.
type Record struct{ Detected, Used time.Time }

// See takes what is there now.
func (r Records) See(images []Image, now time.Time) {
	there := make(map[string]bool, len(images))
	for i := range images {
		m := &images[i]
		there[m.ID] = true
		rec, known := r[m.ID]
		if !known {
			rec.Detected = now
		}
		if m.Used {
			rec.Used = now
		}
		r[m.ID] = rec
	}
	for id := range r {
		if !there[id] {
			delete(r, id)
		}
	}
}

// Candidates are the images that may be removed, in the order in which they are:
// the one that was used longest ago first, then the one that has been there
// longest.
func (r Records) Candidates(images []Image, p Policy, now time.Time) []Image {
	var out []Image
	for _, m := range images {
		if !m.Used && !m.Pinned && now.Sub(r[m.ID].Detected) >= p.MinAge {
			out = append(out, m)
		}
	}
	slices.SortFunc(out, func(a, b Image) int {
		x, y := r[a.ID], r[b.ID]
		return cmp.Or(x.Used.Compare(y.Used), x.Detected.Compare(y.Detected), cmp.Compare(a.ID, b.ID))
	})
	return out
}
