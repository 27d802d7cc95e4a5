// Package address announces, on one node, the addresses of Services of type LoadBalancer
// that the cluster says are this node's to announce: it answers who on the segment has
// them, by ARP and NDP.
//
//	a, err := address.New(address.Config{Node: "a1", NodeIPs: ips, Store: store, Logger: log})
//	err = a.Run(ctx)
//
// No link gets such an address. The answers are the process' own, by packet sockets, and
// what comes for an address is carried on by network/service before the kernel would ask
// whose it is. So an agent that is dead, or paused, answers nobody, and leaves nothing to
// clean: another node may take the address as soon as that is decided.
//
// That an address is never on two nodes rests on three things, in this order:
//
//   - The replicated state names one node for an address, by a number that grows.
//   - A node asks the segment before it takes an address (RFC 5227, RFC 4862, with
//     shorter pauses), and its question carries the number: whoever has the address by a
//     lower one gives way at once and is silent, whoever has it by a higher one answers,
//     and the address is not taken. So does another machine that has it.
//   - A node that was paused, or whose link was down, asks again before it answers again;
//     and while no controller is to be reached it asks every second, so that the halves of
//     a segment that was cut agree when they are joined.
//
// The number travels where others do not look: behind the ARP packet, in what Ethernet pads
// with, and in an NDP option for experiments.
package address
