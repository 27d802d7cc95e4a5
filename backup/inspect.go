package backup

import (
	"encoding/hex"
	"sort"
	"strings"

	"timonel/state"
)

// Info is what Inspect finds in a file.
type Info struct {
	Header
	// CompactRevision is the oldest revision that the history in the file reaches.
	CompactRevision int64 `json:"compactRevision"`
	// Size is the file's in bytes.
	Size int64 `json:"size"`
	// SHA256 is the checksum at the file's end, of all before it.
	SHA256 string `json:"sha256"`
	// Resources are in order of their names.
	Resources []Resource `json:"resources"`
}

// Resource sums up the objects of one resource.
type Resource struct {
	Name    string `json:"name"` // such as pods or deployments
	Objects int    `json:"objects"`
	Bytes   int64  `json:"bytes"` // of keys and values
}

// Inspect reads and verifies what is left of the file: all of it, if nothing was
// read after Open. It takes a few hundred KiB of memory, whatever the size.
func Inspect(r *Reader) (Info, error) {
	resources := map[string]*Resource{}
	scanned, err := state.ScanSnapshot(r, func(kv state.KV) error {
		name := resourceOf(kv.Key)
		sum := resources[name]
		if sum == nil {
			sum = &Resource{Name: name}
			resources[name] = sum
		}
		sum.Objects++
		sum.Bytes += int64(len(kv.Key) + len(kv.Value))
		return nil
	})
	if err != nil {
		return Info{}, r.stateError(err)
	}
	if err := r.check(scanned); err != nil {
		return Info{}, err
	}
	info := Info{Header: r.header, CompactRevision: scanned.CompactRevision, Size: r.size, SHA256: hex.EncodeToString(r.digest), Resources: []Resource{}}
	for _, sum := range resources {
		info.Resources = append(info.Resources, *sum)
	}
	sort.Slice(info.Resources, func(i, j int) bool { return info.Resources[i].Name < info.Resources[j].Name })
	return info, nil
}

// resourceOf tells the resource from a key such as /registry/pods/default/web or
// /registry/example.com/widgets/default/w1.
func resourceOf(key string) string {
	rest, ok := strings.CutPrefix(key, "/registry/")
	if !ok {
		return "(other)"
	}
	first, rest, _ := strings.Cut(rest, "/")
	second, _, _ := strings.Cut(rest, "/")
	switch {
	case first == "services" && second == "endpoints":
		return "endpoints"
	case first == "minions": // the name that nodes had first
		return "nodes"
	case strings.Contains(first, ".") && second != "":
		return second + "." + first
	}
	return first
}
