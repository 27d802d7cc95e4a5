package dispatch

import (
	"bytes"
	"fmt"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	pb "timonel/proto/timonel/v1"
	"timonel/state/objects"
)

// sendNode tells the agent what pods are held against of its own Node: labels,
// taints and what can be allocated, which others than the agent set, too; and which
// volumes the cluster knows to be in use there and has attached. It is
// of the same snapshot as the pods that follow, so that a pod which was bound
// for the sake of a new label never comes before that label.
func (s *session) sendNode(snapshot *objects.Snapshot) error {
	live, ok := snapshot.Nodes().Get("", s.node)
	if !ok {
		return nil // it is being registered; its creation wakes this session
	}
	body, err := nodeForAdmission(live).Marshal()
	if err != nil {
		return fmt.Errorf("encode node %s: %w", s.node, err)
	}
	if bytes.Equal(body, s.sentNode) {
		return nil
	}
	s.sentNode = body
	return s.stream.Send(&pb.ControllerMessage{Message: &pb.ControllerMessage_NodeSet{NodeSet: &pb.NodeSet{Node: body}}})
}

// nodeForAdmission leaves out what changes often and no pod waits for.
func nodeForAdmission(n *corev1.Node) *corev1.Node {
	return &corev1.Node{
		ObjectMeta: metav1.ObjectMeta{Name: n.Name, UID: n.UID, Labels: n.Labels},
		Spec:       corev1.NodeSpec{Taints: n.Spec.Taints, Unschedulable: n.Spec.Unschedulable},
		Status: corev1.NodeStatus{
			Allocatable: n.Status.Allocatable, VolumesInUse: n.Status.VolumesInUse, VolumesAttached: n.Status.VolumesAttached,
		},
	}
}
