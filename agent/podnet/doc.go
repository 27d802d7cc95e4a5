// Package podnet connects this node's pods: a bridge with addresses of the
// node's pod ranges through the standard CNI plugins, routes to the pod ranges of
// nodes on the same network segment and VXLAN to those of others, and address
// translation for what leaves the cluster. It works in whatever network namespace the
// agent runs in.
//
// An Update is from what the controllers say to all that the kernel must have for it
// (hops that passed the Guard, paths, rules, tunnel, routes, in this order), and removes
// what is there too much last, so that packets have a way all the time. Nothing is kept
// but what a fresh agent would need: what is there is read from the kernel each time.
package podnet
