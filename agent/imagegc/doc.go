// Package imagegc removes images that no pod uses when their file system becomes
// full, the one that was used longest ago first, as the kubelet does.
//
//	c := imagegc.New(imagegc.Config{Images: rt.Images, Runtime: rt, Policy: imagegc.Default(), ...})
//	go c.Run(ctx)          // every 5 minutes
//	c.RemoveUnused(ctx)    // all that may go, when the node is out of disk
//
// What may go, and in which order, is decided by pure functions ([Records.See],
// [Records.Candidates], [Policy.Excess]). Never removed are images of containers,
// of those that have ended too, images that a pod of the node names, pinned ones,
// and those that [Config.Keep] names: the sandbox's, and what was imported from
// files, for nobody knows where else to get it from.
package imagegc
