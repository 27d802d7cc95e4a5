// Package cluster brings a whole Timonel cluster up on one host, breaks it on
// request, looks at it and takes it down without a trace. Controllers and
// agents are the real programs, each on a machine of package machines.
//
// All of a cluster is in one folder, its run folder: cluster.json says what it
// consists of ([Spec]), each machine has a folder for its log and data, and
// kubeconfig is how to reach it. [Up] may be called again: it starts what does
// not run. Several clusters with different names and run folders live side by
// side.
package cluster
