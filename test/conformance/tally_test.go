package main

import (
	"bytes"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// two rounds: one test that passes, one that fails once, one that skips itself, and one
// that passed in the only round that it was in.
var two = [][]outcome{
	{
		{"[sig-node] good [Conformance]", passed, "", time.Second},
		{"[sig-node] flaky [Conformance]", passed, "", time.Second},
		{"[sig-apps] moot [Conformance]", skipped, "needs three nodes", 0},
	},
	{
		{"[sig-node] good [Conformance]", passed, "", time.Second},
		{"[sig-node] flaky [Conformance]", "timedout", "Timed out", time.Second},
		{"[sig-apps] moot [Conformance]", skipped, "needs three nodes", 0},
		{"[sig-node] other", passed, "", 0},
	},
}

func TestTable(t *testing.T) {
	t.Parallel()
	var b bytes.Buffer
	tally(two).print(&b)
	require.Equal(t, `
       SIG  passed  failed  skipped  of  time
  sig-apps       0       0        1   1    0s
  sig-node       2       1        0   3    4s
       all       2       1        1   4    4s

skipped: [sig-apps] moot [Conformance]
    needs three nodes

failed 1 of 2 times: [sig-node] flaky [Conformance]
    Timed out
`, b.String())
}

func TestJudge(t *testing.T) {
	t.Parallel()
	all := tally(two)
	for name, c := range map[string]struct {
		must          []string
		whole         bool
		broken, fresh int
		absent        int
		fails         bool
	}{
		"nothing has to pass yet":           {fresh: 1},
		"what has to, passed":               {must: []string{"[sig-node] good [Conformance]"}},
		"failed in one round of two":        {must: []string{"[sig-node] flaky [Conformance]"}, broken: 1, fresh: 1, fails: true},
		"skipped itself":                    {must: []string{"[sig-apps] moot [Conformance]"}, broken: 1, fresh: 1, fails: true},
		"not chosen":                        {must: []string{"[sig-node] left out [Conformance]"}, fresh: 1},
		"not run, though all were to be":    {must: []string{"[sig-node] left out [Conformance]"}, whole: true, absent: 1, fresh: 1, fails: true},
		"what passed is of all, and passed": {must: []string{"[sig-node] good [Conformance]"}, whole: true},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			v := all.judge(c.must, c.whole)
			require.Len(t, v.broken, c.broken)
			require.Len(t, v.absent, c.absent)
			require.Len(t, v.fresh, c.fresh)
			require.Equal(t, c.fails, v.err() != nil)
		})
	}
}

func TestPassingOnlyGrows(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "passing.txt")
	require.NoError(t, os.WriteFile(path, []byte("b\n\n  a \n"), 0o644))
	must, err := readPassing(path)
	require.NoError(t, err)
	require.Equal(t, []string{"b", "a"}, must)
	require.NoError(t, writePassing(path, append(must, "c", "a")))
	content, err := os.ReadFile(path)
	require.NoError(t, err)
	require.Equal(t, "a\nb\nc\n", string(content))

	_, err = readPassing(filepath.Join(t.TempDir(), "nowhere"))
	require.ErrorContains(t, err, "that must pass", "a run without its list checks nothing")
}

// The list in the tree is one that writePassing wrote: a name twice or out of order is a
// merge gone wrong.
func TestPassingIsInOrder(t *testing.T) {
	t.Parallel()
	must, err := readPassing("passing.txt")
	require.NoError(t, err)
	path := filepath.Join(t.TempDir(), "passing.txt")
	require.NoError(t, writePassing(path, must))
	want, err := os.ReadFile(path)
	require.NoError(t, err)
	have, err := os.ReadFile("passing.txt")
	require.NoError(t, err)
	require.Equal(t, string(want), string(have), "write it with GROW=1")
}

// The part that .ci/run runs is of tests that have to pass anyway, of each SIG some.
func TestPart(t *testing.T) {
	t.Parallel()
	must, err := readPassing("passing.txt")
	require.NoError(t, err)
	part, err := readPassing("part.txt")
	require.NoError(t, err)
	require.Subset(t, must, part)
	sig := func(name string) string { return strings.SplitAfter(name, "]")[0] }
	some := map[string]bool{}
	for _, name := range part {
		some[sig(name)] = true
	}
	for _, name := range must {
		require.True(t, some[sig(name)], "no test of %s is in part.txt", sig(name))
	}
	re := regexp.MustCompile(exactly(part))
	for _, name := range must {
		require.Equal(t, slices.Contains(part, name), re.MatchString("Kubernetes e2e suite "+name), name)
	}
}

func TestOptions(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		o    options
		rest []string
		want string
	}{
		"a name without -focus": {options{repeat: 1, procs: 1}, []string{"Secret"}, "-focus"},
		"no round":              {options{procs: 1}, nil, "-repeat 0"},
		"no process":            {options{repeat: 1}, nil, "-procs 0"},
		"a list and -focus":     {options{repeat: 1, procs: 1, list: "part.txt", focus: "Secret"}, nil, "-list"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			require.ErrorContains(t, c.o.check(c.rest), c.want)
		})
	}
	o := options{repeat: 1, procs: 1, out: "run/x"}
	require.NoError(t, o.check(nil))
	require.True(t, filepath.IsAbs(o.out), "ginkgo runs in another folder")
}
