// Package metering says what a node and the containers of its pods take: how much CPU
// between two samples, and how much memory at the second.
//
//	u := metering.Between(last, now) // to a controller, which serves metrics.k8s.io
//
// It is a pure function of the samples; who takes them reads cgroups and the clock.
package metering
