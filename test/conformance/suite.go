package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"time"
)

// outcome is how one test ended in one round.
type outcome struct {
	name   string
	state  state
	reason string // why it did not pass
	took   time.Duration
}

type state string

// The states of ginkgo's reports that are no failures.
const (
	passed  state = "passed"
	skipped state = "skipped" // by itself: the cluster is not one for it
)

// part is a share of the tests that runs in one go.
type part struct {
	name, labels string
	procs        int
	none         bool // there is no such test
}

// rounds runs the tests as often as asked for, and returns what each whole round saw,
// also when a later one could not be run.
func (o *options) rounds(ctx context.Context, kubeconfig string, w io.Writer) ([][]outcome, error) {
	parts := []part{
		{name: "parallel", labels: "(" + o.labels + ") && !Serial", procs: o.procs},
		{name: "serial", labels: "(" + o.labels + ") && Serial", procs: 1},
	}
	var rounds [][]outcome
	for n := 1; n <= o.repeat; n++ {
		begin := time.Now()
		var round []outcome
		for i := range parts {
			p := &parts[i]
			if p.none {
				continue
			}
			dir := filepath.Join(o.out, fmt.Sprintf("round-%02d-%s", n, p.name))
			all, err := o.ginkgo(ctx, dir, kubeconfig, p.labels, p.procs)
			if err != nil {
				return rounds, fmt.Errorf("round %d, %s tests: %w", n, p.name, err)
			}
			p.none = len(all) == 0
			round = append(round, all...)
		}
		if len(round) == 0 {
			return nil, fmt.Errorf("no test was run: -focus %q and -skip %q leave none of those labelled %q", o.focus, o.skip, o.labels)
		}
		rounds = append(rounds, round)
		ok, bad, moot := count(round)
		fmt.Fprintf(w, "round %d of %d: %d passed, %d failed, %d skipped in %s\n", n, o.repeat, ok, bad, moot, time.Since(begin).Round(time.Second))
	}
	return rounds, nil
}

func count(round []outcome) (ok, bad, moot int) {
	for _, r := range round {
		switch r.state {
		case passed:
			ok++
		case skipped:
			moot++
		default:
			bad++
		}
	}
	return ok, bad, moot
}

// ginkgo runs the tests that have these labels, and returns how each ended. That tests
// failed is no error; that they could not be run is.
func (o *options) ginkgo(ctx context.Context, dir, kubeconfig, labels string, procs int) ([]outcome, error) {
	if err := os.RemoveAll(dir); err != nil { // of an earlier run
		return nil, err
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, err
	}
	log, err := os.Create(filepath.Join(dir, "ginkgo.log"))
	if err != nil {
		return nil, err
	}
	defer log.Close()
	cmd := exec.CommandContext(ctx, filepath.Join(o.bin, "conformance", "ginkgo"), o.arguments(dir, kubeconfig, labels, procs)...)
	cmd.Dir, cmd.Stdout, cmd.Stderr = dir, log, log
	cmd.Env = append(os.Environ(), "KUBE_TEST_REPO_LIST="+o.registries)
	// A group of its own: who interrupts this program on a terminal does not interrupt
	// ginkgo's processes a second time, and none of them outlives ginkgo.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGINT) }
	cmd.WaitDelay = time.Minute
	var exit *exec.ExitError
	err = cmd.Run()
	if cmd.Process != nil {
		_ = syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL)
	}
	if ctx.Err() != nil {
		return nil, ctx.Err()
	} else if err != nil && !errors.As(err, &exit) {
		return nil, err
	}
	f, err := os.Open(filepath.Join(dir, reportFile))
	if err != nil {
		return nil, fmt.Errorf("ginkgo wrote no report: see %s: %w", log.Name(), err)
	}
	defer f.Close()
	all, err := readReport(f)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", f.Name(), err)
	}
	return all, nil
}

const reportFile = "report.json"

// arguments are ginkgo's and, after the dashes, the suite's.
func (o *options) arguments(dir, kubeconfig, labels string, procs int) []string {
	args := []string{fmt.Sprintf("--procs=%d", procs), "--no-color", "--timeout=" + o.timeout.String(),
		"--label-filter=" + labels, "--output-dir=" + dir, "--json-report=" + reportFile}
	if o.focus != "" {
		args = append(args, "--focus="+o.focus)
	}
	if o.skip != "" {
		args = append(args, "--skip="+o.skip)
	}
	return append(args, filepath.Join(o.bin, "conformance", "e2e.test"), "--",
		"--provider=skeleton", "--kubeconfig="+kubeconfig, "--kubectl-path="+filepath.Join(o.bin, "conformance", "kubectl"),
		"--report-dir="+dir, "--disable-log-dump", "--e2e-output-dir="+dir)
}

// readReport reads ginkgo's report: the tests that were run, and those that were to run
// and skipped themselves. Tests that the filters left out are not in what it returns.
func readReport(r io.Reader) ([]outcome, error) {
	var suites []struct {
		SpecialSuiteFailureReasons []string
		SpecReports                []struct {
			ContainerHierarchyTexts []string
			LeafNodeType            string
			LeafNodeText            string
			State                   state
			RunTime                 time.Duration
			Failure                 struct{ Message string }
		}
	}
	if err := json.NewDecoder(r).Decode(&suites); err != nil {
		return nil, err
	}
	var all []outcome
	for _, suite := range suites {
		for _, spec := range suite.SpecReports {
			why := brief(spec.Failure.Message)
			if spec.LeafNodeType != "It" {
				if spec.State != passed && spec.State != skipped {
					return nil, fmt.Errorf("%s %s: %s", spec.LeafNodeType, spec.State, why)
				}
				continue
			}
			if spec.State == "pending" || spec.State == skipped && why == "" {
				continue
			}
			name := strings.Join(append(spec.ContainerHierarchyTexts, spec.LeafNodeText), " ")
			all = append(all, outcome{name, spec.State, why, spec.RunTime})
		}
		for _, why := range suite.SpecialSuiteFailureReasons {
			// Failed tests are what the caller looks for; that not all were run is not.
			if strings.Contains(why, "Timeout") || strings.Contains(why, "Interrupted") || strings.Contains(why, "Abort") {
				return nil, fmt.Errorf("not all tests were run: %s", why)
			}
		}
	}
	return all, nil
}

// says is where a pod's status, which may be far down in a failure, tells what was wrong.
var says = regexp.MustCompile(`(?m)^ +message: (.+)$`)

// brief is the gist of a failure's message on one line of bounded length.
func brief(message string) string {
	line := cut(strings.Join(strings.Fields(message), " "), 240)
	if m := says.FindStringSubmatch(message); m != nil && !strings.Contains(line, m[1]) {
		line += " message: " + cut(m[1], 240)
	}
	return line
}

func cut(line string, most int) string {
	if runes := []rune(line); len(runes) > most {
		return string(runes[:most]) + "…"
	}
	return line
}
