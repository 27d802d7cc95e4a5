package consensus

import (
	"bytes"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"

	"timonel/test/needs"
)

// What is written past the page cache is there, what came before it in its first
// sector stays, and no more than the rest of its last sector is lost; also when the
// file is opened anew, read through the page cache in between, and when the file
// system lets no such writes.
func TestDataFile(t *testing.T) {
	t.Parallel()
	for name, open := range map[string]func(*os.File) *dataFile{
		"direct": newDataFile, "buffered": func(f *os.File) *dataFile { return &dataFile{journalFile: dataSynced{f}} },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			const size = 1 << 20
			path := filepath.Join(t.TempDir(), "file")
			must(t, os.WriteFile(path, bytes.Repeat([]byte{0xee}, size), 0o600))
			want := bytes.Repeat([]byte{0xee}, size)
			random := rand.New(rand.NewPCG(1, 2))
			reopen := func() *dataFile {
				f, err := os.OpenFile(path, os.O_RDWR, 0)
				must(t, err)
				return open(f)
			}
			f := reopen()
			if name == "direct" && f.direct == nil {
				needs.Skip(t, "the file system does not let us write past the page cache")
			}
			off := 0
			for i := range lessRaced(2000) {
				b := make([]byte, 1+random.IntN(1<<random.IntN(17)))
				for j := range b {
					b[j] = byte(random.Uint32())
				}
				switch { // mostly one after the other, as the journal does
				case off+len(b) > size, random.IntN(20) == 0:
					off = random.IntN(size - len(b))
				case random.IntN(4) == 0:
					off = max(0, off-random.IntN(40)) // over the end of the one before
				}
				n, err := f.WriteAt(b, int64(off))
				must(t, err)
				if n != len(b) {
					t.Fatalf("%d of %d bytes written", n, len(b))
				}
				copy(want[off:], b)
				off += len(b)
				must(t, f.Sync())
				got, err := os.ReadFile(path)
				must(t, err)
				end := min(size, (off+sector-1)/sector*sector)
				if len(got) != size || !bytes.Equal(got[:off], want[:off]) || !bytes.Equal(got[end:], want[end:]) {
					t.Fatalf("write %d, of %d bytes up to %d: another content", i, len(b), off)
				}
				copy(want[off:end], got[off:end]) // of no account
				if random.IntN(50) == 0 {
					must(t, f.Close())
					f = reopen()
				}
			}
			must(t, f.Close())
		})
	}
}
