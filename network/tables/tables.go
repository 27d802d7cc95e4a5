// Package tables has what the rooms that keep tables of nftables share: it notices that
// somebody else has changed one, takes them away, and makes bridges ask the tables.
package tables

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"slices"
	"strings"

	"sigs.k8s.io/knftables"
)

// Remove takes away a table of some families. Where nft is not installed there is none.
func Remove(ctx context.Context, name string, families ...knftables.Family) error {
	if _, err := exec.LookPath("nft"); err != nil {
		return nil
	}
	var errs []error
	for _, f := range families {
		nft, err := knftables.New(f, name)
		if err == nil {
			tx := nft.NewTransaction()
			tx.Add(&knftables.Table{}) // so that deleting it cannot fail
			tx.Delete(&knftables.Table{})
			err = nft.Run(ctx, tx)
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("nftables: remove table %s %s: %w", f, name, err))
		}
	}
	return errors.Join(errs...)
}

// Outermost are the networks that are in no other, masked and in order: nft takes no two
// that overlap.
func Outermost(networks []netip.Prefix) (out []netip.Prefix) {
	sorted := make([]netip.Prefix, len(networks))
	for i, p := range networks {
		sorted[i] = p.Masked()
	}
	slices.SortFunc(sorted, func(a, b netip.Prefix) int {
		return cmp.Or(a.Addr().Compare(b.Addr()), cmp.Compare(a.Bits(), b.Bits()))
	})
	for _, p := range sorted {
		if len(out) == 0 || !out[len(out)-1].Overlaps(p) {
			out = append(out, p)
		}
	}
	return out
}

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
