// Package node has tests of all that carries packets on one node at once: the pod network,
// Services, network policies, names and balancers' addresses, as the agent runs them.
package node
