// Package agent is a worker's side of Timonel: it runs what controllers want
// on this node in containerd and says what became of it.
//
//	stream  ──▶ desired ──▶ pod ──▶ containerd (CRI)
//	   ▲                     │  ▲
//	   └──── status ─────────┘  └── containerd's events
//
// The subpackages each have one job: stream talks to controllers, desired
// keeps what they want, pod runs it, eviction ends what takes too much of the
// node, metering says what is taken, volume, image and podnet serve pod, containerd owns the runtime, node
// describes the machine, logs rotates what containers say, kubelet serves logs and
// exec through tunnels. This package wires them together.
//
//	a, err := agent.New(ctx, agent.Config{Name: "a1", DataDir: dir, ...})
//	if err != nil { ... }
//	err = a.Run(ctx) // containers go on when it returns
package agent
