// Package names measures the DNS server of a node beside CoreDNS, both as processes of
// their own with the same 10,000 Services, asked by the same clients in turn:
//
//	go test -run '^$' -bench . -benchtime 10s ./test/bench/names
//
// Printed are queries/s, the latency of a query (p50, p99), what the server's process
// used of a processor for one query, and its resident memory. CoreDNS has the plugins and
// options of kubeadm's configuration, and learns the Services from a list that this
// program serves; `make bench-network` builds it (test/bench/coredns). TIMONEL_COREDNS
// names another.
package names
