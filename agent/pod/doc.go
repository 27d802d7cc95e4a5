// Package pod runs the node's pods: what a v1.Pod asks for is compared with what CRI says
// is there, the next steps are done, and a v1.PodStatus is reported as the kubelet would.
//
// One goroutine a pod, its worker, looks again when something happens: a new desired
// state, an event from containerd, a probe's verdict, a pull's end, a timer. It does not
// poll. Each time it makes a pass:
//
//	want   what the pod should be          others set it; a pass has its own copy
//	seen   what there is of it             CRI's word, and what the worker knows beside
//	waits  what is put off, until when     back-offs, with explicit times
//
//	plan(want, seen, waits, now) -> steps, why containers wait, when to look again
//	makeStatus(want, seen, pass, now) -> v1.PodStatus
//
// Both are pure: no clock, no lock, nothing that they change. The steps are done in one
// place, and what they find is added to what is seen: an image that is not there, a
// volume that cannot be made. Then it is planned anew, with a new look at CRI if a step
// has made something there. A plan that leads to nothing new ends the pass; its last
// steps are the report, and removing what is old. A step that fails is put off in waits,
// so that it is not planned again before its time, and the status says why.
//
// testdata tells what is planned, as stories: a pod, what happens to it, and the steps and
// the status that follow.
//
// Two kinds of goroutines beside the worker's own wait for a container's sake: one for each
// that is being stopped or runs its postStart hook (around), one for each probe (prober).
// They change what the next look finds and wake the worker. It waits for them in the end.
//
//	manager.go     which pods have workers, and who is woken by what
//	worker.go      one pod: look, plan, do
//	want.go        what a pod should be
//	seen.go        what is seen of it; observe.go: what CRI says
//	waits.go       what it waits for by the clock, and for CRI to notice
//	steps.go       the steps that there are
//	plan.go        what to do next: pods that are to run
//	containers.go  which containers to start and to stop, whatever has to be waited for
//	ending.go      pods that are to end, and for how long that may take
//	ephemeral.go   containers that are added to a pod to look at it
//	resize.go      what a running pod asks for and does not have
//	status.go      what to report
//	do.go          doing the steps; start.go and stop.go: those that CRI does
//	accept.go      whether the node takes the pod, asked once (package admission)
//	classes.go     the CPU weights of classes of pods
//	policy.go      network policies: nothing starts before they hold
//	evict.go       what others ask of pods for the node's sake
//	usage.go       what a pod takes of the node
//	message.go     what containers left to say; event.go: what is told of a pod
//	config.go, security.go, env.go, mounts.go, dns.go, resources.go
//	               from a v1.Pod to CRI's configuration
//	imagevolume.go images that are volumes of a container
//	probe.go, hook.go
//	               startup, liveness and readiness probes; lifecycle hooks
//
// Nothing is kept that CRI does not also know by labels and annotations, so a
// worker that starts anew adopts what runs.
package pod
