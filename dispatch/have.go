package dispatch

import (
	"bytes"
	"crypto/sha256"
	"fmt"
	"slices"

	"google.golang.org/protobuf/proto"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"

	pb "timonel/proto/timonel/v1"
	"timonel/state/objects"
)

// usable says whether an agent's list of what it has is there and within bounds.
// If it is not, the agent gets a full list.
func usable(have *pb.Have) bool {
	return have != nil && len(have.GetPods()) <= pb.MaxHavePods && proto.Size(have) <= pb.MaxHave
}

// compare fills in what the agent has, by its own word: what of it is as it is
// here, and what is not, at revision 0, so that sync replaces or removes it.
//
// The list is the truth about the agent and this replica's state about the
// cluster: what happened in between, and whether this replica saw it, does not
// matter. An object counts as the same only if its content is, too: revisions
// alone could be those of a state that was lost.
//
// A list names whatever its sender likes. Only what this node should have is
// looked up for it, so that it neither learns of others' objects nor makes this
// controller encode them.
func (s *session) compare(snapshot *objects.Snapshot, have *pb.Have) error {
	pods, refs := make(map[podKey]*corev1.Pod), make(map[objKey]struct{})
	bound := slices.Collect(snapshot.PodsOnNode(s.node))
	for _, pod := range bound {
		pods[keyOfPod(pod)] = pod
	}
	wanted(s.node, bound, snapshot, func(k objKey) { refs[k] = struct{}{} })
	for _, p := range have.GetPods() {
		k := podKey{p.GetNamespace(), p.GetName(), types.UID(p.GetUid())}
		s.pods[k] = 0
		pod := pods[k]
		if pod == nil || objects.Revision(pod) != p.GetRevision() {
			continue
		}
		same, err := encodesTo(pod, p.GetDigest())
		if err != nil {
			return fmt.Errorf("encode pod %s/%s: %w", k.namespace, k.name, err)
		}
		if same {
			s.pods[k] = p.GetRevision()
		}
	}
	for _, o := range have.GetObjects() {
		k := objKey{o.GetKind(), o.GetNamespace(), o.GetName()}
		s.objects[k] = 0
		if _, ok := refs[k]; !ok {
			continue
		}
		live, revision := lookup(snapshot, k)
		if live == nil || revision != o.GetRevision() || string(live.GetUID()) != o.GetUid() {
			continue
		}
		same, err := encodesTo(live, o.GetDigest())
		if err != nil {
			return fmt.Errorf("encode %s %s/%s: %w", k.kind, k.namespace, k.name, err)
		}
		if same {
			s.objects[k] = revision
		}
	}
	return nil
}

func encodesTo(o marshaler, digest []byte) (bool, error) {
	body, err := o.Marshal()
	if err != nil {
		return false, err
	}
	sum := sha256.Sum256(body)
	return bytes.Equal(sum[:16], digest), nil
}

func keyOfPod(pod *corev1.Pod) podKey { return podKey{pod.Namespace, pod.Name, pod.UID} }
