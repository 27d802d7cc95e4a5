package cgroup

import (
	"errors"
	"io/fs"
	"path/filepath"
	"strconv"
	"strings"

	"timonel/agent/hostile"
)

// Usage is what the processes of a cgroup, and of those below it, take.
type Usage struct {
	// Memory is the working set in bytes: without the part of the page cache that
	// the kernel would give up first.
	Memory int64
	// Pids is how many processes and threads there are.
	Pids int64
}

// UsageOf reads a cgroup's usage. One that is not there takes nothing.
func UsageOf(path string) (Usage, error) {
	if V2() {
		return usageV2(Root, path)
	}
	memory := filepath.Join(Root, "memory", path)
	return usage(memory, "memory.usage_in_bytes", "total_inactive_file", filepath.Join(Root, "pids", path))
}

func usageV2(root, path string) (Usage, error) {
	dir := filepath.Join(root, path)
	return usage(dir, "memory.current", "inactive_file", dir)
}

func usage(memory, current, inactive, pids string) (Usage, error) {
	var u Usage
	used, err1 := number(filepath.Join(memory, current))
	stat, err2 := text(filepath.Join(memory, "memory.stat"))
	for line := range strings.Lines(stat) {
		if f := strings.Fields(line); len(f) == 2 && f[0] == inactive {
			if n, err := strconv.ParseInt(f[1], 10, 64); err == nil {
				used = max(used-n, 0)
			}
		}
	}
	u.Memory = used
	var err3 error
	u.Pids, err3 = number(filepath.Join(pids, "pids.current"))
	return u, errors.Join(err1, err2, err3)
}

func number(path string) (int64, error) {
	raw, err := text(path)
	if raw == "" || err != nil {
		return 0, err
	}
	return strconv.ParseInt(strings.TrimSpace(raw), 10, 64)
}

// text is a file's content, nothing when it is not there.
func text(path string) (string, error) {
	raw, err := hostile.ReadRegular(path, hostile.MaxOwn)
	if errors.Is(err, fs.ErrNotExist) {
		return "", nil
	}
	return string(raw), err
}
