//go:build race

package sim

// lives is how many seeds are run by default: with the race detector, each costs six times
// as much.
const lives = 40
