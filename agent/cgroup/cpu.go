package cgroup

import (
	"path/filepath"
	"strconv"
	"strings"
	"time"
)

// CPUOf is how long the processes of a cgroup, and of those below it, have run. That of
// one that is not there is 0.
func CPUOf(path string) (time.Duration, error) {
	if V2() {
		return cpuV2(Root, path)
	}
	nanos, err := number(filepath.Join(Root, "cpuacct", path, "cpuacct.usage"))
	return time.Duration(nanos), err
}

func cpuV2(root, path string) (time.Duration, error) {
	stat, err := text(filepath.Join(root, path, "cpu.stat"))
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(stat) {
		if f := strings.Fields(line); len(f) == 2 && f[0] == "usage_usec" {
			micros, err := strconv.ParseInt(f[1], 10, 64)
			return time.Duration(micros) * time.Microsecond, err
		}
	}
	return 0, nil
}
