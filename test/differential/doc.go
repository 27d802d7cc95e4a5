// Package differential gives random scenarios to our reconcilers and to the
// controllers of k8s.io/kubernetes, and compares what both do. It has tests only.
//
// Each side has an API server of its own in memory (timonel/reconcile/storytest). Ours is
// worked on by reconcilers, as a story does it; the other's objects are fed to upstream's
// controllers, which run as they are, and what these write comes back through client-go's
// fake client. Both are in one bubble of testing/synctest, so that both have the same clock
// and an hour costs nothing:
//
//	                ┌─▶ world ──▶ our reconcilers ─────────┐
//	seed ─▶ steps ──┤     ▲────────────────────────────────┘   compared after each step
//	                └─▶ world ──▶ upstream's controllers ──┐
//	                      ▲────────────────────────────────┘
//
// A step is what users, agents and nodes do: scale, change a template, a pod that becomes
// ready, fails or vanishes, a node that leaves, a controller that was away for hours. It is
// done to both worlds at the same time; pods that both have are known by what they are, not
// by their names (kubelet_test.go). After each step all objects are compared, without what
// may differ: random names, uids, versions (view_test.go); and so is what was done on the
// way: how many pods were created and deleted, what was told in events. What differs for a
// reason is in allowed_test.go, each with the reason; everything else is a bug.
//
// Upstream's controllers wait ever longer after something failed. Those that would still
// wait when a step is compared are nudged (family.nudge): ours never are, so that a change
// that they miss shows.
//
//	go test ./test/differential -runs 3000              // seeds 1 to 3000 of each family
//	go test ./test/differential -run /job -seed 42 -v   // one of them, with its steps
//
// When a seed fails, steps are left out as long as it fails all the same, and what
// remains is printed.
package differential
