package cluster

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
)

// searchPath is PATH with the folders that system programs are in, which a
// user's PATH may lack.
func searchPath() string {
	dirs := filepath.SplitList(os.Getenv("PATH"))
	for _, dir := range []string{"/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin"} {
		if !slices.Contains(dirs, dir) {
			dirs = append(dirs, dir)
		}
	}
	return strings.Join(dirs, string(filepath.ListSeparator))
}

// needs is what a host has to have, and the Debian package that it is in.
var needs = []struct{ program, aptPackage string }{
	{"containerd", "containerd"},
	{"containerd-shim-runc-v2", "containerd"},
	{"runc", "runc"},
	{"nft", "nftables"},
	{"nsenter", "util-linux"},
}

// cniDirs are where distributions put the CNI plugins.
var cniDirs = []string{"/opt/cni/bin", "/usr/lib/cni", "/usr/libexec/cni"}

// CheckHost returns one error that says all that keeps a cluster from running
// on this host.
func CheckHost() error {
	if os.Geteuid() != 0 {
		return errors.New("making machines takes root: run it with sudo")
	}
	os.Setenv("PATH", searchPath())
	var missing, packages []string
	lack := func(what, aptPackage string) {
		missing = append(missing, what)
		if !slices.Contains(packages, aptPackage) {
			packages = append(packages, aptPackage)
		}
	}
	for _, need := range needs {
		if _, err := exec.LookPath(need.program); err != nil {
			lack(need.program, need.aptPackage)
		}
	}
	found := slices.ContainsFunc(cniDirs, func(dir string) bool {
		_, err := os.Stat(filepath.Join(dir, "bridge"))
		return err == nil
	})
	if !found {
		lack("the CNI plugins", "containernetworking-plugins")
	}
	if len(missing) > 0 {
		return fmt.Errorf("this host lacks %s: apt-get install -y %s (or `make up`, which does it)",
			strings.Join(missing, ", "), strings.Join(packages, " "))
	}
	return nil
}

// checkPrograms looks for Timonel's own programs and images.
func (s *Spec) checkPrograms() error {
	for _, name := range []string{"controller", "agent", "machine"} {
		if _, err := exec.LookPath(s.program(name)); err != nil {
			return fmt.Errorf("program %s is not in %s: run `make build`, or name another folder with --bin", name, s.Bin)
		}
	}
	if s.Agents == 0 {
		return nil
	}
	if found, err := filepath.Glob(filepath.Join(s.Images, "*.tar")); err != nil || len(found) == 0 {
		return fmt.Errorf("no images in %s: run `make images`, or name another folder with --images", s.Images)
	}
	return nil
}
