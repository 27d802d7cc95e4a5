// Package kubelet serves the kubelet's HTTP API for this node, over tunnels
// that a controller asks for: logs, exec, attach, port-forward and statistics.
// There is no port and no authentication of its own: a tunnel comes over the
// stream that controller and node have authenticated each other on.
//
//	s := kubelet.New(kubelet.Config{Runtime: rt, Pods: pods, ...})
//	go s.Run(ctx)
//	s.Serve(conn) // for each tunnel
package kubelet
