// Package service carries what is sent to a Service to one of its endpoints, on one
// node, by address translation in nftables.
//
//	proxy, err := service.New(service.Config{Node: "a1", Table: "timonel-services", Store: store, Logger: log})
//	err = proxy.Run(ctx)
//
// There are two tables, one of family ip and one of family ip6, which are nobody
// else's. Who reads them (nft list table ip timonel-services) needs to know this:
//
//	@service-ips          address . protocol . port  → the chain that chooses an endpoint
//	@service-nodeports    protocol . port            → the same for node ports
//	@endpoints-tcp        number . address . port → endpoint; likewise udp and sctp
//	@local-endpoints-tcp  the same, of this node's endpoints, where a policy is Local
//	@nodeport-endpoints-tcp, @nodeport-local-endpoints-tcp  the same by node port
//	@no-endpoints, @no-endpoints-nodeports          what is rejected or dropped, and by whom
//	@firewall-ips         what has loadBalancerSourceRanges
//	@cluster-ips          all cluster addresses: ports that nobody has are rejected
//	@hairpin              endpoints on this node, which may reach themselves
//	@pods, @nodeport-ips, @service-networks         what this node knows of the cluster
//
// An endpoint is chosen by a random number below the count of a list, with which the
// endpoint is looked up in one map for all Services. So chains are shared by all
// Services with as many endpoints (to-3-tcp, from-outside-3-tcp, local-1-of-3-tcp, …), and a Service
// is elements of maps, which cost the kernel and nft little to change. Services with
// session affinity, or source ranges, have chains of their own, with a slash in their
// names.
//
// What a Service is in the table is a function of the Service, its slices and what is
// known of the node ([compiler.service]): the difference between what it was and what
// it is becomes one transaction, however many Services changed. Nothing of that is
// kept: what was there is computed anew from the View that was applied last. At the
// start, and when somebody else has touched the table, one transaction empties the table
// and fills it, so that no packet meets a table that is not whole.
//
// The meaning of each field is kube-proxy's in its nftables mode, which is the reference.
package service
