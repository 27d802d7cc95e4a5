package logs

import (
	"bytes"
	"fmt"
	"io"
)

// tailBlock is how much of a file is looked at together for its last lines.
const tailBlock = 64 << 10

// tailStart is where the last n lines of a file of that size begin. A line
// without an end is not counted.
func tailStart(f io.ReaderAt, size, n int64) (int64, error) {
	buf := make([]byte, tailBlock)
	for right := size; right > 0; {
		left := max(right-tailBlock, 0)
		block := buf[:right-left]
		if got, err := f.ReadAt(block, left); err != nil && (err != io.EOF || got < len(block)) {
			return 0, fmt.Errorf("look for the last lines: %w", err)
		}
		if bytes.IndexByte(block, '\n') < 0 { // much faster than from the end
			right = left
			continue
		}
		for end := len(block); ; n-- {
			i := bytes.LastIndexByte(block[:end], '\n')
			if i < 0 {
				break
			}
			if n == 0 {
				return left + int64(i) + 1, nil
			}
			end = i
		}
		right = left
	}
	return 0, nil
}
