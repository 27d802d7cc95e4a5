// Package podnet connects this node's pods: a bridge with addresses of the
// node's pod CIDR through the standard CNI plugins, routes to the pod CIDRs of
// nodes on the same network, and address translation for what leaves the
// cluster. It works in whatever network namespace the agent runs in.
package podnet
