//go:build !race

package sim

// lives is how many seeds are run by default.
const lives = 150
