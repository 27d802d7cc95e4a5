// Package chaos breaks a real cluster and checks that clients and containers do
// not notice: its tests carry the build tag chaos and need root and what
// `make build images` makes. `make chaos` runs them and prints the figures.
//
// Limits on time are the ones that Timonel promises; machines that are slower
// than two cores with a local disk may not keep them.
package chaos
