package dispatch

import (
	"testing"

	"github.com/stretchr/testify/require"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	pb "timonel/proto/timonel/v1"
)

// A controller that is out of touch ends the streams of its agents and takes none, so
// that they go where somebody hears of them.
func TestOutOfTouchStreamsEnd(t *testing.T) {
	t.Parallel()
	c := newCluster(t, "c1", "c2")
	raw, err := nodeObject("n1").Marshal()
	require.NoError(t, err)
	a := c.connect("c1", &pb.Hello{NodeName: "n1", Node: raw})
	a.batch()
	c.controllers["c1"].cutOff()
	require.Equal(t, codes.Unavailable, status.Code(a.end()))
	require.Equal(t, codes.Unavailable, status.Code(c.connect("c1", &pb.Hello{NodeName: "n1", Node: raw}).end()))
	c.connect("c2", &pb.Hello{NodeName: "n1", Node: raw}).batch()
}
