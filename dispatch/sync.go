package dispatch

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"

	"timonel/dispatch/network"
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
			if err := s.sendKeys(); err != nil {
				return err
			}
			if err := s.sync(); err != nil {
				return err
			}
		}
	}
}

func (s *session) sendCluster() error {
	cluster := s.d.hub.currentCluster(s)
	if cluster == s.cluster || cluster == nil {
		return nil
	}
	s.cluster = cluster
	return s.stream.Send(&pb.ControllerMessage{Message: &pb.ControllerMessage_Cluster{Cluster: cluster}})
}

// sync sends the difference between what the node should have and what it has:
// objects before the pods that need them, objects that are not needed any more
// last.
//
// The revision in each message is that of the last Synced: agents that know no
// lists take it for one to resume from, and objects do not go out in the order of
// their own revisions.
func (s *session) sync() error {
	snapshot := s.d.config.Objects.Snapshot()
	if err := s.sendNode(snapshot); err != nil {
		return err
	}
	pods := slices.Collect(snapshot.PodsOnNode(s.node))
	refs := make(map[objKey]struct{})
	wanted(s.node, pods, snapshot, func(k objKey) { refs[k] = struct{}{} })
	s.d.hub.setRefs(s, refs)
	// What changed before setRefs is in this snapshot, what changes later wakes us.
	sent, err := s.sendObjects(s.d.config.Objects.Snapshot(), refs)
	if err != nil {
		return err
	}

	bound := make(map[podKey]*corev1.Pod, len(pods))
	for _, pod := range pods {
		bound[keyOfPod(pod)] = pod
	}
	for _, k := range sortedPods(s.pods) {
		if bound[k] != nil {
			continue
		}
		delete(s.pods, k)
		sent = true
		if err := s.stream.Send(&pb.ControllerMessage{Message: &pb.ControllerMessage_PodRemove{PodRemove: &pb.PodRemove{
			Namespace: k.namespace, Name: k.name, Uid: string(k.uid), Revision: s.synced,
		}}}); err != nil {
			return err
		}
	}
	holding := network.NewHolding(snapshot)
	for _, pod := range pods {
		k, revision := keyOfPod(pod), objects.Revision(pod)
		if had, ok := s.pods[k]; ok && had == revision {
			continue
		}
		body, err := pod.Marshal()
		if err != nil {
			return fmt.Errorf("encode pod %s/%s: %w", pod.Namespace, pod.Name, err)
		}
		policies := holding.Since(pod)
		if policies != 0 {
			s.d.network.Want(s.node, policies)
		}
		s.pods[k] = revision
		sent = true
		if err := s.stream.Send(&pb.ControllerMessage{Message: &pb.ControllerMessage_PodSet{PodSet: &pb.PodSet{
			Pod: body, Revision: s.synced, Policies: policies,
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
	if revision := snapshot.Revision(); sent || s.first || revision-s.synced >= progressEvery || revision < s.synced {
		s.first, s.synced = false, revision
		return s.stream.Send(&pb.ControllerMessage{Message: &pb.ControllerMessage_Synced{Synced: &pb.Synced{Revision: revision}}})
	}
	return nil
}

// sendObjects sends those of refs that the agent has not, or not at their
// present revision.
func (s *session) sendObjects(snapshot *objects.Snapshot, refs map[objKey]struct{}) (sent bool, err error) {
	for _, k := range slices.SortedFunc(maps.Keys(refs), compareKeys) {
		if !s.knows(k.kind) {
			continue // it does not run the pods that need them
		}
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

// knows says whether the agent has use for objects of a kind. One that has not would end
// its stream for want of it, again and again.
func (s *session) knows(kind string) bool {
	switch kind {
	case kindTrustBundle:
		return s.bundles
	case kindPodCertificate:
		return s.certs
	case kindRuntimeClass, kindDriver, kindAttachment:
		return slices.Contains(s.kinds, kind)
	}
	return true
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

func sortedPods(m map[podKey]int64) []podKey {
	return slices.SortedFunc(maps.Keys(m), func(a, b podKey) int {
		return cmp.Or(strings.Compare(a.namespace, b.namespace), strings.Compare(a.name, b.name), strings.Compare(string(a.uid), string(b.uid)))
	})
}
