// Package hostile reaches files and folders that a container, an image, a
// registry or a peer may have written, on a node where the agent is root. All
// other code of the agent that touches such files goes through here (make lint
// sees to it).
//
// A [Root] is a folder that was opened once. What lies beneath is named
// relative to it and opened by openat2: no link is followed, no mount is
// crossed, ".." leads nowhere, whatever is swapped meanwhile. A file is first
// pinned without opening it, and is opened only when it is a regular one, so a
// FIFO does not block and a device is not woken. Reading has a limit always;
// a new file is one that was not there before; removing needs neither memory
// nor descriptors in proportion to what is removed.
//
//	root, err := hostile.OpenRoot(podFolder)        // the agent's own path
//	text, err := root.ReadTail("containers/c/termination-0", 4096)
//	err = root.RemoveAll(ctx, "volumes")
//
// The path of OpenRoot itself is trusted: give it a folder that the agent made,
// or one whose name a container cannot change (the root of its mount).
//
// Needs Linux 5.8: openat2, and statx that knows mount points.
package hostile
