// Package e2e checks a real cluster from the outside, as a user meets it: its
// tests carry the build tag e2e and need root and what `make build images`
// makes. `make e2e` runs them.
package e2e
