// Package eviction decides which pods a node ends for what they take of it: a
// pod that is over a limit of its own (the size of an emptyDir, ephemeral
// storage), with upstream's words.
//
//	if message, over := eviction.OverLimit(pod, &usage, false); over {
//		// The pod is Failed, reason Evicted, with that message.
//	}
//
// Deciding is pure: [OverLimit] knows nothing of disks and clocks. [Manager]
// measures, asks, and has pods ended.
package eviction
