package main

import (
	"bytes"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

// Where a token comes from, and what is said of a place that others can read. Not
// parallel: it is about the environment.
func TestWhereTheTokenComesFrom(t *testing.T) {
	token := "timonel1." + strings.Repeat("ab", 32) + ".12-34"
	file := func(t *testing.T, content string, mode os.FileMode) string {
		path := filepath.Join(t.TempDir(), "token")
		require.NoError(t, os.WriteFile(path, []byte(content), mode))
		require.NoError(t, os.Chmod(path, mode))
		return path
	}
	for name, tc := range map[string]struct {
		options     options
		environment string
		warning     string // none if empty
		err         string
		none        bool
	}{
		"nowhere":                      {none: true},
		"a file":                       {options: options{tokenFile: file(t, "\n "+token+"\n", 0o600)}},
		"a file that others may read":  {options: options{tokenFile: file(t, token, 0o644)}, warning: "chmod 600"},
		"an empty file":                {options: options{tokenFile: file(t, " \n", 0o600)}, none: true},
		"a file by @":                  {options: options{token: "@" + file(t, token, 0o600)}},
		"a folder":                     {options: options{tokenFile: t.TempDir()}, err: "--token-file: read"},
		"more than a token":            {options: options{tokenFile: file(t, strings.Repeat(token, 1000), 0o600)}, err: "--token-file: the join token"},
		"the command line":             {options: options{token: token}, warning: "command line"},
		"the environment":              {environment: token},
		"a file that the latter names": {environment: "@" + file(t, token, 0o600)},
		"nonsense in the environment":  {environment: "x", err: tokenVariable},
		"the command line first":       {options: options{tokenFile: file(t, token, 0o600)}, environment: "x"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Setenv(tokenVariable, tc.environment)
			var said bytes.Buffer
			got, ok, err := tc.options.readToken(slog.New(slog.NewTextHandler(&said, nil)))
			if tc.err != "" {
				require.ErrorContains(t, err, tc.err)
				require.NotContains(t, err.Error(), "12-34")
				return
			}
			require.NoError(t, err)
			require.Equal(t, !tc.none, ok)
			if ok {
				require.Equal(t, token, got.String())
			}
			if tc.warning == "" {
				require.Empty(t, said.String())
			} else {
				require.Contains(t, said.String(), tc.warning)
			}
			require.NotContains(t, said.String(), "12-34")
			if tc.options.token == "" && tc.options.tokenFile == "" {
				_, left := os.LookupEnv(tokenVariable)
				require.False(t, left, "children inherit the token")
			}
		})
	}
}
