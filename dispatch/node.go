package dispatch

import (
	"context"
	"fmt"
	"maps"

	corev1 "k8s.io/api/core/v1"
	apiequality "k8s.io/apimachinery/pkg/api/equality"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// reportNode takes what the agent says of its node.
func (s *session) reportNode(node *corev1.Node) {
	s.reports.mu.Lock()
	if node.Name == "" {
		node.Name = s.node
	}
	s.reports.node = node
	s.reports.mu.Unlock()
	s.queueNode()
}

func (s *session) queueNode() { s.writer.add("node "+s.node, s.writeNode) }

// nodeChanged looks whether somebody took the node for dead: while its agent is
// connected, what the agent says holds. Other differences are left alone, so that
// two who write what the other changes back do not go on for ever.
func (s *session) nodeChanged(live *corev1.Node) {
	s.reports.mu.Lock()
	said := s.reports.node
	s.reports.mu.Unlock()
	if said == nil {
		return
	}
	for i := range said.Status.Conditions {
		c := &said.Status.Conditions[i]
		if was, known := conditionOf(&live.Status, c.Type); !known || was.Status != c.Status {
			s.queueNode()
			return
		}
	}
}

// writeNode creates the node's object, or makes its labels, annotations and status what
// the agent said. It writes nothing when they are.
func (s *session) writeNode(ctx context.Context) error {
	s.reports.mu.Lock()
	said := s.reports.node
	s.reports.mu.Unlock()
	if said == nil {
		return nil
	}
	live, ok := s.d.config.Objects.Snapshot().Nodes().Get("", s.node)
	for try := 0; ; try++ {
		if !ok || try > 0 {
			var err error
			live, err = s.client.Nodes().Get(ctx, s.node, metav1.GetOptions{})
			if apierrors.IsNotFound(err) {
				live, err = s.createNode(ctx, said)
				if apierrors.IsAlreadyExists(err) {
					continue
				}
			}
			if err != nil {
				return fmt.Errorf("register node %s: %w", s.node, err)
			}
		}
		err := s.updateNode(ctx, live, said)
		if (apierrors.IsConflict(err) || apierrors.IsNotFound(err)) && try < 3 {
			continue
		}
		return err
	}
}

func (s *session) createNode(ctx context.Context, said *corev1.Node) (*corev1.Node, error) {
	node := &corev1.Node{
		ObjectMeta: metav1.ObjectMeta{Name: s.node, Labels: said.Labels, Annotations: annotate(nil, said.Annotations)},
		Spec:       corev1.NodeSpec{Taints: said.Spec.Taints, ProviderID: said.Spec.ProviderID},
		Status:     said.Status,
	}
	out, err := s.client.Nodes().Create(ctx, node, metav1.CreateOptions{})
	if err == nil {
		s.log.Info("node registered")
	}
	return out, err
}

// updateNode writes what of the agent's report differs from the live object.
func (s *session) updateNode(ctx context.Context, live, said *corev1.Node) error {
	labels, annotations := withAll(live.Labels, said.Labels), annotate(live.Annotations, said.Annotations)
	if !maps.Equal(labels, live.Labels) || !maps.Equal(annotations, live.Annotations) {
		node := live.DeepCopy()
		node.Labels, node.Annotations = labels, annotations
		updated, err := s.client.Nodes().Update(ctx, node, metav1.UpdateOptions{})
		if err != nil {
			return fmt.Errorf("write labels and annotations of node %s: %w", s.node, err)
		}
		live = updated
	}
	next := mergeNodeStatus(&live.Status, &said.Status)
	if apiequality.Semantic.DeepEqual(&live.Status, next) {
		return nil
	}
	node := live.DeepCopy()
	node.Status = *next
	if _, err := s.client.Nodes().UpdateStatus(ctx, node, metav1.UpdateOptions{}); err != nil {
		return fmt.Errorf("write status of node %s: %w", s.node, err)
	}
	return nil
}

// annotate is withAll for annotations, of which an agent takes those back that it says
// to be empty.
func annotate(live, said map[string]string) map[string]string {
	out := withAll(live, said)
	for k, v := range said {
		if v == "" {
			delete(out, k)
		}
	}
	return out
}

// withAll is a map with the entries of another in it.
func withAll(live, said map[string]string) map[string]string {
	out := maps.Clone(live)
	if out == nil {
		out = make(map[string]string)
	}
	maps.Copy(out, said)
	return out
}

// mergeNodeStatus is what the agent says, with what only others may say kept, and
// without differences that are none: heartbeat times alone are no reason to write.
func mergeNodeStatus(live, said *corev1.NodeStatus) *corev1.NodeStatus {
	next := said.DeepCopy()
	next.VolumesAttached = live.VolumesAttached
	if next.Phase == "" {
		next.Phase = live.Phase
	}
	if next.Config == nil {
		next.Config = live.Config
	}
	for _, c := range live.Conditions {
		if !has(next.Conditions, func(n corev1.NodeCondition) bool { return n.Type == c.Type }) {
			next.Conditions = append(next.Conditions, c)
		}
	}
	now := metav1.Now()
	for i := range next.Conditions {
		n := &next.Conditions[i]
		was, known := conditionOf(live, n.Type)
		switch {
		case known && was.Status == n.Status:
			n.LastTransitionTime = was.LastTransitionTime
			if was.Reason == n.Reason && was.Message == n.Message {
				n.LastHeartbeatTime = was.LastHeartbeatTime
			}
		case known || n.LastTransitionTime.IsZero():
			n.LastTransitionTime = now
		}
		if n.LastHeartbeatTime.IsZero() {
			n.LastHeartbeatTime = now
		}
	}
	return next
}

func conditionOf(s *corev1.NodeStatus, t corev1.NodeConditionType) (corev1.NodeCondition, bool) {
	for _, c := range s.Conditions {
		if c.Type == t {
			return c, true
		}
	}
	return corev1.NodeCondition{}, false
}
