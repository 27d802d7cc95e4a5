package desired

import (
	"crypto/sha256"
	"strconv"

	"google.golang.org/protobuf/proto"

	pb "timonel/proto/timonel/v1"
)

// digest tells contents apart that have the same revision, of which one was lost.
type digest [16]byte

func digestOf(raw []byte) (d digest) {
	sum := sha256.Sum256(raw)
	copy(d[:], sum[:])
	return d
}

// Have returns all that this store has, for a controller to compare with what the
// node should have. It is nil until a full list was received since the store was
// opened, since what is on a disk may be damaged in ways that nobody sees, and when
// it would be longer than [pb.MaxHave] or [pb.MaxHavePods]: a full list follows.
func (s *Store) Have() *pb.Have {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.whole || len(s.pods) > pb.MaxHavePods {
		return nil
	}
	have := &pb.Have{Revision: s.pos.Revision}
	for uid, pod := range s.pods {
		d := s.digests[podKey(uid)]
		have.Pods = append(have.Pods, &pb.HavePod{
			Namespace: pod.Namespace, Name: pod.Name, Uid: string(uid), Revision: revisionOf(pod), Digest: d[:],
		})
	}
	for k, obj := range s.objects {
		d := s.digests[k]
		have.Objects = append(have.Objects, &pb.HaveObject{
			Kind: k.kind(), Namespace: obj.GetNamespace(), Name: obj.GetName(), Uid: string(obj.GetUID()),
			Revision: revisionOf(obj), Digest: d[:],
		})
	}
	if proto.Size(have) > pb.MaxHave {
		return nil
	}
	return have
}

func revisionOf(o object) int64 {
	n, _ := strconv.ParseInt(o.GetResourceVersion(), 10, 64) // what cannot be read is not the same as anything
	return n
}
