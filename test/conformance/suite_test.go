package main

import (
	"bytes"
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// No test of these is parallel: a program that is started while another is written
// would hold that open, and it could not be started.

// fakeGinkgo writes a report into its --output-dir, as ginkgo does, unless the folder's
// name matches the pattern of rounds in which it dies before. It exits with 1, as ginkgo
// does when tests failed.
func fakeGinkgo(t *testing.T, dies, serial string) *options {
	t.Helper()
	o := &options{bin: t.TempDir(), out: t.TempDir(), labels: "Conformance", repeat: 3, procs: 2, timeout: time.Minute}
	dir := filepath.Join(o.bin, "conformance")
	require.NoError(t, os.MkdirAll(dir, 0o755))
	const one = `[{"SpecReports": [{"LeafNodeType": "It", "LeafNodeText": "a test", "State": "failed", "Failure": {"Message": "why"}}]}]`
	script := `#!/bin/sh
for a; do case $a in --output-dir=*) dir=${a#--output-dir=} ;; esac; done
echo "$(basename $dir)" >> ` + filepath.Join(o.out, "calls") + `
case $dir in
` + dies + `) exit 2 ;;
*-serial) echo '` + serial + `' ;;
*) echo '` + one + `' ;;
esac > $dir/report.json.new
mv $dir/report.json.new $dir/report.json
exit 1
`
	require.NoError(t, os.WriteFile(filepath.Join(dir, "ginkgo"), []byte(script), 0o755))
	return o
}

const noTest = `[{"SpecReports": [{"LeafNodeType": "It", "LeafNodeText": "a test", "State": "skipped"}]}]`

func TestRounds(t *testing.T) {
	o := fakeGinkgo(t, "nothing", noTest)
	var b bytes.Buffer
	rounds, err := o.rounds(t.Context(), "/kubeconfig", &b)
	require.NoError(t, err, "tests that fail are no failure to run them")
	require.Len(t, rounds, 3)
	require.Equal(t, []outcome{{"a test", "failed", "why", 0}}, rounds[2])
	require.Contains(t, b.String(), "round 3 of 3: 0 passed, 1 failed, 0 skipped")
	calls, err := os.ReadFile(filepath.Join(o.out, "calls"))
	require.NoError(t, err)
	require.Equal(t, "round-01-parallel\nround-01-serial\nround-02-parallel\nround-03-parallel\n", string(calls), "serial tests are not looked for again when there are none")
}

func TestRoundsKeepWhatWasSeen(t *testing.T) {
	o := fakeGinkgo(t, "*round-02-serial", `[{"SpecReports": [{"LeafNodeType": "It", "LeafNodeText": "serial", "State": "passed"}]}]`)
	rounds, err := o.rounds(t.Context(), "/kubeconfig", &bytes.Buffer{})
	require.ErrorContains(t, err, "round 2, serial tests: ginkgo wrote no report: see ")
	require.Len(t, rounds, 1)
	require.Len(t, rounds[0], 2)
}

func TestRoundsOfNothing(t *testing.T) {
	o := fakeGinkgo(t, "nothing", noTest)
	require.NoError(t, os.WriteFile(filepath.Join(o.bin, "conformance", "ginkgo"),
		[]byte("#!/bin/sh\nfor a; do case $a in --output-dir=*) echo '"+noTest+"' > ${a#--output-dir=}/report.json ;; esac; done\n"), 0o755))
	o.focus = "a typing mistake"
	_, err := o.rounds(t.Context(), "/kubeconfig", &bytes.Buffer{})
	require.ErrorContains(t, err, "a typing mistake", "a run of no test passes nothing")
}

// Whoever is told to end leaves no process of ginkgo's behind that goes on testing.
func TestRoundsEndWhatTheyStarted(t *testing.T) {
	o := fakeGinkgo(t, "nothing", noTest)
	pidFile := filepath.Join(o.out, "pid")
	require.NoError(t, os.WriteFile(filepath.Join(o.bin, "conformance", "ginkgo"),
		[]byte("#!/bin/sh\nsleep 1000 &\necho $! > "+pidFile+".new\nmv "+pidFile+".new "+pidFile+"\ntrap 'exit 1' INT\nwait\n"), 0o755))
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var pid string
	go func() { // ends with the test, or before
		for ctx.Err() == nil {
			if content, err := os.ReadFile(pidFile); err == nil {
				pid = strings.TrimSpace(string(content))
				cancel()
			}
			time.Sleep(10 * time.Millisecond)
		}
	}()
	_, err := o.rounds(ctx, "/kubeconfig", &bytes.Buffer{})
	require.ErrorIs(t, err, context.Canceled)
	require.NotEmpty(t, pid)
	require.Eventually(t, func() bool { // a process that nobody has waited for yet has no arguments
		arguments, err := os.ReadFile(filepath.Join("/proc", pid, "cmdline"))
		return err != nil || len(arguments) == 0
	}, time.Minute, 10*time.Millisecond, "process %s goes on", pid)
}
