package metering

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"google.golang.org/protobuf/encoding/prototext"
	"google.golang.org/protobuf/proto"
	"k8s.io/apimachinery/pkg/types"

	pb "timonel/proto/timonel/v1"
)

func TestBetween(t *testing.T) {
	t.Parallel()
	at := time.Unix(1_700_000_000, 0)
	first := Sample{At: at, CPU: 100 * time.Second, Memory: 1, Containers: map[string]Container{
		"a": {"p1", "app", 10 * time.Second, 5},
		"s": {"p1", "side", 0, 6},
		"b": {"p2", "app", time.Second, 7},
		"c": {"p3", "app", 9 * time.Second, 8},
		"x": {"p4", "gone", time.Second, 8},
	}}
	second := Sample{At: at.Add(10 * time.Second), CPU: 115 * time.Second, Memory: 2, Containers: map[string]Container{
		"a": {"p1", "app", 15 * time.Second, 50},
		"s": {"p1", "side", time.Millisecond, 60},
		"b": {"p2", "app", 2 * time.Second, 70},
		"n": {"p2", "new", time.Second, 70},
		"c": {"p3", "app", time.Second, 80}, // another cgroup of that name
	}}
	for range 50 { // maps are in any order
		u := Between(first, second)
		require.EqualValues(t, 10*time.Second, u.Window)
		require.EqualValues(t, 1_500_000_000, u.Cpu)
		require.EqualValues(t, 2, u.Memory)
		var pods []string
		for _, p := range u.Pods {
			for _, c := range p.Containers {
				pods = append(pods, fmt.Sprintf("%s/%s cpu=%d memory=%d", p.Uid, c.Name, c.Cpu, c.Memory))
			}
		}
		require.Equal(t, []string{"p1/app cpu=500000000 memory=50", "p1/side cpu=100000 memory=60"}, pods,
			"a pod of which a container is new, or was counted anew, is left out: %s", prototext.Format(u))
	}
	require.Nil(t, Between(Sample{}, second), "there is one sample")
	require.Nil(t, Between(second, second), "there was no time in between")
	require.Nil(t, Between(Sample{At: at, CPU: time.Hour}, second), "the machine was started anew")
}

func TestEncodeIsBounded(t *testing.T) {
	t.Parallel()
	last, now := Sample{At: time.Unix(1, 0), Containers: map[string]Container{}}, Sample{At: time.Unix(2, 0), Containers: map[string]Container{}}
	for i := range 2000 {
		id := fmt.Sprintf("%05d", i)
		c := Container{Pod: types.UID("7d1b1c2e-0000-4000-8000-0000000" + id), Name: strings.Repeat("n", 63), Memory: 1 << 40}
		last.Containers[id], now.Containers[id] = c, c
	}
	raw, left, err := Encode(Between(last, now))
	require.NoError(t, err)
	require.LessOrEqual(t, len(raw), pb.MaxUsage)
	require.Greater(t, len(raw), pb.MaxUsage*9/10, "no more is left out than has to be")
	u := &pb.Usage{}
	require.NoError(t, proto.Unmarshal(raw, u))
	require.Equal(t, 2000, len(u.Pods)+left)
	_, left, err = Encode(Between(last, Sample{At: now.At, Containers: map[string]Container{}}))
	require.NoError(t, err)
	require.Zero(t, left)
}
