// Package services measures a node's Services beside kube-proxy's nftables mode, from
// the module: 10,000 Services of 10 endpoints, in a network namespace of its own.
//
//	go test -run '^$' -bench . -benchtime 3x ./test/bench/services
package services
