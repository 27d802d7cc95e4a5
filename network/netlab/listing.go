package netlab

import (
	"cmp"
	"encoding/json"
	"fmt"
	"os/exec"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

// Listing is a table as nft lists it, without what may differ between two that are the same,
// or that there is none.
func Listing(t *testing.T, family, table string) []string {
	t.Helper()
	var errs strings.Builder
	cmd := exec.Command("nft", "-j", "list", "table", family, table)
	cmd.Stderr = &errs
	raw, err := cmd.Output()
	if strings.Contains(errs.String(), "No such file") {
		return []string{"no table " + family + " " + table}
	}
	require.NoError(t, err, errs.String())
	var all struct{ Nftables []map[string]map[string]any }
	require.NoError(t, json.Unmarshal(raw, &all))
	var out []string
	for _, o := range all.Nftables[1:] {
		for kind, fields := range o {
			delete(fields, "handle")
			delete(fields, "index")
			fields["table"] = ""
			if kind == "table" {
				fields["name"] = ""
			}
			if _, ok := fields["timeout"]; ok {
				delete(fields, "elem") // which packets put there, and time takes away
			}
			if elements, ok := fields["elem"].([]any); ok {
				slices.SortFunc(elements, func(a, b any) int { return cmp.Compare(fmt.Sprint(a), fmt.Sprint(b)) })
			}
			text, err := json.Marshal(fields)
			require.NoError(t, err)
			out = append(out, kind+" "+string(text))
		}
	}
	// Rules stay in their order; all else has none.
	slices.SortStableFunc(out, func(a, b string) int {
		if strings.HasPrefix(a, "rule ") && strings.HasPrefix(b, "rule ") {
			return cmp.Compare(chainOf(a), chainOf(b))
		}
		return cmp.Compare(a, b)
	})
	return out
}

func chainOf(rule string) string {
	_, rest, _ := strings.Cut(rule, `"chain":"`)
	name, _, _ := strings.Cut(rest, `"`)
	return name
}

var lifetimes = regexp.MustCompile(`valid_lft.*`)

// Routes is what the pod network has made in this namespace but its nftables, without numbers
// of devices: routes, neighbours, entries and addresses of its VXLAN's device, and that.
func Routes(t *testing.T, vxlan string) string {
	t.Helper()
	out, err := exec.Command("sh", "-ec", strings.ReplaceAll(`ip -o route show proto 157 | sort; ip -6 -o route show proto 157 | sort; bridge fdb show dev VXLAN 2>/dev/null | sort || true
		ip neigh show dev VXLAN 2>/dev/null | sort || true; ip -6 neigh show dev VXLAN nud permanent 2>/dev/null | sort || true
		ip -o addr show dev VXLAN 2>/dev/null | sed 's/^[0-9]*: //' || true; ip -d link show dev VXLAN 2>/dev/null | sed 's/^[0-9]*: //' || true`, "VXLAN", vxlan)).CombinedOutput()
	require.NoError(t, err, string(out))
	return lifetimes.ReplaceAllString(string(out), "")
}
