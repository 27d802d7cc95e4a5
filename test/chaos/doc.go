// Package chaos breaks a real cluster and checks that clients and containers do
// not notice: its tests carry the build tag chaos and need root and what
// `make build images` makes. `make chaos` runs them and prints the figures.
//
// Controllers are killed, paused, stopped in order, cut off from each other (one way
// too) and from their clients, wiped, removed and added, all restarted; disks are
// full, slow or fail to sync (strace lets the controller's own system calls fail),
// and clocks are skewed (inject_test.go). TestEach does one of these at a time,
// TestMix all at random; nine clients and three watchers record what they see, and
// test/history checks it. TestState does the same to the log and the state alone,
// without an API server: three processes of test/chaos/store. load_test.go has clients
// that write 1 MiB objects as fast as they may, or fill the state to its limit, and
// controllers that are cut off while they are watched. TestWorkWhileLeadersDie kills the
// leader KILLS times, ten by default, while Jobs run and workloads are rolled out, with
// simulated agents, and checks what was counted and what ran.
//
// Limits on time are the ones that Timonel promises; machines that are slower
// than two cores with a local disk may not keep them.
package chaos
