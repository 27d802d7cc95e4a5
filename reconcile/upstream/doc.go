// Package upstream runs Kubernetes' own controllers, those of kube-controller-manager,
// for what is outside of Timonel's purpose: quota, autoscaling by metrics,
// certificates, aggregated roles, volumes of CSI drivers, devices, and the like.
//
//	controllers, err := upstream.New(upstream.Config{Cache: cache, Client: api, …})
//	err = replica.Lead(ctx, controllers.Run)
//
// They are built by upstream's own descriptors, with its defaults, and run on the
// leader for as long as its term lasts. What differs:
//
//   - They read our object cache by package feed, so that they hold no copy of the state
//     and watch nothing. Two have more: the publisher of ClusterTrustBundles makes an
//     informer of its own, of the one bundle that it keeps, and the storage version
//     migrator has the graph of the garbage collector, from the first migration on.
//   - Each acts as its own service account, whose role the API server makes at its
//     start, through the API in memory. A request carries the values of the context
//     of Run, and with them the term: what one says too late is refused.
//   - One that has nothing to do is not there. It is built when the first object of a
//     kind exists that it works on, and ends with the term.
//   - One that does not end with the term is left alone after a moment: its requests
//     are refused, and it is told of no change.
//   - One that panics, or returns, is built anew, later each time. A panic in a
//     goroutine that it started without upstream's crash handler still ends the
//     process, and so does klog.Fatal; none of those here calls that once it is built.
//
// names.go lists each name of upstream's: what a reconciler of Timonel does instead,
// what runs here, and what nobody does, with the reason; docs/controllers.md tells
// users the same.
//
// # Certificates
//
// The signers sign with the cluster's own authority, which Timonel's controllers know
// each other by. A request for one of their subjects is marked as failed, whoever
// approved it, and never signed. A node's certificate is good only with
// the key that its name is bound to (package trust), so that one signed here admits
// nobody.
package upstream
