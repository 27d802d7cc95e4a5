package dns

import (
	"log/slog"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/miekg/dns"
	"github.com/stretchr/testify/require"

	"timonel/network/feed"
)

// FuzzQuery: whatever a pod sends gets an answer that can be read, of no more than it
// takes, to the question it asked.
func FuzzQuery(f *testing.F) {
	for _, name := range []string{"hdls.testns.svc.cluster.local.", "_http._tcp.hdls.testns.svc.cluster.local.", "ext-chain.testns.svc.cluster.local.", "1.0.96.10.in-addr.arpa.", ".", "www.example."} {
		for _, kind := range []uint16{dns.TypeA, dns.TypeSRV, dns.TypePTR, dns.TypeNS, dns.TypeANY} {
			m := ask(name, kind)
			raw, err := m.Pack()
			require.NoError(f, err)
			f.Add(raw, false)
			m.SetEdns0(1232, true)
			raw, err = m.Pack()
			require.NoError(f, err)
			f.Add(raw, true)
		}
	}
	s, err := New(Config{
		Domain: "cluster.local", Addresses: []netip.Addr{netip.MustParseAddr("127.0.0.1")}, Store: cluster(), Logger: slog.New(slog.DiscardHandler),
	})
	require.NoError(f, err)
	s.zone.apply(feed.Changes{View: s.cfg.Store.View(), Reset: true}, time.Now())
	f.Fuzz(func(t *testing.T, raw []byte, tcp bool) {
		q, rcode, ok := parse(raw)
		if !ok {
			return
		}
		limit := q.size
		if tcp {
			limit = maxTCP
		}
		b, pending := s.now(nil, &q, rcode, limit)
		if pending != nil {
			b = s.later(t.Context(), &q, pending, limit) // there is nobody to ask
		}
		require.LessOrEqual(t, len(b), limit)
		r := new(dns.Msg)
		require.NoError(t, r.Unpack(b), "%x", b)
		require.True(t, r.Response)
		require.Equal(t, q.id, r.Id)
		m := new(dns.Msg)
		if err := m.Unpack(raw); err == nil && len(m.Question) == 1 && len(r.Question) == 1 {
			require.True(t, strings.EqualFold(m.Question[0].Name, r.Question[0].Name))
			require.Equal(t, m.Question[0].Qtype, r.Question[0].Qtype)
		}
	})
}

// FuzzUpstream: whatever another server sends, what we send on can be read and is an
// answer to the question.
func FuzzUpstream(f *testing.F) {
	for _, records := range [][]string{
		{"@ 20 IN A 192.0.2.1", "@ 20 IN A 192.0.2.2", "x. 1 IN AAAA ::1"}, {"@ 20 IN CNAME a.example.", "a.example. 1 IN A 192.0.2.1"},
		{"example. 300 IN SOA a. b. 1 2 3 4 10"}, {"@ 0 IN TXT x", "@ 1 IN MX 1 a.", "@ 1 IN SRV 1 2 3 a."},
	} {
		f.Add(says(f, dns.RcodeSuccess, records...)("udp", ask("www.example.", dns.TypeA)), uint16(512))
	}
	q := &query{id: 7, labels: []string{"www", "example"}, question: []byte("\x03wWw\x07eXample\x00\x00\x01\x00\x01"), kind: dns.TypeA, class: dns.ClassINET, edns: true, rd: true}
	f.Fuzz(func(t *testing.T, raw []byte, size uint16) {
		m := ask("www.example.", dns.TypeA)
		if len(raw) >= 2 {
			m.Id = uint16(raw[0])<<8 | uint16(raw[1])
		}
		reply, err := check(m, raw)
		if err != nil {
			return
		}
		now := time.Now()
		e, err := newEntry("k", reply, now)
		if err != nil {
			return
		}
		limit := max(int(size), dns.MinMsgSize)
		for turn, age := range []time.Duration{0, time.Second, time.Hour} {
			b := e.write(nil, q, now.Add(age), limit, uint32(turn))
			require.LessOrEqual(t, len(b), limit)
			r := new(dns.Msg)
			require.NoError(t, r.Unpack(b), "%x", b)
			require.Equal(t, "wWw.eXample.", r.Question[0].Name)
			require.Equal(t, q.id, r.Id)
			require.NotNil(t, r.IsEdns0())
			for _, rr := range r.Answer {
				require.LessOrEqual(t, rr.Header().Ttl, uint32(maxTTL/time.Second))
			}
		}
	})
}
