// Command controller runs one of a cluster's masters: a replica of the state in
// Raft, the Kubernetes API over it, the controllers' end of the agents' streams
// and, while this replica leads, the scheduler and the reconcilers.
//
//	controller --name c1 --data-dir /var/lib/timonel --bundle /etc/timonel/bundle \
//	    --bind-ip 10.0.0.1 --bootstrap-expect 3 --join 10.0.0.1:7946,10.0.0.2:7946
//
// It stops in order on SIGTERM: it hands over leadership, drains the API and
// closes the log. Killed outright, it loses nothing that it acknowledged.
package main
