package main

import (
	"fmt"
	"io"
	"maps"
	"regexp"
	"slices"
	"strings"
	"text/tabwriter"
	"time"
)

// test is what all rounds saw of one test.
type test struct {
	name                    string
	passed, failed, skipped int
	reason                  string // why it did not pass, the last time that it did not
	took                    time.Duration
}

// always says that it passed in every round.
func (t *test) always() bool { return t.passed > 0 && t.failed == 0 && t.skipped == 0 }

// tests are what all rounds saw, by name.
type tests map[string]*test

func tally(rounds [][]outcome) tests {
	all := tests{}
	for _, round := range rounds {
		for _, r := range round {
			t := all[r.name]
			if t == nil {
				t = &test{name: r.name}
				all[r.name] = t
			}
			t.took += r.took
			switch r.state {
			case passed:
				t.passed++
			case skipped:
				t.skipped++
			default:
				t.failed++
			}
			if r.state != passed {
				t.reason = r.reason
			}
		}
	}
	return all
}

func (all tests) sorted() []*test {
	return slices.SortedFunc(maps.Values(all), func(a, b *test) int { return strings.Compare(a.name, b.name) })
}

var sigOf = regexp.MustCompile(`\[(sig-[a-z-]+)\]`)

// sig is the special interest group that a test belongs to.
func (t *test) sig() string {
	if m := sigOf.FindStringSubmatch(t.name); m != nil {
		return m[1]
	}
	return "other"
}

// print writes the table by SIG, and each test that did not always pass, with why.
func (all tests) print(w io.Writer) {
	type row struct {
		passed, failed, skipped int
		took                    time.Duration
	}
	rows, total := map[string]*row{}, &row{}
	for _, t := range all {
		if rows[t.sig()] == nil {
			rows[t.sig()] = &row{}
		}
		for _, r := range []*row{rows[t.sig()], total} {
			switch {
			case t.always():
				r.passed++
			case t.failed > 0:
				r.failed++
			default:
				r.skipped++
			}
			r.took += t.took
		}
	}
	tw := tabwriter.NewWriter(w, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(tw, "\nSIG\tpassed\tfailed\tskipped\tof\ttime\t")
	line := func(name string, r *row) {
		fmt.Fprintf(tw, "%s\t%d\t%d\t%d\t%d\t%s\t\n", name, r.passed, r.failed, r.skipped, r.passed+r.failed+r.skipped, r.took.Round(time.Second))
	}
	for _, name := range slices.Sorted(maps.Keys(rows)) {
		line(name, rows[name])
	}
	line("all", total)
	tw.Flush()
	for _, t := range all.sorted() {
		if t.always() {
			continue
		}
		what := "skipped"
		if t.failed > 0 {
			what = "failed"
			if rounds := t.passed + t.failed + t.skipped; rounds > 1 {
				what = fmt.Sprintf("failed %d of %d times", t.failed, rounds)
			}
		}
		fmt.Fprintf(w, "\n%s: %s\n    %s\n", what, t.name, t.reason)
	}
}
