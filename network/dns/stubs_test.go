package dns

import (
	"net/netip"
	"testing"

	"github.com/stretchr/testify/require"
)

func TestParseStubs(t *testing.T) {
	t.Parallel()
	got, err := ParseStubs([]string{"Acme.local.=10.0.0.1, 10.0.0.2:5353", "eu.acme.local=[fd00::1]:54,fd00::2"})
	require.NoError(t, err)
	at := netip.MustParseAddrPort
	require.Equal(t, map[string][]netip.AddrPort{
		"acme.local": {at("10.0.0.1:53"), at("10.0.0.2:5353")}, "eu.acme.local": {at("[fd00::1]:54"), at("[fd00::2]:53")},
	}, got)
	for _, bad := range []string{"", "acme.local", "acme.local=", "acme.local=x", "=1.2.3.4", "a_b=1.2.3.4", "a=1.2.3.4:0", "a=1.2.3.4:99999", "acme.local=1.2.3.4,"} {
		_, err := ParseStubs([]string{bad})
		require.Error(t, err, bad)
	}
	_, err = ParseStubs([]string{"a=1.2.3.4", "A.=1.2.3.4"})
	require.ErrorContains(t, err, "twice")
}
