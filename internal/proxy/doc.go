// Package proxy is the load balancer that `timonel up` puts in front of the
// controllers' APIs, as operators do in production: a TCP forwarder that sends
// each connection to a controller whose /readyz answers, and ends connections
// to one that stopped answering, so that clients reconnect to a live one.
//
//	err := proxy.Run(ctx, proxy.Config{Listen: "10.77.0.1:6443", Backends: …, CAFile: …})
package proxy
