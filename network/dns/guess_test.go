package dns

import (
	"net"
	"net/netip"
	"testing"

	"github.com/miekg/dns"
	"github.com/stretchr/testify/require"
)

// TestWhoGuessesHasFewTries: somebody has found the port of a question and sends answers
// with one id after the other, the right one at last. It is not believed.
func TestWhoGuessesHasFewTries(t *testing.T) {
	t.Parallel()
	says := func(q *dns.Msg, id uint16, address string) []byte {
		m := new(dns.Msg).SetReply(q)
		m.Id = id
		rr, err := dns.NewRR("bank.example. 300 IN A " + address)
		require.NoError(t, err)
		m.Answer = []dns.RR{rr}
		raw, err := m.Pack()
		require.NoError(t, err)
		return raw
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	truth := &dns.Server{Listener: l, Handler: dns.HandlerFunc(func(w dns.ResponseWriter, q *dns.Msg) {
		_, _ = w.Write(says(q, q.Id, "192.0.2.1"))
	})}
	ended := make(chan error, 1)
	go func() { ended <- truth.ActivateAndServe() }()
	addr := netip.MustParseAddrPort(l.Addr().String())
	guesser, err := net.ListenUDP("udp", net.UDPAddrFromAddrPort(addr))
	require.NoError(t, err)
	gone := make(chan struct{})
	go func() {
		defer close(gone)
		raw := make([]byte, maxUDP)
		n, from, err := guesser.ReadFromUDPAddrPort(raw)
		q := new(dns.Msg)
		if err != nil || q.Unpack(raw[:n]) != nil {
			return
		}
		for i := range uint16(100) {
			_, _ = guesser.WriteToUDPAddrPort(says(q, q.Id+100-i, "203.0.113.66"), from)
		}
		_, _ = guesser.WriteToUDPAddrPort(says(q, q.Id, "203.0.113.66"), from)
	}()
	reply, err := (&upstream{addr: addr}).ask(t.Context(), dns.Question{Name: "bank.example.", Qtype: dns.TypeA, Qclass: dns.ClassINET}, false, false)
	guesser.Close()
	<-gone
	require.NoError(t, err)
	require.Len(t, reply.Answer, 1)
	require.Contains(t, reply.Answer[0].String(), "192.0.2.1")
	l.Close()
	<-ended
}
