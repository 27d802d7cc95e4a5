// Package image gets a container's image onto the node as its imagePullPolicy
// says: it knows which are present, pulls the others with the pod's pull
// secrets, apart from the pod's worker, a bounded number at a time, and backs off when a
// registry fails.
//
// Ensure does not wait. It says what is so now and calls back when that may
// have changed:
//
//	switch r := images.Ensure(ctx, req); r.State {
//	case image.Ready:   // start the container with r.ID
//	case image.Pulling: // wait; req.Changed will be called
//	case image.Failed:  // waiting reason r.Reason, message r.Message, again at r.Retry
//	}
package image
