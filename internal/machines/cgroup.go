package machines

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/vishvananda/netlink"
)

// Cgroups lists the cgroups called name (an absolute path in each hierarchy) on
// this host, in cgroup v1 and v2.
func Cgroups(name string) []string {
	content, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		return nil
	}
	var found []string
	for line := range strings.Lines(string(content)) {
		fields := strings.Fields(line)
		if len(fields) < 3 || fields[2] != "cgroup" && fields[2] != "cgroup2" {
			continue
		}
		dir := filepath.Join(unescapeMount(fields[1]), name)
		if exists(dir) && !slices.Contains(found, dir) {
			found = append(found, dir)
		}
	}
	return found
}

// RemoveCgroups removes the cgroups called name with all below them. They must
// hold no process.
func RemoveCgroups(name string) error {
	if name == "" || filepath.Clean(name) == "/" {
		return fmt.Errorf("remove cgroup %q: it is not one of ours", name)
	}
	var failed []error
	for _, dir := range Cgroups(name) {
		var below []string
		err := filepath.WalkDir(dir, func(path string, entry fs.DirEntry, err error) error {
			if err == nil && entry.IsDir() {
				below = append(below, path)
			}
			return nil // one that went away meanwhile
		})
		failed = append(failed, err)
		for _, path := range slices.Backward(below) {
			if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
				failed = append(failed, fmt.Errorf("remove cgroup: %w", err))
			}
		}
	}
	return errors.Join(failed...)
}

// ProcessesNaming lists the live processes that have text in an argument: those
// that something was started with below a folder, say. The caller and its
// parents are not listed.
func ProcessesNaming(text string) ([]int, error) {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil, err
	}
	ours := map[int]bool{}
	for pid := os.Getpid(); pid > 0 && !ours[pid]; {
		ours[pid] = true
		s, err := readStat(pid)
		if err != nil {
			break
		}
		pid = s.parent
	}
	var found []int
	for _, entry := range entries {
		pid, err := strconv.Atoi(entry.Name())
		if err != nil || ours[pid] {
			continue
		}
		cmdline, err := os.ReadFile(filepath.Join("/proc", entry.Name(), "cmdline"))
		if err != nil || !strings.Contains(string(cmdline), text) {
			continue
		}
		if s, err := readStat(pid); err == nil && s.state != 'Z' && s.state != 'X' {
			found = append(found, pid)
		}
	}
	return found, nil
}

// Bridges lists the bridges of all networks on this host.
func Bridges() ([]string, error) {
	links, err := netlink.LinkList()
	if err != nil {
		return nil, err
	}
	var bridges []string
	for _, link := range links {
		if link.Type() == "bridge" && link.Attrs().Alias == linkAlias {
			bridges = append(bridges, link.Attrs().Name)
		}
	}
	return bridges, nil
}

// linkAlias marks the bridges that this package made.
const linkAlias = "timonel test machines"
