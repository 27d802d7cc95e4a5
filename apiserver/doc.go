// Package apiserver serves the Kubernetes API, v1.37, from Timonel's own state.
//
// API types, defaulting, validation, REST storage, admission, authorization,
// server-side apply, custom resources and aggregation are upstream's, from the
// k8s.io modules; it is the only package that knows k8s.io/kubernetes. What is
// wired differently here is what upstream takes from etcd or keeps alive by
// writing to it:
//
//   - storage: every registry gets its storage.Interface from
//     [timonel/state/storage.Decorator]; no etcd client is made, anywhere.
//   - node ports: the allocator's bitmap is a key of the state, changed on
//     condition that it did not change (see nodeports.go).
//   - the kubernetes Service's endpoints: the controllers that gossip says are
//     alive, written by the leader when they change (see endpoints.go).
//   - no identity leases, no peer leases: a cluster at rest writes nothing.
//   - kubelet connections go through the agent's stream (see kubelet.go).
//   - callers in this process (the leader's reconcilers, agents' streams, the
//     server's own informers) skip the network (see inprocess.go).
//   - start-up waits for a leader as long as it takes (see hooks.go and
//     [Server.Run]); upstream would end the process after a minute.
//   - specifications are rendered once and what they were built from is dropped
//     (see openapi.go); a client certificate is verified every ten seconds
//     instead of at every request (see certcache.go).
//   - bodies of requests are read before they have a seat of priority and fairness, and
//     have a bound in bytes, all together (see bodies.go).
//   - objects are counted before they are read for an answer, and answers have a bound in
//     bytes, all together (see answers.go).
//   - which route serves a kind of request is remembered (see routes.go), and
//     requests pass no filters that only measure or trace the others (see
//     handlers.go).
//
// Its use:
//
//	server, err := apiserver.New(ctx, apiserver.Config{…})
//	go server.Run(ctx) // serves until ctx ends, then drains
//	client, err := kubernetes.NewForConfig(server.InProcess(&user.DefaultInfo{Name: "timonel:reconciler", Groups: []string{"system:masters"}}))
//
// Kubernetes keeps some settings in process-wide variables (feature gates,
// capabilities, the default toleration seconds), which New sets. Several
// servers in one process, as in tests, share them.
package apiserver
