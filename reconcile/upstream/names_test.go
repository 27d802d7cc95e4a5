package upstream

import (
	"go/ast"
	"go/parser"
	"go/token"
	"net/netip"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"k8s.io/kubernetes/cmd/kube-controller-manager/app"

	"timonel/internal/podrange"
	"timonel/reconcile/standard"
)

// namesOfUpstream reads the constants of upstream's list of controllers.
func namesOfUpstream(t *testing.T) []string {
	t.Helper()
	dir, err := exec.Command("go", "list", "-f", "{{.Dir}}", "k8s.io/kubernetes/cmd/kube-controller-manager/names").Output()
	if err != nil {
		t.Fatalf("find upstream's names: %v", err)
	}
	file, err := parser.ParseFile(token.NewFileSet(), filepath.Join(strings.TrimSpace(string(dir)), "controller_names.go"), nil, 0)
	if err != nil {
		t.Fatal(err)
	}
	var out []string
	ast.Inspect(file, func(n ast.Node) bool {
		if spec, ok := n.(*ast.ValueSpec); ok {
			for _, value := range spec.Values {
				name, err := strconv.Unquote(value.(*ast.BasicLit).Value)
				if err != nil {
					t.Fatal(err)
				}
				out = append(out, name)
			}
		}
		return true
	})
	if len(out) < 40 {
		t.Fatalf("only %d names were found: %v", len(out), out)
	}
	return out
}

// Each of upstream's controllers is ours, runs here, or is left out with a reason.
func TestEveryNameOfUpstream(t *testing.T) {
	t.Parallel()
	lists := map[string][]string{}
	for name := range ours {
		lists[name] = append(lists[name], "ours")
	}
	for _, s := range run() {
		lists[s.name] = append(lists[s.name], "run")
	}
	for name, reason := range leftOut {
		lists[name] = append(lists[name], "left out")
		if len(strings.Fields(reason)) < 5 {
			t.Errorf("%s is left out for no reason but %q", name, reason)
		}
	}
	for _, name := range namesOfUpstream(t) {
		if got := lists[name]; len(got) != 1 {
			t.Errorf("%s is in the lists %v, want one", name, got)
		}
		delete(lists, name)
	}
	for name, in := range lists {
		t.Errorf("%s is in the lists %v and no name of upstream's", name, in)
	}
	// What a reconciler does, none of upstream's does too.
	reconcilers, err := standard.Reconcilers(standard.Config{Pods: podrange.Ranges{Networks: []netip.Prefix{netip.MustParsePrefix("10.244.0.0/16")}}})
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range reconcilers {
		if slices.ContainsFunc(run(), func(s started) bool { return s.name == r.Name() }) || leftOut[r.Name()] != "" {
			t.Errorf("%s is a reconciler of Timonel, and not in the list of ours", r.Name())
		}
	}
	descriptors := app.NewControllerDescriptors()
	for _, s := range run() {
		if descriptors[s.name] == nil {
			t.Errorf("upstream has no descriptor of %s", s.name)
		}
	}
}

// The page for the user says of each controller what the lists do.
func TestPageOfControllers(t *testing.T) {
	t.Parallel()
	page := readPage(t)
	want := map[string]string{}
	for name := range ours {
		want[name] = "ours"
	}
	for _, s := range run() {
		want[s.name] = "Kubernetes'"
	}
	for name := range leftOut {
		want[name] = "left out"
	}
	for name, who := range want {
		if page[name] != who {
			t.Errorf("docs/controllers.md says of %s %q, want %q", name, page[name], who)
		}
	}
	for name := range page {
		if want[name] == "" {
			t.Errorf("docs/controllers.md has a row of %s, which upstream has not", name)
		}
	}
}
