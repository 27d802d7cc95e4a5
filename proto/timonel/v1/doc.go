// Package timonelv1 is what controllers and agents say to each other: the agent's
// stream (Agents), and what controllers ask one another (Consensus, Membership,
// Peers). All of it but keepalive.go is generated from the .proto files by `make
// generate`. Kubernetes objects travel in their own protobuf encoding.
//
// [ServerOptions] and [DialOptions] hold what both ends of a connection to a
// cluster port must agree on.
package timonelv1
