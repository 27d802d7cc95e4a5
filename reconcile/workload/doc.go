// Package workload holds the reconcilers that keep as many pods, of the right
// template, as their owners ask for. Those of work that ends are in a folder of their
// own, timonel/reconcile/workload/job.
package workload
