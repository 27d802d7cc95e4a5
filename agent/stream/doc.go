// Package stream is the agent's end of the one connection that a worker has:
// it dials any controller, takes the desired state into a desired.Store, sends
// status up, and dials back for tunnels (logs, exec, attach, port-forward).
//
// A stream that breaks is opened again at once on another controller, which is
// told what this node has and answers with the difference; nothing that runs on
// the node depends on it.
//
//	c := stream.New(stream.Config{NodeName: "a1", TLS: tls, Controllers: addrs, Desired: store, ...})
//	go c.Run(ctx)
//	c.SetPodStatus(pod, status) // sent now, or when a controller is reachable
package stream
