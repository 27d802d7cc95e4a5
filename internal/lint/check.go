package main

import (
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"maps"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
)

// banned are functions by the import path of their package; "*": all of them.
var banned = map[string]string{
	"os": "Chdir Chmod Chown Chtimes CopyFS Create CreateTemp DirFS Lchown Link Lstat Mkdir MkdirAll MkdirTemp Open OpenFile " +
		"OpenInRoot OpenRoot ReadDir ReadFile Readlink Remove RemoveAll Rename Stat Symlink Truncate WriteFile",
	"io":            "ReadAll",
	"io/ioutil":     "*",
	"path/filepath": "EvalSymlinks Glob Walk WalkDir",
	"net/http":      "Dir FileServer FileServerFS ServeFile ServeFileFS",
	// Reads lines of any length, by path.
	"k8s.io/cri-client/pkg/logs": "ReadLogs",
	"golang.org/x/sys/unix":      system,
	"syscall":                    system,
}

const system = "Access Chdir Chmod Chown Chroot Creat Faccessat Faccessat2 Fchmodat Fchownat Fstatat Lchown Lgetxattr Link Linkat " +
	"Lsetxattr Lstat Mkdir Mkdirat Mkfifo Mknod Mknodat Mount MoveMount Open OpenTree Openat Openat2 PivotRoot Readlink Readlinkat " +
	"Rename Renameat Renameat2 Rmdir Setxattr Stat Statfs Symlink Symlinkat Truncate Unlink Unlinkat Unmount Utimes UtimesNanoAt"

// methods read up to a byte that may never come, whatever they are methods of.
var methods = []string{"ReadBytes", "ReadString"}

// allowance is a use that is right.
type allowance struct {
	file  string // slash path from the root of the module
	names string // such as "os.ReadFile", separated by spaces
	why   string
}

// finding is one use that is not.
type finding struct {
	pos  string
	text string
}

func (f finding) String() string { return f.pos + ": " + f.text }

// check looks at all of agent/ below root but agent/hostile.
func check(root string, allow []allowance) ([]finding, error) {
	var out []finding
	unused := map[string]bool{} // "file name"
	for _, a := range allow {
		if a.why == "" {
			out = append(out, finding{"internal/lint/allow.go", a.file + ": say why"})
		}
		for _, name := range strings.Fields(a.names) {
			unused[a.file+" "+name] = true
		}
	}
	may := maps.Clone(unused)
	err := filepath.WalkDir(filepath.Join(root, "agent"), func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(root, p)
		if err != nil {
			return err
		}
		rel = filepath.ToSlash(rel)
		if d.IsDir() {
			if rel == "agent/hostile" || d.Name() == "testdata" {
				return fs.SkipDir
			}
			return nil
		}
		if path.Ext(rel) != ".go" || strings.HasSuffix(rel, "_test.go") {
			return nil
		}
		uses, err := usesOf(p)
		if err != nil {
			return err
		}
		for _, u := range uses {
			key := rel + " " + u.text
			delete(unused, key)
			if !may[key] {
				out = append(out, finding{rel + ":" + u.pos, u.text + " by path or without a limit"})
			}
		}
		return nil
	})
	for _, key := range slices.Sorted(maps.Keys(unused)) {
		out = append(out, finding{"internal/lint/allow.go", "nothing needs " + key + " any more"})
	}
	return out, err
}

// usesOf lists the banned names that one file uses, with their lines.
func usesOf(file string) ([]finding, error) {
	set := token.NewFileSet()
	f, err := parser.ParseFile(set, file, nil, parser.SkipObjectResolution)
	if err != nil {
		return nil, err
	}
	var out []finding
	add := func(at token.Pos, text string) {
		out = append(out, finding{strconv.Itoa(set.Position(at).Line), text})
	}
	imports := map[string]string{} // local name to import path
	for _, spec := range f.Imports {
		name, err := strconv.Unquote(spec.Path.Value)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", file, err)
		}
		if _, ok := banned[name]; !ok {
			continue
		}
		local := path.Base(name)
		if spec.Name != nil {
			local = spec.Name.Name
		}
		if local == "." {
			add(spec.Pos(), "import . "+strconv.Quote(name))
			continue
		}
		imports[local] = name
	}
	ast.Inspect(f, func(n ast.Node) bool {
		sel, ok := n.(*ast.SelectorExpr)
		if !ok {
			return true
		}
		if x, ok := sel.X.(*ast.Ident); ok {
			if name, ok := imports[x.Name]; ok {
				if list := strings.Fields(banned[name]); list[0] == "*" || slices.Contains(list, sel.Sel.Name) {
					add(sel.Pos(), path.Base(name)+"."+sel.Sel.Name)
				}
				return true
			}
		}
		if slices.Contains(methods, sel.Sel.Name) {
			add(sel.Pos(), sel.Sel.Name)
		}
		return true
	})
	return out, nil
}
