package upstream

import (
	"os"
	"regexp"
	"testing"
)

var row = regexp.MustCompile("(?m)^\\| `([a-z-]+)` \\| ([^|]+?) \\|")

// readPage returns who does what by docs/controllers.md, by upstream's names.
func readPage(t *testing.T) map[string]string {
	t.Helper()
	text, err := os.ReadFile("../../docs/controllers.md")
	if err != nil {
		t.Fatal(err)
	}
	out := map[string]string{}
	for _, m := range row.FindAllStringSubmatch(string(text), -1) {
		out[m[1]] = m[2]
	}
	return out
}
