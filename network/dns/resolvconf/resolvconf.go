// Package resolvconf reads resolv.conf files, as the kubelet does.
package resolvconf

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/netip"
	"os"
	"slices"
	"strings"
)

// Limit is how long a file may be.
const Limit = 1 << 20

// Default is where a machine's is. Where that has none but a name server of the machine
// itself, which pods cannot reach, systemd-resolved's is where the others are.
const (
	Default  = "/etc/resolv.conf"
	Resolved = "/run/systemd/resolve/resolv.conf"
)

// Conf is what a file says.
type Conf struct {
	Servers, Searches, Options []string
}

// Read reads a file. One that is not there says nothing.
func Read(path string) (Conf, error) {
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return Conf{}, nil
	}
	if err != nil {
		return Conf{}, err
	}
	defer f.Close()
	raw, err := io.ReadAll(io.LimitReader(f, Limit+1))
	if err != nil {
		return Conf{}, err
	}
	if len(raw) > Limit {
		return Conf{}, fmt.Errorf("%s is longer than %d bytes", path, Limit)
	}
	return Parse(string(raw)), nil
}

// Parse reads a file's text. Name servers add up; of searches the last line counts, and
// of an option the last value.
func Parse(text string) (c Conf) {
	for line := range strings.Lines(text) {
		fields := strings.Fields(line)
		if len(fields) < 2 || strings.HasPrefix(fields[0], "#") || strings.HasPrefix(fields[0], ";") {
			continue
		}
		switch fields[0] {
		case "nameserver":
			c.Servers = append(c.Servers, fields[1])
		case "search":
			c.Searches = nil
			for _, s := range fields[1:] {
				if s != "." {
					c.Searches = append(c.Searches, strings.TrimSuffix(s, "."))
				}
			}
		case "options":
			c.Options = MergeOptions(c.Options, fields[1:]...)
		}
	}
	return c
}

// MergeOptions adds options, each instead of one of the same name that was there.
func MergeOptions(have []string, more ...string) []string {
	for _, o := range more {
		name, _, _ := strings.Cut(o, ":")
		have = slices.DeleteFunc(slices.Clone(have), func(old string) bool { n, _, _ := strings.Cut(old, ":"); return n == name })
		have = append(have, o)
	}
	return have
}

// Find is the file of this machine that pods can use: Default, or Resolved where
// Default names no server but the machine itself.
func Find() string { return find(Default, Resolved) }

func find(usual, resolved string) string {
	c, err := Read(usual)
	if err != nil || len(c.Servers) == 0 {
		return usual
	}
	for _, s := range c.Servers {
		if ip, err := netip.ParseAddr(s); err != nil || !ip.IsLoopback() {
			return usual
		}
	}
	if c, err := Read(resolved); err == nil && len(c.Servers) > 0 {
		return resolved
	}
	return usual
}
