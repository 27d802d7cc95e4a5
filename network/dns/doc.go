// Package dns is the DNS server of one node. It answers for the cluster's names by
// Kubernetes' specification, version 1.1.0, and asks the node's own name servers for
// all others.
//
//	query.go       what a client asks, read from a message
//	reply.go       an answer, written into one
//	zone.go        the cluster's domain and the reverse domains
//	find.go        what there is of a name below the domain, by a feed.View
//	reverse.go     what there is of an address
//	server.go      UDP and TCP: what is known is answered at once
//	clients.go     who is answered
//	source.go      how much each client may take
//	forward.go     names of others: who asks, and who waits for the same
//	upstream.go    one other server, and asking several
//	cache.go       answers of other servers, as they are sent on
//	follow.go      the node's resolv.conf
//	address.go     the addresses that the server has of its own
//	resolvconf/    what a resolv.conf says
//
// Names of the cluster are looked up in the newest View for each query: nothing is
// copied, so nothing is out of date. Besides, the Services are kept by address. What
// other servers say is trusted in nothing but the answer to the question that they were
// asked: it is matched to that, read, and written anew.
package dns
