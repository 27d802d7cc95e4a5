package main

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

const output = `+++ Running case
Recording: record_command_canary
Recording: run_crd_tests
Running command: run_crd_tests
Recording: run_pod_tests
Error when running run_pod_tests
Recording: run_wait_tests
`

func TestJudge(t *testing.T) {
	for _, test := range []struct {
		name  string
		known map[string]string
		exit  error
		cut   string // where the output ends
		want  string // in the error; "" is none
	}{
		{"a failure is not on the list", nil, errors.New("exit status 1"), "", "run_pod_tests failed, and is not on the list"},
		{"as the list says", map[string]string{"run_pod_tests": "no such thing"}, errors.New("exit status 1"), "", ""},
		{"a test on the list passes", map[string]string{"run_pod_tests": "x", "run_crd_tests": "y"}, nil, "", "run_crd_tests passes: take it off the list"},
		{"a test on the list is gone", map[string]string{"run_pod_tests": "x", "run_old_tests": "y"}, nil, "", "run_old_tests is on the list and was not run"},
		{"broken between two tests", nil, errors.New("exit status 1"), "Error when running run_pod", "ended after run_pod_tests: exit status 1"},
	} {
		t.Run(test.name, func(t *testing.T) {
			text := output
			if test.cut != "" {
				text = text[:strings.Index(text, test.cut)]
			}
			got := &tally{}
			for text != "" { // in pieces
				n := min(7, len(text))
				if _, err := got.Write([]byte(text[:n])); err != nil {
					t.Fatal(err)
				}
				text = text[n:]
			}
			got.exited(test.exit)
			err := got.judge(&bytes.Buffer{}, test.known, true)
			if test.want == "" && err != nil || test.want != "" && (err == nil || !strings.Contains(err.Error(), test.want)) {
				t.Errorf("%v, want %q", err, test.want)
			}
		})
	}
}

func TestReadFailing(t *testing.T) {
	path := filepath.Join(t.TempDir(), "failing.txt")
	if err := os.WriteFile(path, []byte("# why\n\nrun_a_tests  because of b\nrun_c_tests\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := readFailing(path); err == nil || !strings.Contains(err.Error(), `failing.txt:4: "run_c_tests" has no reason`) {
		t.Error(err)
	}
	known, err := readFailing("failing.txt")
	if err != nil {
		t.Error(err)
	}
	for name := range known {
		if !strings.HasPrefix(name, "run_") || !strings.HasSuffix(name, "_tests") {
			t.Errorf("%s is no name of a test", name)
		}
	}
}
