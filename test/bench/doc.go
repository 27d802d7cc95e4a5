// Command bench measures Timonel beside Kubernetes on etcd: the same load, with
// protobuf clients, against any Kubernetes API, in rounds that alternate between
// the sides, on one machine and one disk. It prints the medians as a table.
//
//	make bench                                   # every side, every row
//	go run ./test/bench -sides timonel -rows create32,get32 -seconds 5 -rounds 1
//	go run ./test/bench -sides kubernetes1,timonel -rows scheduling -shapes basic,affinity -nodes 500,5000
//	go run ./test/bench -kubeconfig FILE         # an API that runs already
//
// Sides: three Timonel controllers; and one kube-apiserver, kube-scheduler and
// kube-controller-manager on one or on three etcd members. All processes listen
// on free ports of 127.0.0.1 and talk TLS with client certificates, etcd's
// members included. Clients of Timonel are spread over the three controllers;
// Kubernetes has one API server, as it needs no more for its own availability on
// one machine and more of them would only cost it memory here.
//
// The row scheduling, which is measured when it is asked for, is upstream's scheduler_perf:
// its shapes of Nodes and pods, from the creation of the pods that count to the last one's binding,
// and how many times Kubernetes' rate Timonel's is.
//
// Only one side runs at a time. Each starts with an empty data folder.
package main
