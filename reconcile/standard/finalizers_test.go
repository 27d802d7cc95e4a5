package standard_test

import (
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"timonel/reconcile/standard"
)

// answered is what admission and the registries of the API put on objects so that
// they cannot go until somebody has taken it off, by the file of upstream's that does
// so, and who takes it off: a reconciler of this package, or the API server.
var answered = map[string]string{
	"plugin/pkg/admission/storage/storageobjectinuseprotection/admission.go: pv":  "persistentvolume-protection-controller",
	"plugin/pkg/admission/storage/storageobjectinuseprotection/admission.go: pvc": "persistentvolumeclaim-protection-controller",
	"plugin/pkg/admission/storage/storageobjectinuseprotection/admission.go: vac": "volumeattributesclass-protection-controller",
	// Of a feature that is off: nothing is put on.
	"plugin/pkg/admission/scheduling/podgroupprotection/admission.go: pg": "",
	"pkg/registry/core/namespace/strategy.go: namespace.Spec":             "namespace-controller",
	// foregroundDeletion and orphan, as a deletion asks for them.
	"pkg/registry/generic/registry/store.go: new": "garbage-collector-controller",
	// The API server's own finalizing controller.
	"pkg/registry/customresourcedefinition/etcd.go: existingCRD": "API server",
	// These only take finalizers off, as asked.
	"pkg/registry/core/namespace/storage/storage.go: new": "API server",
}

// TestFinalizersAreAnswered reads upstream's admission and registries: whatever they
// put on objects has an answer here, or its objects could never be deleted.
func TestFinalizersAreAnswered(t *testing.T) {
	t.Parallel()
	reconcilers, err := standard.Reconcilers(standard.Config{})
	if err != nil {
		t.Fatal(err)
	}
	names := []string{"API server", ""}
	for _, r := range reconcilers {
		names = append(names, r.Name())
	}
	for where, by := range answered {
		if !slices.Contains(names, by) {
			t.Errorf("what %s puts on objects is answered by %s, which is none of the reconcilers %q", where, by, names)
		}
	}
	adds := regexp.MustCompile(`append\((\w+(?:\.Spec)?)\.?Finalizers,`)
	found := map[string]bool{}
	for module, folders := range map[string][]string{
		"k8s.io/kubernetes": {"plugin/pkg/admission", "pkg/registry"}, "k8s.io/apiserver": {"pkg/registry"}, "k8s.io/apiextensions-apiserver": {"pkg/registry"},
	} {
		out, err := exec.CommandContext(t.Context(), "go", "list", "-m", "-f", "{{.Dir}}", module).Output()
		if err != nil {
			t.Fatalf("go list -m %s: %v", module, err)
		}
		root := strings.TrimSpace(string(out))
		for _, folder := range folders {
			err := filepath.WalkDir(filepath.Join(root, folder), func(path string, d fs.DirEntry, err error) error {
				if err != nil || d.IsDir() || !strings.HasSuffix(path, ".go") || strings.HasSuffix(path, "_test.go") {
					return err
				}
				raw, err := os.ReadFile(path)
				if err != nil {
					return err
				}
				rel, err := filepath.Rel(root, path)
				for _, m := range adds.FindAllStringSubmatch(string(raw), -1) {
					found[rel+": "+m[1]] = true
				}
				return err
			})
			if err != nil {
				t.Fatal(err)
			}
		}
	}
	for where := range found {
		if _, ok := answered[where]; !ok {
			t.Errorf("upstream's %s puts a finalizer on objects: say in this test who takes it off", where)
		}
	}
	for where := range answered {
		if !found[where] {
			t.Errorf("upstream has no %s any more", where)
		}
	}
}
