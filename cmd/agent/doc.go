// Command agent is Timonel's worker: it joins a cluster with a token, keeps one
// stream to some controller, and runs the pods of its node in containerd.
//
//	agent --name a1 --data-dir /var/lib/timonel --controllers c1:7443,c2:7443 --token-file /etc/timonel/token
//	agent cleanup --name a1 --data-dir /var/lib/timonel
//
// Stopping it stops no container; cleanup does.
package main
