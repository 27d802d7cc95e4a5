package dns

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/miekg/dns"
	"github.com/stretchr/testify/require"
	discoveryv1 "k8s.io/api/discovery/v1"

	"timonel/network/feed"
)

const (
	none    = "NXDOMAIN"
	nothing = "NOERROR" // and no record: NODATA
)

// TestSpecification asks for all that Kubernetes' DNS specification knows, and for
// what is not there.
func TestSpecification(t *testing.T) {
	t.Parallel()
	_, addr := server(t, cluster(), nil)
	own, _, _ := strings.Cut(addr, ":")
	for _, tc := range []struct {
		name, kind string
		want       string // sorted records, without owner when it is the name asked for; or an rcode
		extra      string
	}{
		{"dns-version.cluster.local.", "TXT", `28800 IN TXT "1.1.0"`, ""},
		{"dns-version.cluster.local.", "A", nothing, ""},
		{"x.dns-version.cluster.local.", "TXT", none, ""},
		{"cluster.local.", "A", nothing, ""},
		{"cluster.local.", "NS", "5 IN NS ns.dns.cluster.local.", "ns.dns.cluster.local. 5 IN A " + own},
		{"cluster.local.", "SOA", "5 IN SOA ns.dns.cluster.local. hostmaster.cluster.local. SERIAL 7200 1800 86400 5", ""},
		{"ns.dns.cluster.local.", "A", "5 IN A " + own, ""},
		{"ns.dns.cluster.local.", "AAAA", nothing, ""},
		{"dns.cluster.local.", "A", nothing, ""},
		{"x.dns.cluster.local.", "A", none, ""},
		{"foo.cluster.local.", "A", none, ""},
		{"foo.cluster.local.", "NS", none, ""},

		// 2.3: Services with an address.
		{"kubernetes.default.svc.cluster.local.", "A", "5 IN A 10.96.0.1", ""},
		{"svc1.testns.svc.cluster.local.", "A", "5 IN A 10.0.0.1", ""},
		{"svc1.testns.svc.cluster.local.", "AAAA", nothing, ""},
		{"svc1.testns.svc.cluster.local.", "TXT", nothing, ""},
		{"svc1.testns.svc.cluster.local.", "SOA", nothing, ""},
		{"svc1.testns.svc.cluster.local.", "CNAME", nothing, ""},
		{"svc1.testns.svc.cluster.local.", "ANY", nothing, ""},
		{"dual.testns.svc.cluster.local.", "A", "5 IN A 10.0.0.3", ""},
		{"dual.testns.svc.cluster.local.", "AAAA", "5 IN AAAA fd00::3", ""},
		{"svc0.testns.svc.cluster.local.", "A", none, ""},
		{"svc0.testns.svc.cluster.local.", "TXT", none, ""},
		{"svc1.other.svc.cluster.local.", "A", none, ""},
		{"svc1.testns.cluster.local.", "A", none, ""},
		{"svc.cluster.local.", "A", nothing, ""},
		{"testns.svc.cluster.local.", "A", nothing, ""},
		{"testns.svc.cluster.local.", "NS", nothing, ""},
		{"other.svc.cluster.local.", "A", none, ""},
		{"_http._tcp.svc1.testns.svc.cluster.local.", "SRV", "5 IN SRV 0 100 80 svc1.testns.svc.cluster.local.", "svc1.testns.svc.cluster.local. 5 IN A 10.0.0.1"},
		{"_HTTP._TCP.svc1.testns.svc.cluster.local.", "SRV", "5 IN SRV 0 100 80 svc1.testns.svc.cluster.local.", "svc1.testns.svc.cluster.local. 5 IN A 10.0.0.1"},
		{"_http._tcp.svc1.testns.svc.cluster.local.", "A", nothing, ""},
		{"_http._udp.svc1.testns.svc.cluster.local.", "SRV", none, ""},
		{"_tcp.svc1.testns.svc.cluster.local.", "SRV", nothing, ""},
		{"_udp.svc1.testns.svc.cluster.local.", "SRV", none, ""},
		{"_udp.dual.testns.svc.cluster.local.", "SRV", nothing, ""},
		{"http.tcp.svc1.testns.svc.cluster.local.", "SRV", none, ""},
		{"_._tcp.dual.testns.svc.cluster.local.", "SRV", none, ""},
		{"x._http._tcp.svc1.testns.svc.cluster.local.", "SRV", none, ""},
		{"_dns._udp.dual.testns.svc.cluster.local.", "SRV", "5 IN SRV 0 100 53 dual.testns.svc.cluster.local.",
			"dual.testns.svc.cluster.local. 5 IN A 10.0.0.3\ndual.testns.svc.cluster.local. 5 IN AAAA fd00::3"},
		{"svc1.testns.svc.cluster.local.", "SRV", "5 IN SRV 0 100 80 svc1.testns.svc.cluster.local.", "svc1.testns.svc.cluster.local. 5 IN A 10.0.0.1"},
		{"172-0-0-1.svc1.testns.svc.cluster.local.", "A", "5 IN A 172.0.0.1", ""},

		// 2.4: headless Services.
		{"hdls.testns.svc.cluster.local.", "A", "5 IN A 172.0.0.2\n5 IN A 172.0.0.3\n5 IN A 172.0.0.4\n5 IN A 172.0.0.5\n5 IN A 172.0.0.7", ""},
		{"hdls.testns.svc.cluster.local.", "AAAA", "5 IN AAAA 5678:abcd::1", ""},
		{"hdls.testns.svc.cluster.local.", "TXT", nothing, ""},
		{"empty.testns.svc.cluster.local.", "A", none, ""},
		{"early.testns.svc.cluster.local.", "A", "5 IN A 172.0.0.20", ""},
		{"pet-0.early.testns.svc.cluster.local.", "A", "5 IN A 172.0.0.20", ""},
		{"early.testns.svc.cluster.local.", "AAAA", nothing, ""},
		{"early.testns.svc.cluster.local.", "SRV", nothing, ""},
		{"pet-0.hdls.testns.svc.cluster.local.", "A", "5 IN A 172.0.0.3", ""},
		{"PET-0.HDLS.testns.svc.cluster.local.", "A", "5 IN A 172.0.0.3", ""},
		{"pet-0.hdls.testns.svc.cluster.local.", "AAAA", nothing, ""},
		{"172-0-0-3.hdls.testns.svc.cluster.local.", "A", none, ""},
		{"172-0-0-2.hdls.testns.svc.cluster.local.", "A", "5 IN A 172.0.0.2", ""},
		{"5678-abcd--1.hdls.testns.svc.cluster.local.", "AAAA", "5 IN AAAA 5678:abcd::1", ""},
		{"dup.hdls.testns.svc.cluster.local.", "A", "5 IN A 172.0.0.4\n5 IN A 172.0.0.5", ""},
		{"late.hdls.testns.svc.cluster.local.", "A", none, ""},
		{"pet-1.hdls.testns.svc.cluster.local.", "A", none, ""},
		{"pet-0.svc0.testns.svc.cluster.local.", "A", none, ""},
		{"pet-0.hdls.testns.svc.cluster.local.", "SRV", "5 IN SRV 0 100 80 pet-0.hdls.testns.svc.cluster.local.", "pet-0.hdls.testns.svc.cluster.local. 5 IN A 172.0.0.3"},
		{"_metrics._tcp.hdls.testns.svc.cluster.local.", "SRV", "5 IN SRV 0 100 9100 172-0-0-2.hdls.testns.svc.cluster.local.", "172-0-0-2.hdls.testns.svc.cluster.local. 5 IN A 172.0.0.2"},
		{"_http._tcp.hdls.testns.svc.cluster.local.", "SRV",
			"5 IN SRV 0 20 80 172-0-0-2.hdls.testns.svc.cluster.local.\n5 IN SRV 0 20 80 172-0-0-7.hdls.testns.svc.cluster.local.\n" +
				"5 IN SRV 0 20 80 5678-abcd--1.hdls.testns.svc.cluster.local.\n5 IN SRV 0 20 80 dup.hdls.testns.svc.cluster.local.\n5 IN SRV 0 20 80 pet-0.hdls.testns.svc.cluster.local.",
			"172-0-0-2.hdls.testns.svc.cluster.local. 5 IN A 172.0.0.2\n172-0-0-7.hdls.testns.svc.cluster.local. 5 IN A 172.0.0.7\n" +
				"5678-abcd--1.hdls.testns.svc.cluster.local. 5 IN AAAA 5678:abcd::1\ndup.hdls.testns.svc.cluster.local. 5 IN A 172.0.0.4\n" +
				"dup.hdls.testns.svc.cluster.local. 5 IN A 172.0.0.5\npet-0.hdls.testns.svc.cluster.local. 5 IN A 172.0.0.3"},
		{"_http._tcp.hdls.testns.svc.cluster.local.", "A", nothing, ""},
		{"_tcp.hdls.testns.svc.cluster.local.", "A", nothing, ""},
		{"_tcp.early.testns.svc.cluster.local.", "A", none, ""},

		// 2.5: external names, without asking anybody.
		{"ext.testns.svc.cluster.local.", "CNAME", "5 IN CNAME www.example.net.", ""},
		{"ext.testns.svc.cluster.local.", "ANY", "5 IN CNAME www.example.net.", ""},
		{"ext-in.testns.svc.cluster.local.", "A", "5 IN CNAME svc1.testns.svc.cluster.local.\nsvc1.testns.svc.cluster.local. 5 IN A 10.0.0.1", ""},
		{"ext-in.testns.svc.cluster.local.", "AAAA", "5 IN CNAME svc1.testns.svc.cluster.local.", ""},
		{"ext-none.testns.svc.cluster.local.", "A", none + "\n5 IN CNAME none.testns.svc.cluster.local.", ""},
		{"ext-loop.testns.svc.cluster.local.", "A", "SERVFAIL", ""},
		{"ext-ip.testns.svc.cluster.local.", "A", none, ""},
		{"x.ext.testns.svc.cluster.local.", "CNAME", none, ""},
		{"_http._tcp.ext.testns.svc.cluster.local.", "SRV", none, ""},

		// Pods, as CoreDNS' "pods insecure".
		{"10-244-1-3.testns.pod.cluster.local.", "A", "5 IN A 10.244.1.3", ""},
		{"10-244-1-3.testns.pod.cluster.local.", "AAAA", nothing, ""},
		{"fd00--1-3.testns.pod.cluster.local.", "AAAA", "5 IN AAAA fd00::1:3", ""},
		{"10-244-1-333.testns.pod.cluster.local.", "A", none, ""},
		{"web-0.testns.pod.cluster.local.", "A", none, ""},
		{"x.10-244-1-3.testns.pod.cluster.local.", "A", none, ""},
		{"testns.pod.cluster.local.", "A", nothing, ""},
		{"pod.cluster.local.", "A", nothing, ""},

		// Addresses.
		{"1.0.96.10.in-addr.arpa.", "PTR", "5 IN PTR kubernetes.default.svc.cluster.local.", ""},
		{"1.0.96.10.in-addr.arpa.", "A", nothing, ""},
		{"3.0.0.10.IN-ADDR.arpa.", "PTR", "5 IN PTR dual.testns.svc.cluster.local.", ""},
		{"3.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.d.f.ip6.arpa.", "PTR", "5 IN PTR dual.testns.svc.cluster.local.", ""},
		{"3.0.0.172.in-addr.arpa.", "PTR", "5 IN PTR pet-0.hdls.testns.svc.cluster.local.", ""},
		{"1.0.0.172.in-addr.arpa.", "PTR", "5 IN PTR 172-0-0-1.svc1.testns.svc.cluster.local.", ""},
		{"6.0.0.172.in-addr.arpa.", "PTR", "SERVFAIL", ""}, // not ours, and nobody to ask
		{"01.0.0.172.in-addr.arpa.", "PTR", "SERVFAIL", ""},
	} {
		t.Run(tc.kind+" "+tc.name, func(t *testing.T) {
			for _, network := range []string{"udp", "tcp"} {
				m := ask(tc.name, dns.StringToType[tc.kind])
				m.SetEdns0(4096, false)
				r := exchange(t, network, addr, m)
				require.Equal(t, tc.name, r.Question[0].Name, "the letters are as asked")
				var got []string
				for _, l := range lines(r.Answer) {
					got = append(got, strings.TrimPrefix(l, tc.name+" "))
				}
				if len(got) > 0 && strings.Contains(got[0], " SOA ") {
					f := strings.Fields(got[0])
					f[5] = "SERIAL"
					got[0] = strings.Join(f, " ")
				}
				if !strings.Contains(tc.want, "CNAME") {
					slices.Sort(got)
				}
				rcode := dns.RcodeToString[r.Rcode]
				if r.Rcode != dns.RcodeSuccess || len(got) == 0 {
					got = slices.Insert(got, 0, rcode)
				}
				require.Equal(t, tc.want, strings.Join(got, "\n"))
				require.True(t, r.RecursionAvailable)
				require.False(t, r.Truncated)
				require.Equal(t, rcode != "SERVFAIL", r.Authoritative)
				negative := rcode != "SERVFAIL" && !slices.ContainsFunc(r.Answer, func(rr dns.RR) bool {
					return rr.Header().Rrtype == dns.StringToType[tc.kind] || tc.kind == "ANY"
				})
				soa := 0
				for _, rr := range r.Ns {
					require.Equal(t, dns.TypeSOA, rr.Header().Rrtype)
					soa++
				}
				require.Equal(t, negative, soa == 1, "an SOA is in negative answers alone")
				var extra []string
				for _, l := range lines(r.Extra) {
					if !strings.Contains(l, "OPT") {
						extra = append(extra, l)
					}
				}
				slices.Sort(extra)
				require.Equal(t, tc.extra, strings.Join(extra, "\n"))
			}
		})
	}
}

// TestBeforeTheFirstList: what nobody knows yet is no name that does not exist.
func TestBeforeTheFirstList(t *testing.T) {
	t.Parallel()
	store := feed.NewStore("a1")
	s, addr := server(t, store, nil)
	rcode := func(name string, kind uint16) int { return exchange(t, "udp", addr, ask(name, kind)).Rcode }
	require.Equal(t, dns.RcodeServerFailure, rcode("svc1.testns.svc.cluster.local.", dns.TypeA))
	require.Equal(t, dns.RcodeServerFailure, rcode("testns.svc.cluster.local.", dns.TypeA))
	require.Equal(t, dns.RcodeServerFailure, rcode("1.0.96.10.in-addr.arpa.", dns.TypePTR))
	require.Equal(t, dns.RcodeSuccess, rcode("10-0-0-1.testns.pod.cluster.local.", dns.TypeA))
	require.Equal(t, dns.RcodeNameError, rcode("www.cluster.local.", dns.TypeA))
	store.Update(func(t *feed.Txn) { t.SetService(service("testns", "svc1", []string{"10.0.0.1"})) })
	seen := func() bool { return s.zone.view.Load() == store.View() }
	require.Eventually(t, seen, 30*time.Second, time.Millisecond)
	require.Equal(t, dns.RcodeSuccess, rcode("svc1.testns.svc.cluster.local.", dns.TypeA), "what came is there")
	require.Equal(t, dns.RcodeServerFailure, rcode("svc2.testns.svc.cluster.local.", dns.TypeA))
	store.Update(func(t *feed.Txn) { t.SetSynced() })
	require.Eventually(t, seen, 30*time.Second, time.Millisecond)
	require.Equal(t, dns.RcodeNameError, rcode("svc2.testns.svc.cluster.local.", dns.TypeA))
}

// TestTheZoneIsAFold: after any changes, whose an address is is as if it were built anew.
func TestTheZoneIsAFold(t *testing.T) {
	t.Parallel()
	for seed := range uint64(20) {
		r := rand.New(rand.NewPCG(seed, 1))
		store := feed.NewStore("a1")
		z := newZone("cluster.local", nil)
		for range 200 {
			store.Update(func(t *feed.Txn) {
				for range 1 + r.IntN(3) {
					n := feed.Name{Namespace: "n", Name: fmt.Sprintf("s%d", r.IntN(5))}
					ip := fmt.Sprintf("10.0.0.%d", r.IntN(6))
					switch r.IntN(6) {
					case 0:
						t.RemoveService(n)
					case 1:
						t.SetService(service(n.Namespace, n.Name, []string{ip}))
					case 2:
						t.SetService(service(n.Namespace, n.Name, []string{"None"}))
					case 3:
						t.RemoveSlice(feed.Name{Namespace: "n", Name: "e" + ip})
					default:
						ends := []discoveryv1.Endpoint{ready("", ip, fmt.Sprintf("10.0.0.%d", r.IntN(6))), notReady("x", "10.0.0.9")}
						t.SetSlice(slice("n", "e"+ip, n.Name, discoveryv1.AddressTypeIPv4, nil, ends...))
					}
				}
			})
			if r.IntN(3) == 0 {
				continue // several changes at once
			}
			if store.View().Revision() == z.view.Load().Revision() {
				continue // Changes would wait
			}
			c, err := store.Changes(t.Context(), z.view.Load().Revision())
			require.NoError(t, err)
			z.apply(c, time.Now())
			fresh := newZone("cluster.local", nil)
			fresh.apply(feed.Changes{View: store.View(), Reset: true}, time.Now())
			require.Len(t, z.owners, len(fresh.owners))
			for i := range 10 {
				ip := netip.AddrFrom4([4]byte{10, 0, 0, byte(i)})
				require.ElementsMatch(t, fresh.pointers(store.View(), ip), z.pointers(store.View(), ip), "seed %d, %s", seed, ip)
			}
		}
	}
}

// TestAnswersTakeTurns: each address is the first as often.
func TestAnswersTakeTurns(t *testing.T) {
	t.Parallel()
	_, addr := server(t, cluster(), nil)
	first := map[string]int{}
	for range 50 {
		r := exchange(t, "udp", addr, ask("hdls.testns.svc.cluster.local.", dns.TypeA))
		first[r.Answer[0].(*dns.A).A.String()]++
	}
	require.Len(t, first, 5)
}
