package feed

import (
	"testing"

	"github.com/stretchr/testify/require"

	"timonel/network/feed/wire"
	pb "timonel/proto/timonel/v1"
)

// said is a stream that remembers what the agent says.
type said struct {
	networkStream
	sent []*pb.NetworkRequest
}

func (s *said) Send(m *pb.NetworkRequest) error {
	s.sent = append(s.sent, m)
	return nil
}

// A controller that sends rubbish changes nothing of what is known, and is asked for what
// differs, less and less often.
func TestAPeerThatSendsRubbish(t *testing.T) {
	t.Parallel()
	c := NewClient(Config{Store: NewStore("a1"), Logger: quiet})
	web, err := service("default", "web", "10.96.0.1").Marshal()
	require.NoError(t, err)
	nameless, err := service("default", "", "10.96.0.2").Marshal()
	require.NoError(t, err)
	odd, err := service("default", "../web", "10.96.0.2").Marshal()
	require.NoError(t, err)
	const kind = pb.NetworkKind_NETWORK_KIND_SERVICE
	stream := &said{}
	s := &following{c: c, stream: stream, wait: firstAsk}
	defer s.stop()
	all := wire.All()
	require.NoError(t, s.take(&pb.NetworkBatch{Epoch: "cluster", Sequence: 1, List: all[:], Synced: true, Ack: true, Set: []*pb.NetworkItem{{Kind: kind, Object: web}}}))
	require.Len(t, stream.sent, 1)
	require.EqualValues(t, 1, stream.sent[0].GetTaken().GetSequence())
	before := c.cfg.Store.View()

	for i, item := range []*pb.NetworkItem{
		nil, {}, {Kind: kind}, {Kind: kind, Object: []byte("rubbish")}, {Kind: kind, Object: nameless}, {Kind: kind, Object: odd}, {Kind: 99, Object: web}, {Kind: -1, Object: web},
	} {
		wait := s.wait
		s.timer = nil
		require.NoError(t, s.take(&pb.NetworkBatch{Set: []*pb.NetworkItem{item}, Remove: []*pb.NetworkKey{nil, {Kind: 99, Name: "web"}}, Digest: []byte("other")}))
		require.Same(t, before, c.cfg.Store.View(), "item %d", i)
		require.NotNil(t, s.timer, "nothing will be asked")
		require.True(t, s.wait > wait || s.wait == lastAsk)
	}
	require.ErrorContains(t, s.take(&pb.NetworkBatch{List: []byte("short")}), "want 32")
	require.Same(t, before, c.cfg.Store.View())

	whole := c.digest.Whole()
	require.NoError(t, s.take(&pb.NetworkBatch{Digest: whole[:]}))
	require.Nil(t, s.timer, "all is well")
	require.Equal(t, firstAsk, s.wait)
	require.NoError(t, s.take(&pb.NetworkBatch{Ask: true}))
	require.Equal(t, "cluster", stream.sent[len(stream.sent)-1].GetHave().GetEpoch())
}
