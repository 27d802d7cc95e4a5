package main

import (
	"testing"

	"github.com/stretchr/testify/require"

	"timonel/pki"
)

func TestReadinessChecksExist(t *testing.T) {
	t.Parallel()
	c := (&controller{config: defaultConfig()}).apiConfig(pki.Files{})
	for _, name := range c.ReadyOnly {
		require.Contains(t, c.Health, name)
	}
	require.Contains(t, c.ReadyOnly, "disk")
}
