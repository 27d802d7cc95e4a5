package resolvconf

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

func TestParse(t *testing.T) {
	t.Parallel()
	for name, tc := range map[string]struct {
		text string
		want Conf
	}{
		"nothing":          {"", Conf{}},
		"servers add up":   {"nameserver 1.2.3.4\nnameserver fe80::1%eth0\n", Conf{Servers: []string{"1.2.3.4", "fe80::1%eth0"}}},
		"the last search":  {"search a.example b.example\n search c.example. . d.example\n", Conf{Searches: []string{"c.example", "d.example"}}},
		"the root alone":   {"search .\n", Conf{}},
		"the last value":   {"options ndots:5 timeout:2\noptions ndots:1\n", Conf{Options: []string{"timeout:2", "ndots:1"}}},
		"comments":         {"# nameserver 1.1.1.1\n; search x\n#search y\nnameserver 2.2.2.2 # ours\n", Conf{Servers: []string{"2.2.2.2"}}},
		"what is no field": {"nameserver\nsearch\ndomain x\nsortlist 1.2.3.4\n\x00\n", Conf{}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			require.Equal(t, tc.want, Parse(tc.text))
		})
	}
}

func TestRead(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "resolv.conf")
	c, err := Read(path)
	require.NoError(t, err)
	require.Equal(t, Conf{}, c, "none is there")
	require.NoError(t, os.WriteFile(path, []byte(strings.Repeat("#", Limit+1)), 0o600))
	_, err = Read(path)
	require.ErrorContains(t, err, "longer than")
}

// TestFind: where the machine's file names the machine itself alone, pods need another.
func TestFind(t *testing.T) {
	t.Parallel()
	for name, tc := range map[string]struct {
		usual, resolved string
		want            string
	}{
		"others":                      {"nameserver 1.2.3.4", "nameserver 4.3.2.1", "usual"},
		"the machine itself":          {"nameserver 127.0.0.53", "nameserver 4.3.2.1", "resolved"},
		"others too":                  {"nameserver 127.0.0.53\nnameserver 1.2.3.4", "nameserver 4.3.2.1", "usual"},
		"there is no resolved":        {"nameserver 127.0.0.1", "", "usual"},
		"nobody":                      {"", "nameserver 4.3.2.1", "usual"},
		"what is no address is asked": {"nameserver x", "nameserver 4.3.2.1", "usual"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			for file, text := range map[string]string{"usual": tc.usual, "resolved": tc.resolved} {
				if text != "" {
					require.NoError(t, os.WriteFile(filepath.Join(dir, file), []byte(text), 0o600))
				}
			}
			require.Equal(t, filepath.Join(dir, tc.want), find(filepath.Join(dir, "usual"), filepath.Join(dir, "resolved")))
		})
	}
}

func FuzzParse(f *testing.F) {
	f.Add("nameserver 1.2.3.4\nsearch a b.\noptions ndots:5 x\n")
	f.Fuzz(func(t *testing.T, text string) {
		c := Parse(text)
		for _, s := range append(append(append([]string{}, c.Servers...), c.Searches...), c.Options...) {
			require.NotContains(t, s, "\n")
			require.NotContains(t, s, " ")
		}
	})
}
