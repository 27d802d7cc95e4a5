package main

import (
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// report is the shape of what ginkgo writes, with a test of each kind.
const report = `[{"SuitePath": "/x", "SuiteSucceeded": false, "SpecReports": [
 {"LeafNodeType": "SynchronizedBeforeSuite", "State": "passed"},
 {"ContainerHierarchyTexts": ["[sig-node] Pods"], "LeafNodeType": "It", "LeafNodeText": "run [Conformance]", "State": "passed", "RunTime": 2000000000, "CapturedGinkgoWriterOutput": "much"},
 {"ContainerHierarchyTexts": ["[sig-node] Pods"], "LeafNodeType": "It", "LeafNodeText": "stop [Conformance]", "State": "failed", "RunTime": 1000000000,
  "Failure": {"Message": "Timed out after 300s.\n\nExpected\n    <string>: Pending", "Location": {"FileName": "x.go"}}},
 {"ContainerHierarchyTexts": ["[sig-apps] Job"], "LeafNodeType": "It", "LeafNodeText": "panic", "State": "panicked", "Failure": {"Message": "Test Panicked"}},
 {"ContainerHierarchyTexts": ["[sig-apps] Job"], "LeafNodeType": "It", "LeafNodeText": "needs three nodes", "State": "skipped", "Failure": {"Message": "three nodes"}},
 {"ContainerHierarchyTexts": ["[sig-apps] Job"], "LeafNodeType": "It", "LeafNodeText": "left out by a filter", "State": "skipped"},
 {"ContainerHierarchyTexts": ["[sig-apps] Job"], "LeafNodeType": "It", "LeafNodeText": "not written yet", "State": "pending"},
 {"LeafNodeType": "ReportAfterSuite", "State": "passed"}
]}]`

func TestReadReport(t *testing.T) {
	t.Parallel()
	got, err := readReport(strings.NewReader(report))
	require.NoError(t, err)
	require.Equal(t, []outcome{
		{"[sig-node] Pods run [Conformance]", passed, "", 2 * time.Second},
		{"[sig-node] Pods stop [Conformance]", "failed", "Timed out after 300s. Expected <string>: Pending", time.Second},
		{"[sig-apps] Job panic", "panicked", "Test Panicked", 0},
		{"[sig-apps] Job needs three nodes", skipped, "three nodes", 0},
	}, got)
}

// A suite that was not run to its end is no result, though the tests that it did run passed.
func TestReadReportOfARunThatWasNone(t *testing.T) {
	t.Parallel()
	for name, report := range map[string]struct{ content, want string }{
		"nodes are not ready": {`[{"SpecReports": [{"LeafNodeType": "SynchronizedBeforeSuite", "State": "failed", "Failure": {"Message": "2 nodes are not ready"}},
			{"LeafNodeType": "It", "LeafNodeText": "x", "State": "skipped"}]}]`, "SynchronizedBeforeSuite failed: 2 nodes are not ready"},
		"too slow": {`[{"SpecialSuiteFailureReasons": ["Suite Timeout Elapsed"], "SpecReports": [{"LeafNodeType": "It", "LeafNodeText": "x", "State": "passed"}]}]`,
			"not all tests were run: Suite Timeout Elapsed"},
		"a process that ended": {`[{"SpecialSuiteFailureReasons": ["Interrupted by Other Ginkgo Process"]}]`, "not all tests were run"},
		"cut off":              {`[{"SpecReports": [{"LeafNodeType": "It"`, "unexpected EOF"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			_, err := readReport(strings.NewReader(report.content))
			require.ErrorContains(t, err, report.want)
		})
	}
}

func TestBriefIsBounded(t *testing.T) {
	t.Parallel()
	require.Equal(t, "a b", brief("a\n\n\t b\n"))
	require.Len(t, []rune(brief(strings.Repeat("ü", 10_000))), 241)
	status := "pod failed with status:\n" + strings.Repeat("    status: \"False\"\n", 100) + "    message: Pod was rejected: volume \"x\"\n    message: other\n"
	require.Contains(t, brief(status), ` message: Pod was rejected: volume "x"`)
	require.NotContains(t, brief(status), "other")
	require.Less(t, len(brief(strings.Repeat("y", 300)+"\n message: "+strings.Repeat("x", 10_000))), 600)
}

func TestArguments(t *testing.T) {
	t.Parallel()
	o := options{bin: "/bin", focus: "sig-storage", skip: "Slow", timeout: time.Hour}
	args := o.arguments("/out", "/kubeconfig", "(Conformance) && Serial", 1)
	require.Subset(t, args, []string{"--procs=1", "--focus=sig-storage", "--skip=Slow", "--label-filter=(Conformance) && Serial", "--timeout=1h0m0s"})
	require.Less(t, indexOf(args, "/bin/conformance/e2e.test"), indexOf(args, "--"), "the program is ginkgo's argument")
	require.Less(t, indexOf(args, "--"), indexOf(args, "--kubeconfig=/kubeconfig"), "the kubeconfig is the suite's")
	// An empty focus would be one that nothing matches, to ginkgo.
	o.focus, o.skip = "", ""
	for _, arg := range o.arguments("/out", "/kubeconfig", "Conformance", 8) {
		require.NotContains(t, arg, "--focus")
		require.NotContains(t, arg, "--skip")
	}
}

func indexOf(list []string, want string) int {
	for i, s := range list {
		if s == want {
			return i
		}
	}
	return -1
}
