package workload

import (
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"

	"timonel/reconcile"
	"timonel/state/objects"
)

// What the stories of this room look at from outside.
const (
	AtOnce   = atOnce
	LastHold = lastHold
)

var FailedAtOnce = failedAtOnce

// Manage is what a pass of ReplicaSet does about the number of pods.
func Manage(in reconcile.Input, rs *appsv1.ReplicaSet, pods []*corev1.Pod, result *reconcile.Result) {
	ReplicaSet{}.engine().manage(in, rs, pods, result)
}

// The history that StatefulSets and DaemonSets share.
type History = history

var (
	HistoryOf        = historyOf
	RevisionData     = revisionData
	RevisionTemplate = revisionTemplate
	DataHash         = dataHash
	RevisionName     = revisionName
)

func (h *history) Current(data []byte) (*appsv1.ControllerRevision, *reconcile.Request) {
	return h.current(data)
}

func (h *history) Propose(s *objects.Snapshot, data []byte, collisions int32, name func(int32) string) (*appsv1.ControllerRevision, bool, int32) {
	return h.propose(s, data, collisions, name)
}

func (h *history) Truncate(n int, live func(*appsv1.ControllerRevision) bool) []reconcile.Request {
	return h.truncate(n, live)
}

func (h *history) Names() (out []string) {
	for _, rev := range h.revisions {
		out = append(out, rev.Name)
	}
	return out
}

func (h *history) Requests() []reconcile.Request { return h.requests }
