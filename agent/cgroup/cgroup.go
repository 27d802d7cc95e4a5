// Package cgroup makes, limits and removes the cgroups that the agent's pods
// are under, on machines with cgroup v1 and v2.
package cgroup

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// Root is where cgroup file systems are mounted.
const Root = "/sys/fs/cgroup"

// V2 says whether the machine has only the unified hierarchy.
func V2() bool {
	var st unix.Statfs_t
	return unix.Statfs(Root, &st) == nil && st.Type == unix.CGROUP2_SUPER_MAGIC
}

// Check returns an error that says what to do when containers cannot be
// limited on this machine.
func Check() error {
	if V2() {
		return nil
	}
	for _, controller := range []string{"cpu", "memory", "devices", "freezer", "pids"} {
		if _, err := os.Stat(filepath.Join(Root, controller)); err != nil {
			return fmt.Errorf("no cgroup controller %q below %s: mount cgroups; an agent in a network namespace must keep the machine's /sys (start it with nsenter --net, not ip netns exec)", controller, Root)
		}
	}
	return nil
}

// Limits of one cgroup; zero is no limit.
type Limits struct {
	CPUShares           int64
	CPUQuota, CPUPeriod int64 // microseconds
	Memory              int64 // bytes
	Pids                int64 // processes and threads
}

// Apply makes a cgroup and sets its limits.
func Apply(path string, l Limits) error {
	if V2() {
		return applyV2(Root, path, l)
	}
	cpu, memory, pids := filepath.Join(Root, "cpu", path), filepath.Join(Root, "memory", path), filepath.Join(Root, "pids", path)
	for _, dir := range []string{cpu, memory, pids} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return fmt.Errorf("make cgroup: %w", err)
		}
	}
	quota := int64(-1)
	if l.CPUQuota > 0 {
		quota = l.CPUQuota
		if err := write(cpu, "cpu.cfs_period_us", l.CPUPeriod); err != nil {
			return err
		}
	}
	limit := int64(-1)
	if l.Memory > 0 {
		limit = l.Memory
	}
	return errors.Join(
		write(cpu, "cpu.shares", max(l.CPUShares, 2)),
		write(cpu, "cpu.cfs_quota_us", quota),
		write(memory, "memory.limit_in_bytes", limit),
		writeText(pids, "pids.max", pidsMax(l)),
	)
}

func applyV2(root, path string, l Limits) error {
	dir, err := makeV2(root, path)
	if err != nil {
		return err
	}
	quota := "max 100000"
	if l.CPUQuota > 0 {
		quota = fmt.Sprintf("%d %d", l.CPUQuota, l.CPUPeriod)
	}
	memory := "max"
	if l.Memory > 0 {
		memory = strconv.FormatInt(l.Memory, 10)
	}
	return errors.Join(
		write(dir, "cpu.weight", weight(l.CPUShares)), writeText(dir, "cpu.max", quota), writeText(dir, "memory.max", memory),
		writeText(dir, "pids.max", pidsMax(l)),
	)
}

func pidsMax(l Limits) string {
	if l.Pids <= 0 {
		return "max"
	}
	return strconv.FormatInt(l.Pids, 10)
}

func write(dir, file string, v int64) error { return writeText(dir, file, strconv.FormatInt(v, 10)) }

func writeText(dir, file, text string) error {
	if err := os.WriteFile(filepath.Join(dir, file), []byte(text), 0o644); err != nil {
		return fmt.Errorf("set cgroup limit: %w", err)
	}
	return nil
}

// Weigh makes a cgroup and sets how much CPU time it gets beside its siblings,
// as shares of cgroup v1.
func Weigh(path string, shares int64) error {
	if V2() {
		return weighV2(Root, path, shares)
	}
	dir := filepath.Join(Root, "cpu", path)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return fmt.Errorf("make cgroup: %w", err)
	}
	return write(dir, "cpu.shares", max(shares, 2))
}

func weighV2(root, path string, shares int64) error {
	dir, err := makeV2(root, path)
	if err != nil {
		return err
	}
	return write(dir, "cpu.weight", weight(shares))
}

// weight is the kernel's own mapping of 2..262144 shares to 1..10000.
func weight(shares int64) int64 { return 1 + (max(shares, 2)-2)*9999/262142 }

// makeV2 makes a cgroup of the unified hierarchy. Controllers have to be handed
// down at every level.
func makeV2(root, path string) (string, error) {
	dir := root
	for _, part := range strings.Split(strings.Trim(path, "/"), "/") {
		for _, c := range []string{"+cpuset", "+cpu", "+io", "+memory", "+pids"} {
			_ = os.WriteFile(filepath.Join(dir, "cgroup.subtree_control"), []byte(c), 0o644) // some may be absent
		}
		dir = filepath.Join(dir, part)
		if err := os.Mkdir(dir, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
			return "", fmt.Errorf("make cgroup: %w", err)
		}
	}
	return dir, nil
}

// hierarchies are the folders that a cgroup path has to be looked for in.
func hierarchies() []string {
	if V2() {
		return []string{Root}
	}
	entries, err := os.ReadDir(Root)
	if err != nil {
		return nil
	}
	var out []string
	for _, e := range entries {
		if e.IsDir() { // links name the same hierarchy twice
			out = append(out, filepath.Join(Root, e.Name()))
		}
	}
	return out
}

// Remove removes a cgroup and those below it, in every hierarchy. Processes in
// it are an error.
func Remove(path string) error {
	var errs []error
	for _, h := range hierarchies() {
		dir := filepath.Join(h, path)
		var dirs []string
		err := filepath.WalkDir(dir, func(p string, d fs.DirEntry, err error) error {
			if errors.Is(err, fs.ErrNotExist) {
				return nil
			}
			if err == nil && d.IsDir() {
				dirs = append(dirs, p)
			}
			return err
		})
		errs = append(errs, err)
		for _, d := range slices.Backward(dirs) {
			if err := unix.Rmdir(d); err != nil && !errors.Is(err, unix.ENOENT) {
				errs = append(errs, fmt.Errorf("remove cgroup %s: %w", d, err))
				break
			}
		}
	}
	return errors.Join(errs...)
}

// Processes lists all processes in a cgroup and below it.
func Processes(path string) []int {
	seen := map[int]bool{}
	for _, h := range hierarchies() {
		_ = filepath.WalkDir(filepath.Join(h, path), func(p string, d fs.DirEntry, err error) error {
			if err != nil || d.Name() != "cgroup.procs" {
				return nil
			}
			raw, err := os.ReadFile(p)
			if err != nil {
				return nil
			}
			for _, f := range strings.Fields(string(raw)) {
				if pid, err := strconv.Atoi(f); err == nil && pid > 0 {
					seen[pid] = true
				}
			}
			return nil
		})
	}
	out := make([]int, 0, len(seen))
	for pid := range seen {
		out = append(out, pid)
	}
	return out
}
