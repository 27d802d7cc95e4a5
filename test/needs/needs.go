// Package needs is for tests that not every machine can do: elsewhere they are skipped,
// in CI (TIMONEL_CI is set) they must be done and fail.
package needs

import (
	"os"
	"testing"
)

// Root skips a test that needs root, to do what is said.
func Root(t testing.TB, what string) {
	t.Helper()
	if os.Geteuid() != 0 {
		Skip(t, "needs root: "+what)
	}
}

// Skip skips a test that cannot be done here, and fails it in CI.
func Skip(t testing.TB, why string) {
	t.Helper()
	if os.Getenv("TIMONEL_CI") != "" {
		t.Fatalf("CI must be able to do this: %s", why)
	}
	t.Skip(why)
}
