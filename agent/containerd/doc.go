// Package containerd owns one containerd for one agent: it writes the
// configuration, starts the daemon apart from the agent's own process so that
// it outlives it, starts it again when it dies, and speaks to it: CRI for
// sandboxes, containers and streaming, containerd's own API for events and for
// importing images from files, both over one connection.
//
//	d := containerd.NewDaemon(containerd.DaemonConfig{Dir: dir, ...})
//	if err := d.Start(ctx); err != nil { ... }
//	rt, err := containerd.Dial(ctx, d.Socket())
//	go d.Run(ctx)       // supervises
//	go rt.Run(ctx, ev)  // hands events to ev
//
// Containers belong to their shims, not to containerd and not to the agent:
// neither's end touches them.
package containerd
