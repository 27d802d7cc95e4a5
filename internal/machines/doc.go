// Package machines makes machines out of Linux namespaces on one host, so that
// a whole cluster, with workers that run real containers, comes up on a laptop
// or in CI and can be broken on purpose.
//
// A [Machine] has what a program can tell a small server by: a network
// namespace with its own address on a bridge, a process table of its own, its
// own mounts with an empty /run, and its own host name. Process 1 in it is
// cmd/machine, which reaps orphans and starts one main process (a controller or
// an agent) when asked to. Killing process 1 makes the kernel kill everything
// in the machine, containers included, and drop its mounts: that is what a
// power cut does, and what [Machine.PowerOff] is. What was on its disk, the
// machine's folder, stays.
//
// A [Network] is the wire between the machines of one cluster: the bridge, the
// links, the way out through the host, and an nftables table of the bridge
// family in which links are cut ([Network.Cut]) in both directions or in one.
//
//	net := machines.Network{Name: "timonel", Prefix: netip.MustParsePrefix("10.77.0.0/24")}
//	err := net.Create()
//	m := net.Machine("c1", netip.MustParseAddr("10.77.0.11"), "run/c1")
//	err = m.Boot(ctx, initProgram)
//	err = m.Start(ctx, machines.Process{Argv: []string{"/usr/bin/sleep", "60"}, Log: "run/c1/log"})
//
// All of it needs root. Several networks with different names live side by side.
package machines
