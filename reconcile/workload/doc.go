// Package workload holds the reconcilers that keep as many pods, of the right
// template, as their owners ask for.
package workload
