//go:build race

package consensus

// lessRaced is a quarter of a number, with the race detector: what moves many bytes takes
// some ten times as long with it. `make unit` runs all of it without.
func lessRaced(n int) int { return n / 4 }
