package durable

import (
	"errors"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestWriteFileReplacesWhole(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(t.TempDir(), "a", "b")
	if err := MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "file")
	for _, content := range []string{"first, and longer", "second"} {
		if err := WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		if got, err := os.ReadFile(path); err != nil || string(got) != content {
			t.Errorf("%q, %v, want %q", got, err, content)
		}
	}
	if _, err := os.Stat(path + ".tmp"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the temporary file is still there: %v", err)
	}
	if info, err := os.Stat(path); err != nil || info.Mode() != 0o600 {
		t.Errorf("%v, %v", info, err)
	}
	if err := WriteFile(filepath.Join(dir, "none", "file"), nil, 0o600); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("into a folder that is not there: %v", err)
	}
	if err := MkdirAll(path, 0o700); err == nil {
		t.Error("a folder was made where a file is")
	}
}

func TestRenameBetweenFolders(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	for _, name := range []string{"a", "b"} {
		if err := os.Mkdir(filepath.Join(dir, name), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	from, to := filepath.Join(dir, "a", "x"), filepath.Join(dir, "b", "y")
	if err := os.WriteFile(from, []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := Rename(from, to); err != nil {
		t.Fatal(err)
	}
	if got, err := os.ReadFile(to); err != nil || string(got) != "x" {
		t.Errorf("%q, %v", got, err)
	}
	if err := Rename(from, to); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("of nothing: %v", err)
	}
}

// Files are renamed in no other way than this package's, but for those of which it says
// why; and the log and the backups write files and make folders in no other way either.
func TestNothingElseRenames(t *testing.T) {
	t.Parallel()
	may := map[string]string{
		"internal/durable/durable.go":  "this is it",
		"agent/desired/writer.go":      "syncs the folders of many objects at once",
		"agent/hostile/remove.go":      "sets aside what is removed",
		"agent/hostile/root.go":        "renames beneath an open folder; its callers sync what is to last",
		"pki/bundle.go":                "puts a folder over an empty one, and syncs the one above",
		"consensus/recover.go":         "exchanges two names, and syncs their folder",
		"images/build/archive.go":      "a build: what is lost is built again",
		"images/build/debian.go":       "likewise",
		"internal/cluster/up.go":       "a cluster of this machine alone, for development",
		"internal/cluster/spec.go":     "likewise",
		"internal/machines/machine.go": "a process's state, which is of no use after a power cut",
	}
	const root = "../.."
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() && path != root && strings.HasPrefix(d.Name(), ".") {
			return filepath.SkipDir
		}
		if d.IsDir() || !strings.HasSuffix(path, ".go") || strings.HasSuffix(path, "_test.go") {
			return nil
		}
		name := filepath.ToSlash(strings.TrimPrefix(path, root+string(filepath.Separator)))
		set := token.NewFileSet()
		file, err := parser.ParseFile(set, path, nil, 0)
		if err != nil {
			return err
		}
		renames := false
		ast.Inspect(file, func(n ast.Node) bool {
			s, ok := n.(*ast.SelectorExpr)
			if !ok {
				return true
			}
			x, ok := s.X.(*ast.Ident)
			if !ok || x.Name != "os" && x.Name != "syscall" && x.Name != "unix" {
				return true
			}
			switch s.Sel.Name {
			case "Rename", "Renameat", "Renameat2":
				renames = true
				if may[name] == "" {
					t.Errorf("%s: %s.%s: a power cut may undo it; use package durable", set.Position(n.Pos()), x.Name, s.Sel.Name)
				}
			case "WriteFile", "MkdirAll":
				if dir := filepath.Dir(name); dir == "consensus" || dir == "backup" {
					t.Errorf("%s: %s.%s: a power cut may undo it; use package durable", set.Position(n.Pos()), x.Name, s.Sel.Name)
				}
			}
			return true
		})
		if !renames && may[name] != "" {
			t.Errorf("%s renames nothing any more", name)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}
