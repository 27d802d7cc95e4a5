// Package trust is who is who in the cluster, as the replicated state says: which
// join tokens are good, which key a node's name is bound to, which keys were taken
// back, and with which keys members gossip. Gossip says who answers; who somebody is
// stands here, and so it is the same on every controller.
//
//	/timonel/trust/tokens/ID          a join token: hash of its secret, expiry, uses
//	/timonel/trust/nodes/NAME         the public key that a node's name is bound to
//	/timonel/trust/revoked/KEY        a public key that is good for nothing any more
//	/timonel/trust/founding           when the cluster was founded
//	/timonel/trust/gossip/POOL        the keys of a pool of gossip, sealed for who has the bundle
//
// The keys are outside of the Kubernetes API's /registry, so that no API call
// reaches them. Every change is one transaction on conditions, so that of two
// agents that join with one name through two controllers exactly one wins, and a
// token's uses are counted exactly once. Checks read this replica's memory: they
// are as new as what the replica has applied, and cost a look-up.
//
//	r := trust.New(trust.Config{State: backend})
//	token, secret, err := r.CreateToken(ctx, trust.TokenSpec{Uses: 3})
//	node, err := r.Join(ctx, trust.Join{Secret: secret, Node: "a1", Key: trust.KeyOf(cert)})
//	err = r.CheckNode("a1", trust.KeyOf(cert))
//	_, err = r.RevokeNode(ctx, "a1", trust.By{User: "admin", Reason: "stolen"})
//
// [Registry.Follow] tells of changes, for those who hold a connection open on
// the strength of a check.
package trust
