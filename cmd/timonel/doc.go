// Command timonel is the operator's tool: it brings a cluster of real
// controllers and agents up on this host, breaks it on request, shows what it is
// doing, and speaks to its API with an embedded kubectl.
//
//	timonel up                  three controllers, two agents, a sample application
//	timonel status              who leads, members, nodes, pods
//	timonel members list        the controllers that keep the log
//	timonel kubectl get pods
//	timonel kill c1 && timonel start c1
//	timonel down
//
// Every command acts on the cluster in the run folder, ./run or --run.
package main
