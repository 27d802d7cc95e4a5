// Package tables has what the rooms that keep tables of nftables share: it notices that
// somebody else has changed one, and makes bridges ask the tables.
package tables

import (
	"errors"
	"os"
	"os/exec"
	"strings"
)

// Brief is what nft says in one line, which it follows by all lines that it was given.
func Brief(err error) string {
	text, _, _ := strings.Cut(strings.TrimSpace(err.Error()), "\n")
	return strings.TrimPrefix(text, "/dev/stdin:")
}

// BridgeFilter says whether packets that a bridge hands from pod to pod go through
// conntrack, so that an answer to a Service's address gets back the address that was
// asked. It loads the module for it.
func BridgeFilter() bool {
	const file = "/proc/sys/net/bridge/bridge-nf-call-ip"
	ok := true
	for _, path := range []string{file + "tables", file + "6tables"} {
		if _, err := os.Stat(path); errors.Is(err, os.ErrNotExist) {
			_ = exec.Command("modprobe", "br_netfilter").Run() // if it cannot be, there is another way
		}
		if err := os.WriteFile(path, []byte("1"), 0o644); err != nil {
			ok = false
		}
	}
	return ok
}
