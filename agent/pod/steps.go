package pod

import (
	"time"

	corev1 "k8s.io/api/core/v1"

	"timonel/agent/eviction"
)

// step is one thing to do for a pod. What each is, a plan decides; do.go does them.
type step interface{ aStep() }

type (
	// admit asks whether the node takes the pod; adopt: it was started already.
	admit struct{ adopt bool }
	// judge is the verdict that the pod is to end, for a reason of the node's own.
	judge struct {
		verdict  *verdict
		eviction *eviction.Eviction // nil: it is another reason
	}
	// grant asks for the other resources that the pod asks for now.
	grant struct{}
	// resize gives what runs the resources that the pod was given; last: all of it has
	// them then.
	resize struct {
		containers []*container
		last       bool
	}
	// kill stops a container, because it is not as it should be or the pod is to end:
	// preStop and SIGTERM, and SIGKILL after grace. hurry: it is being stopped already.
	kill struct {
		container *container
		spec      *corev1.Container
		message   string
		probe     string // the probe whose grace period counts, if any
		grace     time.Duration
		hurry     bool
		forgive   bool // it did not fail: the next one waits for nothing
	}
	// makeVolumes makes the pod's volumes, or brings them up to date.
	makeVolumes struct{}
	// makeSandbox makes the pod's namespaces, network and cgroup.
	makeSandbox struct{ attempt uint32 }
	// guard tells Policies of the pod's addresses, and asks whether all that holds for
	// them is in the kernel.
	guard struct{ box *sandbox }
	// start is a container to start, and to get the image for.
	start struct {
		spec     *corev1.Container
		init     bool
		restarts int32
		// ephemeral is the whole of an ephemeral container, else nil.
		ephemeral *corev1.EphemeralContainer
		target    string     // container that an ephemeral one shares processes with, if any
		previous  *container // the one before, in any sandbox; nil at first
	}
	// tell is an event that would repeat; the same is told once.
	tell struct{ kind, reason, message, container string }
	// watch probes what runs, and nothing else; of a pod that ends, for readiness alone.
	watch struct{}
	// report computes the pod's status, and sends it if it has changed.
	report struct{}
	// stopSandbox takes down a sandbox and its network.
	stopSandbox struct{ id string }
	// remove removes containers that have ended, then sandboxes that are stopped.
	remove struct {
		containers []*container
		sandboxes  []string
	}
	// reset removes all containers in this order, for the pod to start anew; some of them
	// have asked for it.
	reset struct{ containers, asked []*container }
	// giveBack gives back what the pod had of the node.
	giveBack struct{}
	// sweep frees what a pod that has ended, and is not deleted yet, has on the node;
	// whole: of one that is to free room, all.
	sweep struct{ whole bool }
	// clean removes all traces of a pod that is to go.
	clean struct{}
	// reclaimed answers who asked that what has ended be removed.
	reclaimed struct{}
	// farewell says that nothing of the pod is left on this node.
	farewell struct{}
)

func (admit) aStep()       {}
func (judge) aStep()       {}
func (grant) aStep()       {}
func (resize) aStep()      {}
func (kill) aStep()        {}
func (makeVolumes) aStep() {}
func (makeSandbox) aStep() {}
func (guard) aStep()       {}
func (start) aStep()       {}
func (tell) aStep()        {}
func (watch) aStep()       {}
func (report) aStep()      {}
func (stopSandbox) aStep() {}
func (remove) aStep()      {}
func (reset) aStep()       {}
func (giveBack) aStep()    {}
func (sweep) aStep()       {}
func (clean) aStep()       {}
func (reclaimed) aStep()   {}
func (farewell) aStep()    {}
