package policy

import (
	"fmt"
	"net"
	"net/netip"
	"strconv"
)

const (
	mapPorts    = "ports"
	mapIsolated = "isolated"
)

// guard makes the table that holds pods to their addresses: what comes from a device of a
// pod has the pod's own. To pods for which a policy holds (strict), nothing comes from the
// bridge but what is addressed to them: who floods or multicasts is not asked for elsewhere.
// Pods that the kernel refuses (closed) send nothing.
func guard(pods map[string]Pod, strict map[string]bool, closed map[string]error) *ruleset {
	out := newRuleset()
	out.maps[mapPorts] = verdicts{typ: "ifname", leads: map[string]string{}}
	out.maps[mapIsolated] = verdicts{typ: "ifname", leads: map[string]string{}}
	out.hooks["from-pods"] = hookOf{"filter", "prerouting", "-310"}
	out.hooks["to-pods"] = hookOf{"filter", "forward", "0"}
	out.chains["from-pods"] = []string{"iifname vmap @" + mapPorts}
	out.chains["to-pods"] = []string{"oifname vmap @" + mapIsolated}
	for uid, pod := range pods {
		if pod.Device == "" {
			continue
		}
		id := hashOf(uid)
		from, to := "from-"+id, "to-"+id
		out.lead(mapPorts, strconv.Quote(pod.Device), "goto "+from)
		if closed[uid] != nil {
			out.chains[from] = []string{closedRule}
			continue
		}
		own := own(pod)
		out.chains[from] = fromPod(pod, own)
		if strict[uid] {
			out.lead(mapIsolated, strconv.Quote(pod.Device), "goto "+to)
			out.chains[to] = toPod(own)
		}
	}
	return out
}

// own are the pod's addresses by family, with that of its link.
func own(pod Pod) map[string][]netip.Addr {
	out := map[string][]netip.Addr{}
	for _, f := range families {
		for _, ip := range pod.Addresses {
			if f.is(ip) {
				out[f.ip] = append(out[f.ip], ip)
			}
		}
	}
	if len(pod.MAC) == 6 {
		out["ip6"] = append(out["ip6"], linkLocal(pod.MAC))
	}
	return out
}

// linkLocal is the address that the kernel makes of a hardware address.
func linkLocal(mac net.HardwareAddr) netip.Addr {
	return netip.AddrFrom16([16]byte{0: 0xfe, 1: 0x80, 8: mac[0] ^ 2, 9: mac[1], 10: mac[2], 11: 0xff, 12: 0xfe, 13: mac[3], 14: mac[4], 15: mac[5]})
}

func fromPod(pod Pod, own map[string][]netip.Addr) []string {
	rules := []string{"ether type { 0x8100, 0x88a8 } drop"}
	if len(pod.MAC) == 6 {
		rules = append(rules, "ether saddr != "+pod.MAC.String()+" drop", "ether type arp arp saddr ether != "+pod.MAC.String()+" drop")
	}
	unspecified := netip.IPv4Unspecified() // asks whether an address is somebody's
	rules = append(rules, "ether type arp arp saddr ip "+listing(append([]netip.Addr{unspecified}, own["ip"]...))+" accept")
	if len(own["ip"]) > 0 {
		// Where host ports are reached at 127.0.0.1, the kernel would let a pod's packets in too.
		rules = append(rules, "ether type ip ip daddr 127.0.0.0/8 drop")
		rules = append(rules, "ether type ip ip saddr "+listing(own["ip"])+" accept")
	}
	rules = append(rules, "icmpv6 type { nd-router-advert, nd-redirect } drop")
	if list := own["ip6"]; len(list) > 0 {
		var raw []string
		for _, ip := range list {
			b := ip.As16()
			raw = append(raw, fmt.Sprintf("0x%x", b[:]))
		}
		const target = "@th,64,128" // of an advertisement
		rules = append(rules, "icmpv6 type nd-neighbor-advert "+target+" != "+listing(raw)+" drop",
			"ether type ip6 ip6 saddr "+listing(list)+" accept")
	}
	return append(rules,
		"ip6 saddr :: icmpv6 type { nd-neighbor-solicit, nd-router-solicit, mld-listener-report, mld2-listener-report } accept",
		"drop")
}

func toPod(own map[string][]netip.Addr) []string {
	rules := []string{"ether type arp accept", "icmpv6 type { nd-neighbor-solicit, nd-neighbor-advert } accept"}
	for _, f := range families {
		if len(own[f.ip]) > 0 {
			rules = append(rules, fmt.Sprintf("ether type %s %s daddr %s accept", f.ip, f.ip, listing(own[f.ip])))
		}
	}
	return append(rules, "drop")
}
