package sched

import (
	"iter"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	policyv1 "k8s.io/api/policy/v1"
	resourcev1 "k8s.io/api/resource/v1"
	storagev1 "k8s.io/api/storage/v1"

	"timonel/state/objects"
)

// State is the immutable view of the cluster that a plan is made from. Objects
// are shared and are never changed by this package. Namespaced getters take
// namespace, name; the others a name.
type State interface {
	Nodes() iter.Seq[*corev1.Node]
	Node(name string) (*corev1.Node, bool)
	Pods() iter.Seq[*corev1.Pod]
	Pod(namespace, name string) (*corev1.Pod, bool)

	Namespaces() iter.Seq[*corev1.Namespace]
	Namespace(name string) (*corev1.Namespace, bool)

	ServicesIn(namespace string) iter.Seq[*corev1.Service]
	ReplicationController(namespace, name string) (*corev1.ReplicationController, bool)
	ReplicaSet(namespace, name string) (*appsv1.ReplicaSet, bool)
	StatefulSet(namespace, name string) (*appsv1.StatefulSet, bool)

	PersistentVolumeClaim(namespace, name string) (*corev1.PersistentVolumeClaim, bool)
	PersistentVolume(name string) (*corev1.PersistentVolume, bool)
	PersistentVolumes() iter.Seq[*corev1.PersistentVolume]
	StorageClass(name string) (*storagev1.StorageClass, bool)
	CSINode(name string) (*storagev1.CSINode, bool)
	CSIDriver(name string) (*storagev1.CSIDriver, bool)
	CSIStorageCapacities() iter.Seq[*storagev1.CSIStorageCapacity]
	VolumeAttachments() iter.Seq[*storagev1.VolumeAttachment]

	PodDisruptionBudgets() iter.Seq[*policyv1.PodDisruptionBudget]

	ResourceClaim(namespace, name string) (*resourcev1.ResourceClaim, bool)
	ResourceClaims() iter.Seq[*resourcev1.ResourceClaim]
	DeviceClass(name string) (*resourcev1.DeviceClass, bool)
	DeviceClasses() iter.Seq[*resourcev1.DeviceClass]
	ResourceSlices() iter.Seq[*resourcev1.ResourceSlice]
	DeviceTaintRules() iter.Seq[*resourcev1.DeviceTaintRule]
}

// Input is everything a plan depends on besides the configuration.
type Input struct {
	// Now stands in for the start time of victims that have none yet.
	Now time.Time
	// Seed breaks ties between equal nodes and says where in the list of nodes
	// the search starts. A caller that wants load spread passes a new one each
	// time; one that replays a plan passes the old one.
	Seed uint64
	// Snapshot is the view to plan from.
	Snapshot *objects.Snapshot
	// State, when set, is the view to plan from instead of Snapshot.
	State State
	// Cluster is derived from the same view by [Build] or [Cluster.Advance].
	// Nil: built for this call.
	Cluster *Cluster
	// Pods are the pending pods to try, in that order, as a [Queue] gives them; those
	// that do not wait for a node in Cluster are left out. Nil: all, by priority and age.
	Pods iter.Seq[*corev1.Pod]
	// Held are ResourceClaims with allocations that were asked for, of which nobody knows
	// whether they will be written: what they have is nobody else's.
	Held []*resourcev1.ResourceClaim
}

// Plan is what to do. Lists are in the order in which pods were taken.
type Plan struct {
	// Bindings assign pods to nodes. They are to be committed in this order or
	// at once: a later pod was placed knowing about the earlier ones.
	Bindings []Binding
	// Failures are pods that fit nowhere now.
	Failures []Failure
	// Preemptions evict pods so that a pending one fits later. The pending pod
	// is in Failures too.
	Preemptions []Preemption
	// Waiting are pods whose node is chosen and whose volumes must be bound or
	// provisioned there first, or whose devices must be made ready.
	Waiting []Waiting
	// Gated are pods that name something which is not there yet, or is about to be written.
	// There is nothing to tell of them; a change of it lets them be tried.
	Gated []Failure
	// Releases are ResourceClaims that give up their devices.
	Releases []Release
	// Remaining counts pending pods that were not tried because of
	// [Config.MaxPods] or [Config.MaxVictimSearches]; of those that [Input.Pods]
	// gave it counts the first alone.
	Remaining int
}

// Binding assigns a pod to a node.
type Binding struct {
	Pod  *corev1.Pod
	Node string
	// ResourceClaims are to be written before, one after another.
	ResourceClaims []ClaimWrite
}

// Release is a ResourceClaim that gives up its devices for a pod, which is nil where they
// were for one that is gone.
type Release struct {
	Pod *corev1.Pod
	ClaimWrite
}

// ClaimWrite is a ResourceClaim as it is to be, its resourceVersion that of the state the
// plan was made from: it must not be written to any other version, and what is asked for
// again is asked for in the same version. So what a plan was made without can no longer be
// written once the claim has changed.
type ClaimWrite struct {
	Claim *resourcev1.ResourceClaim
	// Status: its status is written, otherwise its finalizers.
	Status bool
}

// Failure says why a pod could not be placed. It becomes the pod's PodScheduled
// condition and a FailedScheduling event.
type Failure struct {
	Pod *corev1.Pod
	// Reason is [corev1.PodReasonUnschedulable] when no node fits, and
	// [corev1.PodReasonSchedulerError] when the pod cannot be understood.
	Reason string
	// Message is worded as upstream: "0/2 nodes are available: …".
	Message string
	// NominatedNode is the node where room is being made for the pod, to be
	// written to status.nominatedNodeName; empty to clear it.
	NominatedNode string
	// Causes are the filters that spoke against the nodes. They say which changes
	// can help; see [Queue].
	Causes Causes
}

// Preemption evicts Victims from Node to make room for Pod.
type Preemption struct {
	Pod     *corev1.Pod
	Node    string
	Victims []*corev1.Pod
	// Violations counts the victims whose PodDisruptionBudget allows no more
	// disruption; it is 0 whenever a choice without violations exists.
	Violations int
}

// Waiting is a pod whose node is decided and that must not be bound until its
// volumes are, and its devices ready. Writing Node to status.nominatedNodeName keeps its room.
type Waiting struct {
	Pod  *corev1.Pod
	Node string
	// Claims are the decisions to commit; empty when they were committed
	// earlier and the volumes are not ready yet.
	Claims []ClaimDecision
	// ResourceClaims are to be written, one after another.
	ResourceClaims []ClaimWrite
	// Brief: it is tried again as soon as they are, and its room need not be kept.
	Brief bool
}

// ClaimDecision ties an unbound claim to a node.
type ClaimDecision struct {
	Claim *corev1.PersistentVolumeClaim
	// Volume is the existing volume to bind to the claim, with claimRef set.
	// Nil: annotate the claim with volume.kubernetes.io/selected-node, and its
	// provisioner makes a volume.
	Volume *corev1.PersistentVolume
}
