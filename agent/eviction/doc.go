// Package eviction decides which pods a node ends for what they take of it: a
// pod that is over a limit of its own (the size of an emptyDir, ephemeral
// storage), and, while the node is short of memory, disk or process ids, one pod
// after the other, with upstream's order and words.
//
//	m := eviction.New(eviction.Config{Pods: pods, Node: node, Thresholds: t, ...})
//	m.Look(ctx)        // so that Conditions tells what is so
//	go m.Run(ctx)
//
//	threshold.go   of how little being left is too little
//	pressure.go    conditions and what is short, a pure function of what was seen
//	rank.go        which pod is evicted first, a pure function
//	limits.go      whether a pod is over a limit of its own, a pure function
//	message.go     what is said of it
//	manager.go     measures pods that have limits, and evicts
//	relieve.go     looks at the node, frees, and evicts
//	pacer.go       keeps measuring from taking the machine
//
// Deciding is pure: it knows nothing of disks and clocks.
package eviction
