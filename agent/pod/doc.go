// Package pod runs the node's pods. One worker goroutine a pod compares what
// is desired with what CRI says is there, does the next steps, and reports a
// v1.PodStatus as the kubelet would. It looks again when something happens: a
// new desired state, an event from containerd, a probe's verdict, a pull's end,
// a timer. It does not poll.
//
//	manager.go    which pods have workers, and who is woken by what
//	worker.go     one pod: observe, plan, act, report
//	observe.go    what CRI says of a pod
//	plan.go       what to do next, a pure function
//	status.go     what to report, a pure function
//	accept.go     whether the node takes the pod, asked once (package admission)
//	resize.go     what a running pod asks for and does not get
//	ephemeral.go  containers that are added to a pod to look at it
//	classes.go    the CPU weights of classes of pods
//	start.go      sandboxes and containers: starting them
//	stop.go       killing containers, ending pods, cleaning up
//	evict.go      ending pods for what they take of the node
//	usage.go      what a pod takes of the node
//	message.go    what containers left to say
//	config.go, security.go, env.go, mounts.go, resources.go
//	              from a v1.Pod to CRI's configuration
//	imagevolume.go
//	              images that are volumes of a container
//	probe.go, hook.go
//	              startup, liveness and readiness probes; lifecycle hooks
//
// Nothing is kept that CRI does not also know by labels and annotations, so a
// worker that starts anew adopts what runs.
package pod
