package dispatch

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"

	pb "timonel/proto/timonel/v1"
	"timonel/state/objects"
)

// send keeps the agent up to date until ctx or the stream ends. It is the only
// one that sends.
func (s *session) send(ctx context.Context) error {
	if err := s.stream.Send(&pb.ControllerMessage{Message: &pb.ControllerMessage_Welcome{Welcome: &pb.Welcome{
		Controller: s.d.config.Name, Epoch: s.d.config.ClusterID, Full: s.full,
	}}}); err != nil {
		return err
	}
	notify(s.wake)
	for {
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case m := <-s.control:
			if err := s.stream.Send(m); err != nil {
				return err
			}
		case <-s.wake:
			if err := s.sendCluster(); err != nil {
				return err
			}
			if err := s.sync(); err != nil {
				return err
			}
		}
	}
}

func (s *session) sendCluster() error {
	cluster := s.d.hub.currentCluster()
	if cluster == s.cluster {
		return nil
	}
	s.cluster = cluster
	return s.stream.Send(&pb.ControllerMessage{Message: &pb.ControllerMessage_Cluster{Cluster: cluster}})
}

// resume fills in what an agent has that knows everything up to revision after.
// False means that this is not known any more.
func (s *session) resume(after int64) bool {
	// Everything below is about one snapshot and what led to it.
	snapshot := s.d.config.Objects.Snapshot()
	gone := make(map[podKey]types.UID)
	if snapshot.Revision() != after {
		over, cancel := context.WithCancel(context.Background())
		cancel() // do not wait for further changes
		changes, err := s.d.config.Objects.Changes(over, after)
		switch {
		case err != nil: // nothing changed
		case changes.Reset:
			return false
		default:
			snapshot = changes.Snapshot
		}
		for _, c := range changes.Changed {
			if c.Old == nil || c.Old.Revision > after {
				continue // the agent never knew it
			}
			switch o := c.Old.Object.(type) {
			case *corev1.Pod:
				if o.Spec.NodeName == s.node {
					gone[podKey{o.Namespace, o.Name}] = o.UID
				}
			case *corev1.ConfigMap:
				s.objects[objKey{kindConfigMap, o.Namespace, o.Name}] = c.Old.Revision
			case *corev1.Secret:
				s.objects[objKey{kindSecret, o.Namespace, o.Name}] = c.Old.Revision
			case *corev1.ServiceAccount:
				s.objects[objKey{kindServiceAccount, o.Namespace, o.Name}] = c.Old.Revision
			}
		}
	}
	for k, uid := range gone {
		s.pods[k] = sentPod{uid: uid}
	}
	// Objects that changed are kept only if a pod of the node uses them, below.
	changed := s.objects
	s.objects = make(map[objKey]int64)
	for pod := range snapshot.PodsOnNode(s.node) {
		k, revision := podKey{pod.Namespace, pod.Name}, revisionOf(pod)
		if revision <= after {
			s.pods[k] = sentPod{pod.UID, revision}
		}
		if account, ok := snapshot.ServiceAccounts().Get(pod.Namespace, accountOf(pod)); revision > after || ok && revisionOf(account) > after {
			continue // it may refer to what it did not refer to before: send all of it
		}
		references(pod, snapshot, func(ref objKey) {
			if o, at := lookup(snapshot, ref); o != nil && at <= after {
				s.objects[ref] = at
			} else if old, ok := changed[ref]; ok {
				s.objects[ref] = old
			}
		})
	}
	s.synced = after
	return true
}

func accountOf(pod *corev1.Pod) string {
	if pod.Spec.ServiceAccountName != "" {
		return pod.Spec.ServiceAccountName
	}
	return defaultServiceAccount
}

// sync sends the difference between what the node should have and what it has:
// objects before the pods that need them, objects that are not needed any more
// last.
//
// The revision in each message is one that the agent may resume from even if it
// gets nothing more: not the object's own, because objects do not go out in the
// order of their revisions.
func (s *session) sync() error {
	snapshot := s.d.config.Objects.Snapshot()
	pods := slices.Collect(snapshot.PodsOnNode(s.node))
	refs := make(map[objKey]struct{})
	for _, pod := range pods {
		references(pod, snapshot, func(k objKey) { refs[k] = struct{}{} })
	}
	s.d.hub.setRefs(s, refs)
	// What changed before setRefs is in this snapshot, what changes later wakes us.
	sent, err := s.sendObjects(s.d.config.Objects.Snapshot(), refs)
	if err != nil {
		return err
	}

	wanted := make(map[podKey]*corev1.Pod, len(pods))
	for _, pod := range pods {
		wanted[podKey{pod.Namespace, pod.Name}] = pod
	}
	for _, k := range sortedPods(s.pods) {
		had := s.pods[k]
		if pod := wanted[k]; pod != nil && pod.UID == had.uid {
			continue
		}
		delete(s.pods, k)
		sent = true
		if err := s.stream.Send(&pb.ControllerMessage{Message: &pb.ControllerMessage_PodRemove{PodRemove: &pb.PodRemove{
			Namespace: k.namespace, Name: k.name, Uid: string(had.uid), Revision: s.synced,
		}}}); err != nil {
			return err
		}
	}
	for _, pod := range pods {
		k, revision := podKey{pod.Namespace, pod.Name}, revisionOf(pod)
		if had, ok := s.pods[k]; ok && had.revision == revision {
			continue
		}
		body, err := pod.Marshal()
		if err != nil {
			return fmt.Errorf("encode pod %s/%s: %w", pod.Namespace, pod.Name, err)
		}
		s.pods[k] = sentPod{pod.UID, revision}
		sent = true
		if err := s.stream.Send(&pb.ControllerMessage{Message: &pb.ControllerMessage_PodSet{PodSet: &pb.PodSet{
			Pod: body, Revision: s.synced,
		}}}); err != nil {
			return err
		}
	}
	for k := range s.objects {
		if _, ok := refs[k]; ok {
			continue
		}
		sent = true
		if err := s.removeObject(k); err != nil {
			return err
		}
	}
	if revision := snapshot.Revision(); sent || s.full || revision-s.synced >= progressEvery || revision < s.synced {
		s.full, s.synced = false, revision
		return s.stream.Send(&pb.ControllerMessage{Message: &pb.ControllerMessage_Synced{Synced: &pb.Synced{Revision: revision}}})
	}
	return nil
}

// sendObjects sends those of refs that the agent has not, or not at their
// present revision.
func (s *session) sendObjects(snapshot *objects.Snapshot, refs map[objKey]struct{}) (sent bool, err error) {
	for _, k := range slices.SortedFunc(maps.Keys(refs), compareKeys) {
		o, revision := lookup(snapshot, k)
		had, known := s.objects[k]
		if o == nil {
			if known {
				sent = true
				if err := s.removeObject(k); err != nil {
					return sent, err
				}
			}
			continue
		}
		if known && had == revision {
			continue
		}
		body, err := o.Marshal()
		if err != nil {
			return sent, fmt.Errorf("encode %s %s/%s: %w", k.kind, k.namespace, k.name, err)
		}
		s.objects[k] = revision
		sent = true
		if err := s.stream.Send(&pb.ControllerMessage{Message: &pb.ControllerMessage_ObjectSet{ObjectSet: &pb.ObjectSet{
			Kind: k.kind, Object: body, Revision: s.synced,
		}}}); err != nil {
			return sent, err
		}
	}
	return sent, nil
}

func (s *session) removeObject(k objKey) error {
	delete(s.objects, k)
	return s.stream.Send(&pb.ControllerMessage{Message: &pb.ControllerMessage_ObjectRemove{ObjectRemove: &pb.ObjectRemove{
		Kind: k.kind, Namespace: k.namespace, Name: k.name, Revision: s.synced,
	}}})
}

func compareKeys(a, b objKey) int {
	if c := strings.Compare(a.kind, b.kind); c != 0 {
		return c
	}
	if c := strings.Compare(a.namespace, b.namespace); c != 0 {
		return c
	}
	return strings.Compare(a.name, b.name)
}

func sortedPods(m map[podKey]sentPod) []podKey {
	return slices.SortedFunc(maps.Keys(m), func(a, b podKey) int {
		return compareKeys(objKey{"", a.namespace, a.name}, objKey{"", b.namespace, b.name})
	})
}
