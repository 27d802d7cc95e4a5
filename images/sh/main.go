// Command sh is the shell of the busybox image that upstream's e2e suite runs: busybox'
// own, whose messages tests expect, or bash where the environment has variables whose
// names are no shell names. Debian's busybox would take those from what it starts;
// upstream's leaves them.
package main

import (
	"fmt"
	"os"
	"regexp"
	"syscall"
)

var shellName = regexp.MustCompile(`^[A-Za-z_][A-Za-z0-9_]*=`)

func main() {
	program := shellFor(os.Environ())
	err := syscall.Exec(program, os.Args, os.Environ())
	fmt.Fprintf(os.Stderr, "sh: start %s: %v\n", program, err)
	os.Exit(127)
}

func shellFor(environ []string) string {
	for _, v := range environ {
		if !shellName.MatchString(v) {
			return "/bin/bash"
		}
	}
	return "/bin/busybox"
}
