//go:build !race

package sim

import (
	"cmp"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// TestPlantedBugs puts bugs into the product on purpose, one at a time, and proves
// that the simulation finds each. The product is built with the changed file in
// the place of the right one (go test -overlay); nothing in it knows of this. Each
// simulation ends with the first life that has violations, so that runs, with which the
// bug must be found, costs something only when it is not: it is ten times as many as it
// takes. Without the race detector, as what is built is.
func TestPlantedBugs(t *testing.T) {
	for _, bug := range []struct {
		name, file, is, becomes string
		runs                    int // 300 unless it takes more to meet it
	}{
		{name: "a read skips its barrier", file: "consensus/read.go",
			is:      "func (r *Replica) ReadBarrier(ctx context.Context) error {\n",
			becomes: "func (r *Replica) ReadBarrier(ctx context.Context) error {\n\tif ctx != nil {\n\t\treturn nil\n\t}\n"},
		{name: "a leader answers reads without asking a majority", file: "consensus/read.go",
			is:      "if err := l.rounds.confirm(); err != nil {",
			becomes: "if err := error(nil); err != nil {",
			runs:    1000},
		{name: "a leader counts old answers", file: "consensus/rounds.go", // as hashicorp/raft's VerifyLeader does
			is:      "max(x.confirmed, round)",
			becomes: "v.begun",
			runs:    1000},
		{name: "an append is answered before it is synced", file: "consensus/journal.go",
			is:      "err = j.file.Sync()",
			becomes: "err = nil"},
		{name: "a journal goes on after a failed sync", file: "consensus/journal.go", // as if the next one covered it
			is:      "err = j.file.Sync()",
			becomes: "if err = j.file.Sync(); err != nil {\n\t\t\terr = j.file.Sync()\n\t\t}",
			runs:    500},
		{name: "a leader applies what it has not written", file: "consensus/replica.go",
			is:   "r.machine.durable = r.disk.queue.awaitDurable\n",
			runs: 1000}, // it must die, and the one follower that has the entry be away
		{name: "a vote is not written down", file: "consensus/disk.go",
			is:      "func (d *disk) Set(key, value []byte) error {\n",
			becomes: "func (d *disk) Set(key, value []byte) error {\n\tif d != nil {\n\t\treturn nil\n\t}\n"},
		{name: "a watch is kept without a leader", file: "consensus/touch.go",
			is:      "\t\tclose(now.lost)\n",
			becomes: "\t\tfunc(chan struct{}) {}(now.lost)\n"},
		{name: "a history is cut too early", file: "state/window.go",
			is:      "(s.options.HistoryAge + s.options.HistoryAge/10)",
			becomes: "(s.options.HistoryAge / 2)"},
		{name: "a revision is used twice", file: "state/store.go",
			is:      "h.revision++",
			becomes: "if h.revision%17 != 0 || len(s.fresh) != 0 {\n\t\th.revision++\n\t}"},
		{name: "a watch skips an event", file: "state/watch.go",
			is:      "for _, e := range events {\n\t\t\tkey := e.KV.Key\n",
			becomes: "for _, e := range events {\n\t\t\tkey := e.KV.Key\n\t\t\tif e.Revision%13 == 0 {\n\t\t\t\tcontinue\n\t\t\t}\n"},
	} {
		t.Run(bug.name, func(t *testing.T) {
			root, err := filepath.Abs("../..")
			if err != nil {
				t.Fatal(err)
			}
			path := filepath.Join(root, filepath.FromSlash(bug.file))
			right, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			if n := strings.Count(string(right), bug.is); n != 1 {
				t.Fatalf("%s has %d places to plant the bug in, must be 1: %q", bug.file, n, bug.is)
			}
			wrong := filepath.Join(t.TempDir(), filepath.Base(path))
			if err := os.WriteFile(wrong, []byte(strings.Replace(string(right), bug.is, bug.becomes, 1)), 0o600); err != nil {
				t.Fatal(err)
			}
			overlay, err := json.Marshal(map[string]any{"Replace": map[string]string{path: wrong}})
			if err != nil {
				t.Fatal(err)
			}
			list := filepath.Join(t.TempDir(), "overlay.json")
			if err := os.WriteFile(list, overlay, 0o600); err != nil {
				t.Fatal(err)
			}
			binary := filepath.Join(t.TempDir(), "sim.test")
			began := time.Now()
			if out, err := exec.Command("go", "test", "-c", "-overlay", list, "-ldflags", "-s -w", "-o", binary, ".").CombinedOutput(); err != nil {
				t.Fatalf("the bug does not compile: %v\n%s", err, out)
			}
			built := time.Since(began)
			out, err := exec.Command(binary, "-test.run", "^TestSim$", "-runs", fmt.Sprint(cmp.Or(bug.runs, 300)), "-test.failfast", "-test.timeout", "15m", "-test.v").CombinedOutput()
			text := string(out)
			if strings.Contains(text, "test timed out") || strings.Contains(text, "SIGQUIT") {
				t.Fatalf("the runs came to no end within the timeout:\n%.2000s", text)
			}
			lives := strings.Count(text, "    --- PASS: TestSim/") + strings.Count(text, "    --- FAIL: TestSim/")
			if err == nil || !strings.Contains(text, "history kept in") && !strings.Contains(text, "panic:") {
				t.Fatalf("%d runs did not find it:\n%.2000s", cmp.Or(bug.runs, 300), text)
			}
			t.Logf("found after %d lives, in %.1fs (built in %.1fs): %s", lives, time.Since(began).Seconds()-built.Seconds(), built.Seconds(), firstViolation(text))
		})
	}
}

func firstViolation(text string) string {
	lines := strings.Split(text, "\n")
	for i, line := range lines {
		if strings.Contains(line, "sim_test.go") && strings.HasSuffix(line, ":") && i+1 < len(lines) && !strings.Contains(line, "faults") {
			return strings.TrimSpace(lines[i+1])
		}
		if strings.HasPrefix(line, "panic:") {
			return line
		}
	}
	return lines[0]
}
