// Package node describes the machine as a v1.Node: its capacity, addresses,
// system information and conditions. It reads the machine; it sends nothing.
package node
