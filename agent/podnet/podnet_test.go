package podnet

import (
	"encoding/json"
	"log/slog"
	"testing"

	"github.com/stretchr/testify/require"
)

func TestConfiguration(t *testing.T) {
	t.Parallel()
	n := &Network{cfg: Config{Name: "timonel-a1", Bridge: "br0", StateDir: "/state", BinDir: t.TempDir()}, log: slog.Default()}
	raw, err := n.render([]string{"10.244.3.0/24", "fd00:3::/64"}, 1450)
	require.NoError(t, err)
	var got struct {
		Name    string
		Plugins []struct {
			Type, Bridge string
			IPAM         struct {
				DataDir string
				Ranges  [][]struct{ Subnet string }
				Routes  []struct{ Dst string }
			}
		}
	}
	require.NoError(t, json.Unmarshal(raw, &got))
	require.Equal(t, "timonel-a1", got.Name)
	require.Len(t, got.Plugins, 1)
	require.Equal(t, "br0", got.Plugins[0].Bridge)
	require.Equal(t, "/state/ipam", got.Plugins[0].IPAM.DataDir)
	require.Equal(t, "10.244.3.0/24", got.Plugins[0].IPAM.Ranges[0][0].Subnet)
	require.Equal(t, "::/0", got.Plugins[0].IPAM.Routes[1].Dst)
	_, err = n.render([]string{"nonsense"}, 0)
	require.ErrorContains(t, err, `pod CIDR "nonsense"`)
	_, err = New(Config{BinDir: t.TempDir(), Logger: slog.Default()})
	require.ErrorContains(t, err, "apt-get install containernetworking-plugins")
}
