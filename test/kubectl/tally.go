package main

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"slices"
	"strings"
	"time"
)

// tally reads the tests' output as it comes, line by line.
type tally struct {
	rest   []byte
	ran    []string // in order
	failed []string
	took   time.Duration
	broken error // the tests ended before the last
}

const maxLine = 1 << 20 // of which only the start matters

// Write implements io.Writer.
func (t *tally) Write(p []byte) (int, error) {
	t.rest = append(t.rest, p...)
	for {
		line, rest, ok := bytes.Cut(t.rest, []byte("\n"))
		if !ok {
			t.rest = t.rest[:min(len(t.rest), maxLine)]
			return len(p), nil
		}
		t.rest = rest
		t.line(string(line))
	}
}

func (t *tally) line(line string) {
	if name, ok := strings.CutPrefix(line, "Recording: "); ok && name != "record_command_canary" {
		t.ran = append(t.ran, name)
	}
	if name, ok := strings.CutPrefix(line, "Error when running "); ok {
		t.failed = append(t.failed, name)
	}
}

func (t *tally) last() string {
	if len(t.ran) == 0 {
		return "none"
	}
	return t.ran[len(t.ran)-1]
}

// exited notes how the script ended: a failure that no test accounts for is one of what
// is between the tests.
func (t *tally) exited(err error) {
	if err != nil && len(t.failed) == 0 {
		t.broken = fmt.Errorf("the script ended after %s: %w", t.last(), err)
	}
}

// judge prints the result, and returns an error when it is not what the list says.
func (t *tally) judge(w io.Writer, known map[string]string, all bool) error {
	fmt.Fprintf(w, "%d tests, %d passed, %d failed, in %s\n", len(t.ran), len(t.ran)-len(t.failed), len(t.failed), t.took.Round(time.Second))
	errs := []error{t.broken}
	for _, name := range t.failed {
		if why, ok := known[name]; ok {
			fmt.Fprintf(w, "  %s fails: %s\n", name, why)
		} else {
			errs = append(errs, fmt.Errorf("%s failed, and is not on the list", name))
		}
	}
	for _, name := range slices.Sorted(maps.Keys(known)) {
		switch ran := slices.Contains(t.ran, name); {
		case ran && !slices.Contains(t.failed, name):
			errs = append(errs, fmt.Errorf("%s passes: take it off the list", name))
		case !ran && all:
			errs = append(errs, fmt.Errorf("%s is on the list and was not run", name))
		}
	}
	return errors.Join(errs...)
}

// readFailing reads the list: a name and a reason a line, # begins a comment.
func readFailing(path string) (map[string]string, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	known := map[string]string{}
	lines := bufio.NewScanner(f)
	for n := 1; lines.Scan(); n++ {
		line := strings.TrimSpace(lines.Text())
		if line == "" || strings.HasPrefix(line, "#") {
			continue
		}
		name, why, ok := strings.Cut(line, " ")
		if why = strings.TrimSpace(why); !ok || why == "" {
			return nil, fmt.Errorf("%s:%d: %q has no reason behind it", path, n, name)
		}
		known[name] = why
	}
	return known, lines.Err()
}
