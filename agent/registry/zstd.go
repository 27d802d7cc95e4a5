package registry

import (
	"encoding/binary"
	"fmt"
)

// maxWindow is the largest window of a zstd frame: what `zstd --long` has at most without a
// word to who decompresses. That much is in memory while a layer is unpacked.
const maxWindow = 128 << 20

// frames follows the frames of zstd (RFC 8878, 3.1) in what goes by, and holds nothing of it
// but the header that is being read.
type frames struct {
	state frameState
	head  [18]byte // magic number, descriptor, window, dictionary, content size
	have  int
	want  int
	skip  uint64
	sum   bool // the frame ends with a checksum
}

type frameState int

const (
	frameMagic frameState = iota
	frameDescriptor
	frameHeader
	frameSkippable
	frameBlock
	frameData     // of a block
	frameLastData // of the last one
	frameRest     // skips to the next frame
	frameNone     // not zstd
)

const (
	zstdMagic         = 0xFD2FB528
	zstdSkippable     = 0x184D2A50 // to ...5F
	zstdSkippableMask = 0xFFFFFFF0
)

// scan looks at the next bytes. It fails at a frame that wants too large a window.
func (f *frames) scan(p []byte) error {
	for len(p) > 0 && f.state != frameNone {
		if f.skip > 0 {
			n := min(f.skip, uint64(len(p)))
			f.skip -= n
			p = p[n:]
			continue
		}
		switch f.state {
		case frameData:
			f.begin(frameBlock, 3)
		case frameLastData:
			f.begin(frameMagic, 4)
			if f.sum {
				f.skip = 4
			}
		case frameRest:
			f.begin(frameMagic, 4)
		}
		if f.skip > 0 {
			continue
		}
		if f.want == 0 {
			f.begin(frameMagic, 4)
		}
		n := copy(f.head[f.have:f.want], p)
		f.have += n
		p = p[n:]
		if f.have < f.want {
			return nil
		}
		if err := f.step(); err != nil {
			return err
		}
	}
	return nil
}

func (f *frames) begin(s frameState, want int) { f.state, f.have, f.want = s, 0, want }

// step acts on what head has.
func (f *frames) step() error {
	switch f.state {
	case frameMagic:
		magic := binary.LittleEndian.Uint32(f.head[:4])
		switch {
		case magic == zstdMagic:
			f.begin(frameDescriptor, 1)
		case magic&zstdSkippableMask == zstdSkippable:
			f.begin(frameSkippable, 4)
		default:
			f.state = frameNone
		}
	case frameSkippable:
		f.skip = uint64(binary.LittleEndian.Uint32(f.head[:4]))
		f.state = frameRest
	case frameDescriptor:
		d := f.head[0]
		f.sum = d&4 != 0
		f.state, f.want = frameHeader, 1+windowBytes(d)+[4]int{0, 1, 2, 4}[d&3]+sizeBytes(d)
		if f.have == f.want { // a frame of a single segment has a size
			return f.step()
		}
	case frameHeader:
		if w := f.window(); w > maxWindow {
			return fmt.Errorf("a frame of zstd wants a window of %d bytes: no more than %d are taken", w, uint64(maxWindow))
		}
		f.begin(frameBlock, 3)
	case frameBlock:
		h := uint32(f.head[0]) | uint32(f.head[1])<<8 | uint32(f.head[2])<<16
		f.skip = uint64(h >> 3)
		if h>>1&3 == 1 { // one byte, many times
			f.skip = 1
		}
		f.state = frameData
		if h&1 != 0 {
			f.state = frameLastData
		}
	}
	return nil
}

func windowBytes(d byte) int {
	if d&0x20 != 0 { // single segment
		return 0
	}
	return 1
}

func sizeBytes(d byte) int {
	n := [4]int{0, 2, 4, 8}[d>>6]
	if n == 0 && d&0x20 != 0 {
		n = 1
	}
	return n
}

// window is how much memory the frame wants: as much as its content when it is of a single
// segment.
func (f *frames) window() uint64 {
	d := f.head[0]
	if d&0x20 == 0 {
		exponent, mantissa := f.head[1]>>3, uint64(f.head[1]&7)
		base := uint64(1) << (10 + exponent)
		return base + base/8*mantissa
	}
	at := 1 + [4]int{0, 1, 2, 4}[d&3]
	switch b := f.head[at:]; sizeBytes(d) {
	case 1:
		return uint64(b[0])
	case 2:
		return uint64(binary.LittleEndian.Uint16(b)) + 256
	case 4:
		return uint64(binary.LittleEndian.Uint32(b))
	}
	return binary.LittleEndian.Uint64(f.head[at:])
}
