// Package network is the house of what a node does for the network of its pods
// besides connecting them, which agent/podnet does. It holds no code: the rooms do.
//
//	network/feed     what the controllers say of the cluster's network, on this node
//	network/service  Services, in nftables
//	network/dns      the DNS server of this node
//	network/address  addresses of Services of type LoadBalancer, by ARP and NDP
//	network/policy   network policies, in nftables
//	network/hostport pods' host ports, in nftables
//	network/tables   what those that keep tables of nftables share
//	network/netlab   a node in network namespaces, for tests
//
// Every room reads a [timonel/network/feed.View] and makes the kernel, or its answers,
// agree with it. The rooms know neither the agent, which starts them, nor the
// controllers' state, and go on by what is on the node's disk while all controllers
// are away.
package network
