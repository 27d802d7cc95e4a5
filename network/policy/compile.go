package policy

import (
	"cmp"
	"crypto/sha256"
	"encoding/base32"
	"errors"
	"fmt"
	"net/netip"
	"regexp"
	"slices"
	"strconv"
	"strings"

	corev1 "k8s.io/api/core/v1"

	"timonel/network/feed"
	"timonel/network/tables"
	pb "timonel/proto/timonel/v1"
)

// direction is of a packet, as the pod sees it.
type direction struct {
	name, suffix string
	own, peer    string // which address of a packet is the pod's, and which the other's
}

var (
	ingress    = direction{"ingress", "-in", "daddr", "saddr"}
	egress     = direction{"egress", "-out", "saddr", "daddr"}
	directions = []direction{egress, ingress}
)

func (d direction) rules(p *pb.NetworkPolicyItem) []*pb.NetworkRule {
	if d == ingress {
		return p.GetIngress()
	}
	return p.GetEgress()
}

func (d direction) isolates(p *pb.NetworkPolicyItem) bool {
	if p.GetTier() != pb.NetworkPolicyItem_NAMESPACE {
		return false
	}
	if d == ingress {
		return p.GetIngressIsolated()
	}
	return p.GetEgressIsolated()
}

// family is one of IP.
type family struct {
	ip, digit, addr string
	is              func(netip.Addr) bool
}

var families = []family{
	{"ip", "4", "ipv4_addr", netip.Addr.Is4}, {"ip6", "6", "ipv6_addr", netip.Addr.Is6},
}

const (
	chainGuarded = "guarded"
	chainClosed  = "closed"
	closedRule   = "drop"
	setSelves    = "selves"
	setGuarded   = "guarded"
)

// An input is all that the table of policies is made of.
type input struct {
	view    *feed.View
	pods    map[string]Pod
	bridge  string
	guarded []Guarded
	closed  map[feed.Name]error // policies that the kernel refuses
}

// output is the table without what the groups have in them, and the groups that it names.
type output struct {
	*ruleset
	groups map[string]bool  // in @g
	ported map[string]bool  // in @t
	bad    map[string]error // pods that are closed, by uid
	count  int              // policies that hold for a pod
}

// compile makes the table of policies.
func compile(in input) output {
	out := output{ruleset: newRuleset(), groups: map[string]bool{}, ported: map[string]bool{}, bad: map[string]error{}}
	out.base(in.bridge)
	for _, g := range in.guarded {
		for _, f := range families {
			if f.is(g.At.Addr()) {
				out.add(setGuarded+f.digit, fmt.Sprintf("%s . %s . %d", g.At.Addr(), strings.ToLower(string(g.Protocol)), g.At.Port()))
			}
		}
	}
	held := map[feed.Name]bool{}
	for uid, pod := range in.pods {
		for _, ip := range pod.Addresses {
			for _, f := range families {
				if f.is(ip) {
					out.add(setSelves+f.digit, ip.String()+" . "+ip.String())
				}
			}
		}
		item := in.view.Pod(feed.Name{Namespace: pod.Namespace, Name: pod.Name})
		if item == nil || item.GetUid() != uid {
			continue
		}
		policies, err := out.policies(in, item)
		for _, p := range policies {
			held[feed.Name{Namespace: p.GetNamespace(), Name: p.GetName()}] = true
		}
		if err != nil {
			out.bad[uid] = err
		}
		for _, d := range directions {
			chain := out.profile(d, pod, policies, err, in)
			if chain == "" {
				continue
			}
			for _, ip := range pod.Addresses {
				for _, f := range families {
					if f.is(ip) {
						out.lead(d.name+f.digit, ip.String(), "goto "+chain)
					}
				}
			}
		}
	}
	out.count = len(held)
	return out
}

// base is what is there whatever pods and policies there are.
func (o *output) base(bridge string) {
	for _, f := range families {
		o.sets[setSelves+f.digit] = &set{typ: f.addr + " . " + f.addr, elements: map[string]struct{}{}}
		o.sets[setGuarded+f.digit] = &set{typ: f.addr + " . inet_proto . inet_service", elements: map[string]struct{}{}}
	}
	o.chains[chainClosed] = []string{closedRule}
	for _, f := range families {
		o.chains[chainGuarded] = append(o.chains[chainGuarded],
			fmt.Sprintf("iifname %q %s daddr . meta l4proto . th dport @%s%s reject with icmpx type admin-prohibited", bridge, f.ip, setGuarded, f.digit))
	}
	// A pod asks another node, and a Service there leads it on, with that node's address.
	for _, f := range families {
		o.chains[chainGuarded] = append(o.chains[chainGuarded],
			fmt.Sprintf("ct status dnat %s daddr . meta l4proto . th dport @%s%s reject with icmpx type admin-prohibited", f.ip, setGuarded, f.digit))
	}
	for _, hook := range []string{"input", "forward"} {
		o.hooks["guarded-"+hook] = hookOf{"filter", hook, "-1"}
		o.chains["guarded-"+hook] = []string{"jump " + chainGuarded}
	}
	for i, d := range directions {
		name := d.name
		o.hooks[name] = hookOf{"filter", "forward", strconv.Itoa(10 + i)}
		rules := []string{
			"ct state established,related accept",
			"icmpv6 type { nd-neighbor-solicit, nd-neighbor-advert } ip6 hoplimit 255 accept",
		}
		for _, f := range families {
			o.maps[d.name+f.digit] = verdicts{typ: f.addr, leads: map[string]string{}}
			rules = append(rules, fmt.Sprintf("%s saddr . %s daddr @%s%s accept", f.ip, f.ip, setSelves, f.digit),
				fmt.Sprintf("%s %s vmap @%s%s", f.ip, d.own, d.name, f.digit))
		}
		o.chains[name] = rules
	}
}

// policies are those that hold for a pod, in the order in which they are asked.
func (o *output) policies(in input, item *pb.NetworkPod) ([]*pb.NetworkPolicyItem, error) {
	var out []*pb.NetworkPolicyItem
	var err error
	for _, ref := range item.GetPolicies() {
		name := feed.Name{Namespace: ref.GetNamespace(), Name: ref.GetName()}
		p := in.view.Policy(name.Namespace, name.Name)
		switch why := in.closed[name]; {
		case p == nil:
			err = fmt.Errorf("policy %s is not known here yet", name)
			continue
		case why != nil && !errors.Is(why, errTried):
			err = why
		}
		for _, d := range directions {
			for _, r := range d.rules(p) {
				for _, g := range slices.Concat(r.GetGroups(), r.GetTargets()) {
					if _, ok := in.view.Group(g); !ok {
						err = fmt.Errorf("group %s of policy %s is not known here yet", g, name)
					}
				}
			}
		}
		out = append(out, p)
	}
	slices.SortStableFunc(out, func(a, b *pb.NetworkPolicyItem) int {
		return cmp.Or(cmp.Compare(order(a), order(b)), cmp.Compare(a.GetPriority(), b.GetPriority()),
			cmp.Compare(a.GetNamespace(), b.GetNamespace()), cmp.Compare(a.GetName(), b.GetName()))
	})
	return out, err
}

// order is when a tier is asked.
func order(p *pb.NetworkPolicyItem) int {
	switch p.GetTier() {
	case pb.NetworkPolicyItem_ADMIN:
		return 0
	case pb.NetworkPolicyItem_BASELINE:
		return 2
	}
	return 1
}

// profile makes the chain of all policies that hold for a pod in one direction, and says
// its name; empty: none of them has to do with the direction.
func (o *output) profile(d direction, pod Pod, policies []*pb.NetworkPolicyItem, wrong error, in input) string {
	if wrong != nil {
		return chainClosed
	}
	var tiers [3][]*pb.NetworkPolicyItem
	isolated := false
	id := []string{d.name}
	for _, p := range policies {
		isolated = isolated || d.isolates(p)
		if !d.isolates(p) && (p.GetTier() == pb.NetworkPolicyItem_NAMESPACE || len(d.rules(p)) == 0) {
			continue
		}
		tiers[order(p)] = append(tiers[order(p)], p)
		id = append(id, policyID(p, d, pod))
	}
	if len(id) == 1 {
		return ""
	}
	if isolated {
		tiers[2] = nil
	}
	hash := hashOf(id...)
	first, rest := "pod-"+hash+d.suffix, "rest-"+hash+d.suffix
	if len(tiers[0]) == 0 {
		rest = first
	}
	if _, made := o.chains[first]; made {
		return first
	}
	var rules []string
	for _, p := range tiers[0] { // led away to rest by some of them, so each has its own
		name := "admin-" + hashOf(hash, policyID(p, d, pod)) + d.suffix
		o.policy(name, p, d, pod, "goto "+rest, in)
		rules = append(rules, "jump "+name)
	}
	if rest != first {
		o.chains[first] = append(rules, "goto "+rest)
		rules = nil
	}
	for _, p := range slices.Concat(tiers[1], tiers[2]) {
		name := "policy-" + hashOf(policyID(p, d, pod)) + d.suffix
		if _, made := o.chains[name]; !made {
			o.policy(name, p, d, pod, "accept", in)
		}
		rules = append(rules, "jump "+name)
	}
	o.chains[rest] = append(rules, map[bool]string{true: "drop", false: "accept"}[isolated])
	return first
}

// policyID is what the rules of a policy for a pod are a function of, but for the policy's
// own text: pods with other numbers for ports that a rule names have others.
func policyID(p *pb.NetworkPolicyItem, d direction, pod Pod) string {
	id := []string{p.GetNamespace(), p.GetName(), d.name}
	if d == ingress {
		for _, r := range p.GetIngress() {
			for _, port := range r.GetPorts() {
				if port.GetName() != "" {
					id = append(id, fmt.Sprint(port.GetProtocol(), "/", port.GetName(), namedPorts(pod, port)))
				}
			}
		}
	}
	return strings.Join(id, "\x00")
}

// namedPorts are the numbers of a pod's ports that a rule names.
func namedPorts(pod Pod, port *pb.NetworkPort) []uint32 {
	var out []uint32
	for _, c := range pod.Ports {
		if c.Name == port.GetName() && string(cmp.Or(c.Protocol, corev1.ProtocolTCP)) == cmp.Or(port.GetProtocol(), "TCP") && !slices.Contains(out, uint32(c.ContainerPort)) {
			out = append(out, uint32(c.ContainerPort))
		}
	}
	slices.Sort(out)
	return out
}

// policy makes the chain of one policy's rules.
func (o *output) policy(name string, p *pb.NetworkPolicyItem, d direction, pod Pod, pass string, in input) {
	if in.closed[feed.Name{Namespace: p.GetNamespace(), Name: p.GetName()}] != nil { // the kernel is asked about others
		o.chains[name] = []string{closedRule}
		return
	}
	rules := []string{}
	for _, r := range d.rules(p) {
		verdict := "accept"
		switch r.GetAction() {
		case pb.NetworkRule_DENY:
			verdict = "drop"
		case pb.NetworkRule_PASS:
			verdict = pass
		}
		for _, peer := range o.peers(d, r) {
			for _, ports := range portMatches(r, pod) {
				rules = append(rules, strings.Join(slices.DeleteFunc([]string{peer, ports, verdict}, func(s string) bool { return s == "" }), " "))
			}
		}
		for _, g := range r.GetTargets() {
			o.ported[g] = true
			for _, f := range families {
				rules = append(rules, fmt.Sprintf("%s daddr . meta l4proto . th dport @%s %s", f.ip, groupSet("t", f, g), verdict))
			}
		}
	}
	o.chains[name] = rules
}

// peers are the matches of whom a rule is about, each of which is enough.
func (o *output) peers(d direction, r *pb.NetworkRule) []string {
	if r.GetAnyPeer() {
		return []string{""}
	}
	var out []string
	for _, g := range r.GetGroups() {
		o.groups[g] = true
		for _, f := range families {
			out = append(out, fmt.Sprintf("%s %s @%s", f.ip, d.peer, groupSet("g", f, g)))
		}
	}
	for _, f := range families {
		var plain []netip.Prefix
		for _, b := range r.GetBlocks() {
			cidr, err := netip.ParsePrefix(b.GetCidr())
			if err != nil || !f.is(cidr.Addr()) {
				continue
			}
			except := prefixes(f, b.GetExcept())
			if len(except) == 0 {
				plain = append(plain, cidr.Masked())
				continue
			}
			out = append(out, fmt.Sprintf("%s %s %s %s %s != %s", f.ip, d.peer, cidr.Masked(), f.ip, d.peer, listing(tables.Outermost(except))))
		}
		if plain = tables.Outermost(plain); len(plain) > 0 {
			out = append(out, fmt.Sprintf("%s %s %s", f.ip, d.peer, listing(plain)))
		}
	}
	return out
}

func prefixes(f family, texts []string) []netip.Prefix {
	var out []netip.Prefix
	for _, text := range texts {
		if p, err := netip.ParsePrefix(text); err == nil && f.is(p.Addr()) {
			out = append(out, p.Masked())
		}
	}
	return out
}

func listing[T any](list []T) string {
	texts := make([]string, len(list))
	for i, v := range list {
		texts[i] = fmt.Sprint(v)
	}
	return "{ " + strings.Join(texts, ", ") + " }"
}

// portMatches are the matches of the ports of a rule, each of which is enough.
func portMatches(r *pb.NetworkRule, pod Pod) []string {
	if r.GetAnyPort() {
		return []string{""}
	}
	var out []string
	for _, protocol := range []string{"TCP", "UDP", "SCTP"} {
		var ranges [][2]uint32
		all := false
		for _, p := range r.GetPorts() {
			if cmp.Or(p.GetProtocol(), "TCP") != protocol {
				continue
			}
			switch {
			case p.GetName() != "":
				for _, n := range namedPorts(pod, p) {
					ranges = append(ranges, [2]uint32{n, n})
				}
			case p.GetFirst() == 0 && p.GetLast() == 0:
				all = true
			default:
				ranges = append(ranges, [2]uint32{p.GetFirst(), max(p.GetFirst(), p.GetLast())})
			}
		}
		switch lower := strings.ToLower(protocol); {
		case all:
			out = append(out, "meta l4proto "+lower)
		case len(ranges) > 0:
			var texts []string
			for _, r := range merged(ranges) {
				text := strconv.Itoa(int(r[0]))
				if r[1] > r[0] {
					text += "-" + strconv.Itoa(int(r[1]))
				}
				texts = append(texts, text)
			}
			out = append(out, lower+" dport "+listing(texts))
		}
	}
	return out
}

// merged makes ranges that overlap or touch one.
func merged(ranges [][2]uint32) [][2]uint32 {
	slices.SortFunc(ranges, func(a, b [2]uint32) int { return cmp.Or(cmp.Compare(a[0], b[0]), cmp.Compare(a[1], b[1])) })
	var out [][2]uint32
	for _, r := range ranges {
		if n := len(out); n > 0 && r[0] <= out[n-1][1]+1 {
			out[n-1][1] = max(out[n-1][1], r[1])
			continue
		}
		out = append(out, r)
	}
	return out
}

var plainName = regexp.MustCompile(`^[A-Za-z0-9_.-]{1,64}$`)

// groupSet is the name of the set of a group.
func groupSet(kind string, f family, group string) string {
	if !plainName.MatchString(group) {
		group = "x" + hashOf(group)
	}
	return kind + f.digit + "-" + group
}

var encoding = base32.NewEncoding("abcdefghijklmnopqrstuvwxyz234567").WithPadding(base32.NoPadding)

func hashOf(parts ...string) string {
	h := sha256.Sum256([]byte(strings.Join(parts, "\x01")))
	return encoding.EncodeToString(h[:10])
}

// members are the elements of the sets of a group, by set.
func members(parts []*pb.NetworkGroup, group string, inG, inT bool) map[string]*set {
	out := map[string]*set{}
	for _, f := range families {
		g, t := map[string]struct{}{}, map[string]struct{}{}
		for _, part := range parts {
			raw, size := part.GetV4(), 4
			if f.digit == "6" {
				raw, size = part.GetV6(), 16
			}
			for ; inG && len(raw) >= size; raw = raw[size:] {
				ip, _ := netip.AddrFromSlice(raw[:size])
				g[ip.String()] = struct{}{}
			}
			for _, target := range part.GetTargets() {
				if ip, ok := netip.AddrFromSlice(target.GetAddress()); inT && ok && f.is(ip) {
					t[fmt.Sprintf("%s . %s . %d", ip, strings.ToLower(cmp.Or(target.GetProtocol(), "TCP")), target.GetPort())] = struct{}{}
				}
			}
		}
		if inG {
			out[groupSet("g", f, group)] = &set{typ: f.addr, elements: g}
		}
		if inT {
			out[groupSet("t", f, group)] = &set{typ: f.addr + " . inet_proto . inet_service", elements: t}
		}
	}
	return out
}
