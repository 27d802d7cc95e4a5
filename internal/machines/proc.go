package machines

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// ProcessID names a process for good: a pid alone is reused.
type ProcessID struct {
	Pid   int    `json:"pid"`
	Start uint64 `json:"start"` // clock ticks since boot, as in /proc/PID/stat
}

// Identify returns the ProcessID of a live process.
func Identify(pid int) (ProcessID, error) {
	stat, err := readStat(pid)
	if err != nil {
		return ProcessID{}, err
	}
	return ProcessID{Pid: pid, Start: stat.start}, nil
}

// Alive reports whether any thread of the process is there still. A zombie is
// not alive.
func (p ProcessID) Alive() bool {
	if p.Pid <= 0 {
		return false
	}
	stat, err := readStat(p.Pid)
	if err != nil || stat.start != p.Start || stat.state == 'X' {
		return false
	}
	if stat.state != 'Z' {
		return true
	}
	// The first thread is a zombie as soon as it ends; others may be ending yet.
	threads, err := os.ReadDir(filepath.Join("/proc", strconv.Itoa(p.Pid), "task"))
	return err == nil && len(threads) > 1
}

// Stopped reports whether the process is stopped by a signal.
func (p ProcessID) Stopped() bool {
	stat, err := readStat(p.Pid)
	return err == nil && stat.start == p.Start && stat.state == 'T'
}

type stat struct {
	state  byte
	parent int
	start  uint64
}

func readStat(pid int) (stat, error) {
	content, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "stat"))
	if err != nil {
		return stat{}, err
	}
	// The name in brackets may hold anything, brackets and spaces included.
	end := bytes.LastIndexByte(content, ')')
	if end < 0 {
		return stat{}, fmt.Errorf("/proc/%d/stat: no command name", pid)
	}
	fields := strings.Fields(string(content[end+1:]))
	if len(fields) < 20 {
		return stat{}, fmt.Errorf("/proc/%d/stat: %d fields after the name", pid, len(fields))
	}
	parent, err := strconv.Atoi(fields[1])
	if err != nil {
		return stat{}, fmt.Errorf("/proc/%d/stat: parent: %w", pid, err)
	}
	start, err := strconv.ParseUint(fields[19], 10, 64)
	if err != nil {
		return stat{}, fmt.Errorf("/proc/%d/stat: start time: %w", pid, err)
	}
	return stat{state: fields[0][0], parent: parent, start: start}, nil
}

// descendants returns the pids of all live processes below root, nearest first.
func descendants(root int) ([]int, error) {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil, err
	}
	children := map[int][]int{}
	for _, entry := range entries {
		pid, err := strconv.Atoi(entry.Name())
		if err != nil {
			continue
		}
		s, err := readStat(pid)
		if err != nil || s.state == 'Z' || s.state == 'X' {
			continue // it ended while we looked
		}
		children[s.parent] = append(children[s.parent], pid)
	}
	found := children[root]
	for i := 0; i < len(found); i++ {
		found = append(found, children[found[i]]...)
	}
	return found, nil
}

// innerPid returns a process's pid in the innermost pid namespace it is in, and
// how many namespaces deep that is.
func innerPid(pid int) (inner, depth int, err error) {
	content, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "status"))
	if err != nil {
		return 0, 0, err
	}
	for line := range strings.Lines(string(content)) {
		if rest, ok := strings.CutPrefix(line, "NSpid:"); ok {
			pids := strings.Fields(rest)
			inner, err = strconv.Atoi(pids[len(pids)-1])
			return inner, len(pids), err
		}
	}
	return 0, 0, fmt.Errorf("/proc/%d/status has no NSpid", pid)
}

// Memory is what a process holds in RAM, in bytes.
type Memory struct {
	Resident  int64 `json:"residentBytes"`
	Anonymous int64 `json:"anonymousBytes"`
	File      int64 `json:"fileBytes"`
}

// ReadMemory reads a process's smaps_rollup.
func ReadMemory(pid int) (Memory, error) {
	content, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "smaps_rollup"))
	if err != nil {
		return Memory{}, err
	}
	var m Memory
	for line := range strings.Lines(string(content)) {
		fields := strings.Fields(line)
		if len(fields) != 3 || fields[2] != "kB" {
			continue
		}
		kb, err := strconv.ParseInt(fields[1], 10, 64)
		if err != nil {
			return Memory{}, fmt.Errorf("/proc/%d/smaps_rollup: %w", pid, err)
		}
		switch fields[0] {
		case "Rss:":
			m.Resident = kb * 1024
		case "Anonymous:":
			m.Anonymous = kb * 1024
		}
	}
	m.File = m.Resident - m.Anonymous
	return m, nil
}

// MountsBelow lists the host's mounts at and below a folder, deepest last.
func MountsBelow(dir string) ([]string, error) {
	content, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil, err
	}
	var mounts []string
	for line := range strings.Lines(string(content)) {
		fields := strings.Fields(line)
		if len(fields) < 5 {
			continue
		}
		point := unescapeMount(fields[4])
		if point == dir || strings.HasPrefix(point, strings.TrimSuffix(dir, "/")+"/") {
			mounts = append(mounts, point)
		}
	}
	return mounts, nil
}

// unescapeMount undoes the octal escapes of /proc/self/mountinfo.
func unescapeMount(s string) string {
	for _, c := range []string{" ", "\t", "\n", "\\"} {
		s = strings.ReplaceAll(s, fmt.Sprintf("\\%03o", c[0]), c)
	}
	return s
}

func exists(path string) bool {
	_, err := os.Lstat(path)
	return !errors.Is(err, fs.ErrNotExist)
}
