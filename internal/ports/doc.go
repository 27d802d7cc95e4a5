// Package ports takes connections from strangers within limits, so that nobody who
// reaches a port takes the process' descriptors or memory.
//
// A [Listener] bounds how many connections there are, how many of them have not yet
// finished their handshake, and for how long they may go without. When it is full, the
// address with the most connections gives way to others: its longest idle connection
// is closed. A client that keeps its connection in use, or comes from an address of
// its own, does not notice that another opens thousands.
//
//	ln, err := net.Listen("tcp", ":6443")
//	limited := ports.Limit(ln, ports.Limits{Name: "api", Connections: 4096})
//	server.Serve(limited)
//
// What it tells in [Listener.Stats] belongs on a metrics page; [Listener.Failing] says
// since when no connection can be accepted at all.
package ports
