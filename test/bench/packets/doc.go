// Package packets measures what a node's tables cost packets: pod to pod, and through a Service,
// beside two network namespaces on a bridge with nothing else; and what network policies cost
// the node that carries them out.
package packets
