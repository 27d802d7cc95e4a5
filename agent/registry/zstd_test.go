package registry

import (
	"bytes"
	"testing"

	"github.com/klauspost/compress/zstd"
	"github.com/stretchr/testify/require"
)

func frame(t *testing.T, window int, whole bool, raw []byte) []byte {
	t.Helper()
	if whole {
		e, err := zstd.NewWriter(nil, zstd.WithSingleSegment(true), zstd.WithEncoderCRC(false))
		require.NoError(t, err)
		return e.EncodeAll(raw, nil)
	}
	var out bytes.Buffer
	e, err := zstd.NewWriter(&out, zstd.WithWindowSize(window), zstd.WithEncoderConcurrency(1))
	require.NoError(t, err)
	_, err = e.Write(raw)
	require.NoError(t, err)
	require.NoError(t, e.Close())
	return out.Bytes()
}

// Whatever the pieces in which they come, frames of small windows pass, and one of a large
// window does not, wherever it is.
func TestWindows(t *testing.T) {
	t.Parallel()
	small := frame(t, 1<<20, false, bytes.Repeat([]byte("hello, world. "), 50000))
	zeros := frame(t, 8<<20, false, make([]byte, 3<<20))
	segment := frame(t, 0, true, bytes.Repeat([]byte("x"), 300))
	skip := []byte{0x5A, 0x2A, 0x4D, 0x18, 5, 0, 0, 0, 1, 2, 3, 4, 5}
	large := frame(t, 256<<20, false, make([]byte, 2<<20))
	// A single segment that says it has 1 TiB.
	claims := []byte{0x28, 0xB5, 0x2F, 0xFD, 0xE0, 0, 0, 0, 0, 0, 1, 0, 0}
	for name, c := range map[string]struct {
		parts [][]byte
		fails bool
	}{
		"one":                 {[][]byte{small}, false},
		"many":                {[][]byte{small, skip, zeros, segment, segment, skip, small}, false},
		"large":               {[][]byte{large}, true},
		"large behind others": {[][]byte{small, zeros, segment, skip, large}, true},
		"claims":              {[][]byte{claims}, true},
		"claims behind":       {[][]byte{segment, small, claims}, true},
		"gzip":                {[][]byte{{0x1f, 0x8b, 8, 0}, large}, false},
	} {
		all := bytes.Join(c.parts, nil)
		for _, piece := range []int{1, 2, 3, 7, 4096, len(all)} {
			var f frames
			var err error
			for at := 0; at < len(all) && err == nil; at += piece {
				err = f.scan(all[at:min(at+piece, len(all))])
			}
			require.Equal(t, c.fails, err != nil, "%s in pieces of %d: %v", name, piece, err)
		}
	}
}
