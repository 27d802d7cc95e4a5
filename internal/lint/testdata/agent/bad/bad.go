package bad

import (
	"bufio"
	"io"
	. "io/ioutil"
	files "os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

var _ = Discard

// planted is what the rule is to find; the check does not need it to build.
func planted(path string, r io.Reader) {
	_, _ = files.Stat(path)
	_, _ = files.ReadFile(path)
	_, _ = io.ReadAll(r)
	remove := files.RemoveAll
	_, _ = unix.Open(path, 0, 0)
	_ = filepath.Walk(path, nil)
	_, _ = bufio.NewReader(r).ReadString('\n')
	_ = remove
}
