package pod

import (
	"slices"
	"time"

	corev1 "k8s.io/api/core/v1"

	"timonel/agent/admission"
	"timonel/agent/image"
	"timonel/agent/volume"
)

// known is what a worker has done and been told about its pod, beyond what CRI knows.
// Only its run changes it; what others read of it is changed under the worker's lock.
type known struct {
	asked    bool // whether this node takes it
	accepted bool // it holds a part of the node
	over     bool // nothing of it runs any more
	swept    bool // it has ended, and what it had on the node was removed
	cleaned  bool // it is to go, and no trace of it is left
	verdict  *verdict

	volumes   volume.Mounts // nil: not made yet
	volumesOf uint64        // want.shown, of what they were last made from
	refreshAt time.Time     // when they are to be made again; zero: never

	policed       string               // sandbox that Policies was told of
	applied       *allocation          // what the pod's cgroups have; nil: what it was given
	refusedResize *admission.Rejection // why it does not get what it asks for now
	stopped       map[string]bool      // sandboxes that were stopped, with their network
}

// seen is all that is known of one pod at one moment. Steps add to it what they find.
type seen struct {
	observed
	*known
	beside  map[string]beside // by container id, of those that run
	old     *corev1.PodStatus // the last one: of this agent, one before it, or the API's
	hostIPs []string
	refused map[string]string // ephemeral containers that this node does not start, and why
	sealing bool              // it makes mounts read-only with all below them, where a pod asks for it

	// What was asked since CRI was.
	images      map[string]image.Result // of containers whose image is not there, by name
	resizeAsked bool
	guarded     bool   // what holds for the pod's addresses is in the kernel
	unguarded   string // or why not
}

// beside is what is known of a container that runs beside CRI's word.
type beside struct {
	started bool // its postStart hook and its startup probe have passed
	ready   bool // by its readiness probe, if it has one
	// failed is the probe that demands that it ends, or its hook; empty: all is well.
	failed string
	stopBy time.Time // it is being stopped, with SIGKILL at that time; zero: it is not
}

// usable is the sandbox that containers can be started in, or nil.
func (s *seen) usable() *sandbox {
	box := s.current()
	if box != nil && len(box.ips) == 0 && !box.hostNet {
		return nil
	}
	return box
}

// addresses are a sandbox's, which may be the node's.
func (s *seen) addresses(box *sandbox) []string {
	switch {
	case box == nil:
		return nil
	case box.hostNet:
		return s.hostIPs
	}
	return box.ips
}

// stopping says whether a container of a name runs that is being stopped.
func (s *seen) stopping(name string) bool {
	for _, c := range s.containers[name] {
		if c.running() && !s.beside[c.id].stopBy.IsZero() {
			return true
		}
	}
	return false
}

// forget drops a container that was removed.
func (s *seen) forget(c *container) {
	var left []*container // a new list: plans hold the old one
	for _, other := range s.containers[c.name] {
		if other.id != c.id {
			left = append(left, other)
		}
	}
	s.containers[c.name] = left
}

// forgetSandbox drops a sandbox that was removed.
func (s *seen) forgetSandbox(id string) {
	s.sandboxes = slices.DeleteFunc(slices.Clone(s.sandboxes), func(box sandbox) bool { return box.id == id })
}
