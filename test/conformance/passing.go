package main

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"regexp"
	"slices"
	"strings"

	"timonel/internal/durable"
)

// readPassing reads the list of the tests that must pass, one a line.
func readPassing(path string) ([]string, error) {
	content, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("read the list of the tests that must pass: %w", err)
	}
	var list []string
	for line := range strings.Lines(string(content)) {
		if line = strings.TrimSpace(line); line != "" {
			list = append(list, line)
		}
	}
	return list, nil
}

// exactly is the regular expression for ginkgo of the tests with these names: it looks
// at a suite's description, a space and a test's name.
func exactly(names []string) string {
	quoted := make([]string, len(names))
	for i, name := range names {
		quoted[i] = regexp.QuoteMeta(name)
	}
	return " (" + strings.Join(quoted, "|") + ")$"
}

// writePassing writes the list anew: sorted, each test once.
func writePassing(path string, list []string) error {
	list = slices.Clone(list)
	slices.Sort(list)
	var b bytes.Buffer
	for _, name := range slices.Compact(list) {
		fmt.Fprintln(&b, name)
	}
	return durable.WriteFile(path, b.Bytes(), 0o644)
}

// verdict is what a run says about the list.
type verdict struct {
	broken []*test  // on the list and did not always pass
	absent []string // on the list and not run, though all were to be
	fresh  []string // not on the list and passed in every round
}

// judge compares what was seen with the list. If all tests were to run, one that is on
// the list and was not among them is missed.
func (all tests) judge(must []string, whole bool) verdict {
	var v verdict
	for _, name := range must {
		switch t := all[name]; {
		case t != nil && !t.always():
			v.broken = append(v.broken, t)
		case t == nil && whole:
			v.absent = append(v.absent, name)
		}
	}
	for _, t := range all.sorted() {
		// The list is of conformance tests; -labels may have let others in.
		if t.always() && strings.Contains(t.name, "[Conformance]") && !slices.Contains(must, t.name) {
			v.fresh = append(v.fresh, t.name)
		}
	}
	return v
}

func (v verdict) print(w io.Writer, grow bool) {
	if len(v.fresh) > 0 {
		hint := "GROW=1 adds them"
		if grow {
			hint = "added"
		}
		fmt.Fprintf(w, "\n%d tests pass that are not on the list yet (%s)\n", len(v.fresh), hint)
	}
	for _, t := range v.broken {
		fmt.Fprintf(w, "\nhas to pass, and did not: %s\n", t.name)
	}
	for _, name := range v.absent {
		fmt.Fprintf(w, "\nhas to pass, and was not run: %s\n", name)
	}
}

// err is nil when each test on the list that was to run passed in every round.
func (v verdict) err() error {
	if len(v.broken)+len(v.absent) == 0 {
		return nil
	}
	return fmt.Errorf("of the tests that have to pass %d did not and %d were not run", len(v.broken), len(v.absent))
}
