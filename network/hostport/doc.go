// Package hostport carries what is sent to a port of this node to the pod that has it as its
// hostPort, by address translation in nftables.
//
//	h, err := hostport.New(hostport.Config{Table: "timonel-hostports", Bridge: "br0", …})
//	h.SetPod(hostport.Pod{UID: uid, Addresses: ips, Ports: ports})
//	err = h.Ready(uid) // nil: what is sent there arrives
//	h.Run(ctx)         // keeps the table as it is to be
//
// The table is of the family inet. What is addressed to this node goes to the chain ports, which
// looks for the address, protocol and port in @at4 and @at6, and for those of all addresses
// in @any4 and @any6. They lead to the chains to-…, one for each port and family, which
// translate. The source stays as it is, but for the pod that reaches itself and for
// what the node sends from 127.0.0.1, which get the address of the node's end of the bridge.
//
// Left alone are addresses of Services that are on a link of this node, as that of its DNS
// server, and the ports at which nodes and controllers talk to each other.
//
// For 127.0.0.1 the kernel must let packets of that address leave by the bridge
// (route_localnet), and would then let those of pods in: the chain guard drops them, and so
// does network/policy.
package hostport
