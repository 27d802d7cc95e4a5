package main

import (
	"bufio"
	"os"
	"strconv"
	"strings"
)

// residentMemory is how many bytes this process holds in memory, and how many of
// them are anonymous (not backed by the program's file). Zeros where the kernel
// does not say.
func residentMemory() (resident, anonymous int64) {
	f, err := os.Open("/proc/self/status")
	if err != nil {
		return 0, 0
	}
	defer f.Close()
	for s := bufio.NewScanner(f); s.Scan(); {
		name, value, _ := strings.Cut(s.Text(), ":")
		kib, _ := strconv.ParseInt(strings.TrimSpace(strings.TrimSuffix(strings.TrimSpace(value), "kB")), 10, 64)
		switch name {
		case "VmRSS":
			resident = kib << 10
		case "RssAnon":
			anonymous = kib << 10
		}
	}
	return resident, anonymous
}
