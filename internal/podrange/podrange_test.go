package podrange

import (
	"net/netip"
	"testing"

	"github.com/stretchr/testify/require"
)

func TestValidate(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		networks     []string
		bits4, bits6 int
		want         string
	}{
		{[]string{"10.244.0.0/16"}, 0, 0, ""},
		{[]string{"10.244.0.0/16", "fd00:244::/48", "10.12.0.0/20"}, 22, 64, ""},
		{[]string{"10.244.0.0/24"}, 30, 0, ""},
		{[]string{"10.244.0.0/24"}, 31, 0, "no address for a pod"},
		{nil, 0, 0, "no network"},
		{[]string{"10.244.0.0/25"}, 0, 0, "25 to 32"},
		{[]string{"10.0.0.0/8"}, 26, 0, "more than 65536"},
		{[]string{"fd00::/40"}, 0, 0, "more than 65536"},
		{[]string{"10.244.0.0/16", "10.244.128.0/20"}, 0, 0, "10.244.128.0/20 overlaps 10.244.0.0/16"},
	} {
		r, err := Parse(tc.networks)
		require.NoError(t, err)
		r.Bits4, r.Bits6 = tc.bits4, tc.bits6
		if err := r.Validate(); tc.want == "" {
			require.NoError(t, err, tc.networks)
		} else {
			require.ErrorContains(t, err, tc.want, tc.networks)
		}
	}
	for _, text := range []string{"", "10.244.0.1/16", "nonsense", "10.244.0.0"} {
		_, err := Parse([]string{text})
		require.ErrorContains(t, err, "not a network", text)
	}
}

func TestParts(t *testing.T) {
	t.Parallel()
	r, err := Parse([]string{"10.244.0.0/16", "fd00:244::/48", "10.12.0.0/20"})
	require.NoError(t, err)
	for text, want := range map[string]string{
		"10.244.7.0/24": "", "10.12.3.0/24": "", "fd00:244:0:7::/64": "",
		"10.244.0.0/16": "not a /24", "10.244.7.0/25": "not a /24", "fd00:244::/48": "not a /64",
		"10.13.0.0/24": "not of", "0.0.0.0/0": "not of", "fd00:245::/64": "not of", "10.0.0.0/8": "not of",
	} {
		if err := r.CheckPart(netip.MustParsePrefix(text)); want == "" {
			require.NoError(t, err, text)
		} else {
			require.ErrorContains(t, err, want, text)
		}
	}
	require.True(t, r.Contains(netip.MustParseAddr("10.12.0.9")))
	require.False(t, r.Contains(netip.MustParseAddr("10.13.0.9")))
	require.Len(t, r.Families(), 2)
	require.Len(t, r.Families()[0], 2)
	require.False(t, Ranges{}.Known())
}
