package service

import "strconv"

// masqueradeMark is the packet's mark, kube-proxy's by default, that says that the
// source becomes this node's. It is taken off with it.
const masqueradeMark = "0x4000"

const markRule = "mark set mark or " + masqueradeMark

// mapsOf are where a frontend's things are.
type mapsOf struct{ dispatch, endpoints, local, refused string }

// maps of endpoints are one for each protocol: nft loses the types of a map that has
// the protocol and the port in one key with a number.
func (f frontend) maps() mapsOf {
	if f.ip.IsValid() {
		return mapsOf{mapServiceIPs, mapEndpoints + "-" + f.protocol, mapLocalEndpoints + "-" + f.protocol, mapNoEndpoints}
	}
	return mapsOf{mapNodePorts, mapNodePortEndpoints + "-" + f.protocol, mapNodePortLocalEndpoints + "-" + f.protocol, mapNoEndpointsNodePorts}
}

// inList is the key of an endpoint in its list.
func (f frontend) inList(number int) string {
	if f.ip.IsValid() {
		return join(strconv.Itoa(number), f.ip.String(), strconv.Itoa(int(f.port)))
	}
	return join(strconv.Itoa(number), strconv.Itoa(int(f.port)))
}

// chainName names a chain that all Services of as many endpoints share.
func (f frontend) chainName(what string, counts ...int) string {
	name := what
	if !f.ip.IsValid() {
		name = "nodeport-" + what
	}
	for i, n := range counts {
		name += []string{"-", "-of-"}[i] + strconv.Itoa(n)
	}
	return name + "-" + f.protocol
}

// pick chooses one of n endpoints. The frontend says which maps to look in.
func pick(family family, f frontend, local bool, n int) chain {
	ip := string(family.nft)
	name, in := f.chainName("to", n), f.maps().endpoints
	if local {
		name, in = f.chainName("to-local", n), f.maps().local
	}
	key := " . " + f.protocol + " dport"
	if f.ip.IsValid() {
		key = " . " + ip + " daddr" + key
	}
	return chain{name, []string{
		"meta l4proto " + f.protocol + " dnat " + ip + " addr . port to numgen random mod " + strconv.Itoa(n) + key + " map @" + in,
	}}
}

// fromOutside chooses one of n endpoints, by chain all, for packets whose endpoint may
// be on another node: the answer must come back this way.
func fromOutside(f frontend, n int, all string) chain {
	return chain{f.chainName("from-outside", n), outsideRules(all)}
}

// fromOutsideLocal chooses one of l endpoints of this node, if there are some, by chain
// local, which see who the client is. Pods, and this node itself, reach all n as if they had
// gone out and come in by a balancer.
func fromOutsideLocal(family family, f frontend, l, n int, all, local string) chain {
	return chain{f.chainName("local", l, n), outsideLocalRules(family, all, local)}
}

func outsideRules(all string) []string {
	return []string{markRule, "goto " + all}
}

func outsideLocalRules(family family, all, local string) []string {
	rules := []string{
		string(family.nft) + " saddr @" + setPods + " goto " + all,
		// The source may be the Service's address, where it is on a link of this node.
		"fib saddr type local " + markRule,
		"fib saddr type local goto " + all,
	}
	if local != "" {
		rules = append(rules, "goto "+local)
	}
	return rules
}
