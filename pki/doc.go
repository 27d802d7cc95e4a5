// Package pki makes and checks the cluster's certificates and join tokens.
//
// A cluster's secrets are one folder, the bundle, of which every controller has
// a copy:
//
//	ca.crt, ca.key                            the cluster's certificate authority
//	front-proxy-ca.crt, front-proxy-ca.key    signs the API aggregator's client
//	sa.key                                    signs service account tokens
//	gossip.key                                AES-256 key that the nodes' gossip pool begins with
//	token                                     the join token of a new cluster's first day
//	cluster-id                                the cluster's name for itself
//
// [CreateBundle] makes one, whole or not at all, and [LoadBundle] reads one and
// refuses what is missing, corrupt, readable by others or expired, naming the
// file. Certificates below the authorities are issued in memory and live for a year:
// [Bundle.Controller] issues those of one controller at its start, [Controller.Renew]
// again while it runs,
// [Bundle.ClientCert] a person's. An agent's ([Bundle.SignNode]) lives for a week,
// and the running agent renews it.
//
// Who somebody is stands in the certificate's subject, never in an address, so
// that a machine may change its address:
//
//	controller  CN timonel:controller:NAME  O timonel:controllers
//	node        CN system:node:NAME         O system:nodes
//
// An agent joins knowing only a token, "timonel1.<sha256 of ca.crt>.<secret>".
// The first part lets it recognise the cluster ([Token.ClientTLS]), the second
// lets the cluster recognise it. Which secrets are good, which key a node's name is
// bound to and which keys were revoked is in the replicated state: package trust.
package pki
