package metering

import (
	"maps"
	"slices"
	"strings"
	"time"

	"google.golang.org/protobuf/proto"
	"k8s.io/apimachinery/pkg/types"

	pb "timonel/proto/timonel/v1"
)

// Sample is what was counted at one time.
type Sample struct {
	At time.Time
	// CPU is how long the node's CPUs have worked, Memory its working set in bytes.
	CPU    time.Duration
	Memory uint64
	// Containers are those that run, by id.
	Containers map[string]Container
}

// Container is one that runs.
type Container struct {
	Pod    types.UID
	Name   string
	CPU    time.Duration
	Memory uint64
}

// Between is what the node took from one sample to a later one; nil when there was no
// time in between. A pod is in it once all of its containers that run are in both: half a
// pod would make an autoscaler believe that the pod idles.
func Between(last, now Sample) *pb.Usage {
	window := now.At.Sub(last.At)
	if last.At.IsZero() || window <= 0 || now.CPU < last.CPU {
		return nil
	}
	u := &pb.Usage{Window: int64(window), Cpu: rate(now.CPU-last.CPU, window), Memory: now.Memory}
	pods := map[types.UID]*pb.PodUsage{}
	for id, c := range now.Containers {
		before, ok := last.Containers[id]
		if !ok || c.CPU < before.CPU {
			pods[c.Pod] = nil
			continue
		}
		p, known := pods[c.Pod]
		if known && p == nil {
			continue
		}
		if !known {
			p = &pb.PodUsage{Uid: string(c.Pod)}
			pods[c.Pod] = p
		}
		p.Containers = append(p.Containers, &pb.ContainerUsage{Name: c.Name, Cpu: rate(c.CPU-before.CPU, window), Memory: c.Memory})
	}
	for _, uid := range slices.Sorted(maps.Keys(pods)) {
		if p := pods[uid]; p != nil {
			slices.SortFunc(p.Containers, func(a, b *pb.ContainerUsage) int { return strings.Compare(a.Name, b.Name) })
			u.Pods = append(u.Pods, p)
		}
	}
	return u
}

// rate is in billionths of a CPU.
func rate(cpu, window time.Duration) uint64 { return uint64(float64(cpu) / float64(window) * 1e9) }

// Encode is u as it is sent, without the last pods if it would be longer than what
// controllers take. It says how many were left out.
func Encode(u *pb.Usage) (raw []byte, left int, err error) {
	all := len(u.Pods)
	for proto.Size(u) > pb.MaxUsage && len(u.Pods) > 0 {
		u.Pods = u.Pods[:len(u.Pods)-1-len(u.Pods)/16]
	}
	raw, err = proto.Marshal(u)
	return raw, all - len(u.Pods), err
}
