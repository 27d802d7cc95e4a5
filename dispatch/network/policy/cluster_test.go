package policy

import (
	"fmt"
	"net/netip"
	"testing"

	"github.com/stretchr/testify/require"
	"sigs.k8s.io/yaml"

	pb "timonel/proto/timonel/v1"

	"timonel/dispatch/network/policy/oracle"
)

func compiled(t *testing.T, text string) (*Policy, []string) {
	t.Helper()
	raw, err := yaml.YAMLToJSON([]byte(text))
	require.NoError(t, err)
	p, wrong, err := CompileCluster(raw)
	require.NoError(t, err)
	return p, wrong
}

func TestAClustersPolicyIsToldToItsSubjects(t *testing.T) {
	t.Parallel()
	p, wrong := compiled(t, `
apiVersion: policy.networking.k8s.io/v1beta1
kind: ClusterNetworkPolicy
metadata: {name: c, uid: u}
spec:
  tier: Admin
  priority: 7
  subject: {namespaces: {matchLabels: {team: a}}}
  ingress:
  - action: Deny
    from: [{pods: {namespaceSelector: {matchLabels: {team: b}}, podSelector: {matchLabels: {app: web}}}}]
    protocols: [{tcp: {destinationPort: {number: 80}}}, {udp: {destinationPort: {range: {start: 5, end: 9}}}}, {sctp: {}}]
  egress:
  - action: Accept
    to: [{nodes: {matchLabels: {role: storage}}}, {networks: [192.0.2.0/24, "2001:db8::/32"]}]
  - action: Pass
    to: [{namespaces: {}}]
    protocols: [{destinationNamedPort: http}]
`)
	require.Empty(t, wrong)
	require.Equal(t, pb.NetworkPolicyItem_ADMIN, p.Item.Tier)
	require.EqualValues(t, 7, p.Item.Priority)
	f := newFold()
	f.Update(1, func(txn *Txn) {
		txn.SetNamespace(oracle.NamespaceObject("x", map[string]string{"team": "a"}))
		txn.SetNamespace(oracle.NamespaceObject("y", map[string]string{"team": "b"}))
		txn.SetPod(oracle.PodObject("x", "own", "n1", nil, "10.0.0.1"))
		txn.SetPod(oracle.PodObject("y", "web", "n2", map[string]string{"app": "web"}, "10.0.0.2"))
		txn.SetNode("n3", map[string]string{"role": "storage"}, []netip.Addr{netip.MustParseAddr("198.51.100.3")})
		txn.SetNode("n4", nil, []netip.Addr{netip.MustParseAddr("198.51.100.4")})
		txn.Set(p)
	})
	n1, n2 := follow(t, f, "n1"), follow(t, f, "n2")
	require.Empty(t, n2.items)
	c := n1.policy(Name{"", "c"})
	require.False(t, c.IngressIsolated)
	deny := c.Ingress[0]
	require.Equal(t, pb.NetworkRule_DENY, deny.Action)
	require.Equal(t, map[element]bool{{ip: netip.MustParseAddr("10.0.0.2")}: true}, n1.group(deny.Groups[0]))
	require.Equal(t, []string{"TCP 80-80", "UDP 5-9", "SCTP 0-0"}, portsOf(deny))
	require.Equal(t, map[element]bool{{ip: netip.MustParseAddr("198.51.100.3")}: true}, n1.group(c.Egress[0].Groups[0]))
	require.Equal(t, "2001:db8::/32", c.Egress[0].Blocks[1].Cidr)
	pass := c.Egress[1]
	require.Equal(t, pb.NetworkRule_PASS, pass.Action)
	require.Empty(t, pass.Ports)
	require.False(t, pass.AnyPort)
	var targets []element
	for _, g := range pass.Targets {
		for e := range n1.group(g) {
			targets = append(targets, e)
		}
	}
	require.ElementsMatch(t, []element{{netip.MustParseAddr("10.0.0.1"), "TCP", 8080}, {netip.MustParseAddr("10.0.0.2"), "TCP", 8080}}, targets)

	f.Update(2, func(txn *Txn) { txn.SetNamespace(oracle.NamespaceObject("x", nil)) })
	n1.take()
	require.Empty(t, n1.items)
	f.Update(3, func(txn *Txn) {
		txn.Keep(Keep{Pod: func(Name) bool { return false }, Node: func(name string) bool { return name == "n4" }, Namespace: func(string) bool { return false }, Policy: func(Name) bool { return false }})
	})
	require.Len(t, f.pods, 1)
	require.Empty(t, f.policies)
}

func portsOf(r *pb.NetworkRule) (out []string) {
	for _, p := range r.Ports {
		out = append(out, p.Protocol+" "+fmt.Sprint(p.First)+"-"+fmt.Sprint(p.Last))
	}
	return out
}

// A rule with what is not known fails closed.
func TestARuleThatIsNotKnownFailsClosed(t *testing.T) {
	t.Parallel()
	for _, peer := range []string{"{domainNames: [example.com]}", "{somethingNew: {}}", "{networks: [rubbish]}"} {
		p, wrong := compiled(t, `
metadata: {name: c}
spec:
  tier: Baseline
  subject: {namespaces: {}}
  egress:
  - {action: Accept, to: [{namespaces: {}}, `+peer+`]}
  - {action: Deny, to: [`+peer+`]}
  - {action: Pass, to: [`+peer+`]}
  - {action: Deny, to: [{namespaces: {}}], protocols: [{somethingNew: {}}]}
`)
		require.Len(t, wrong, 4)
		require.Contains(t, wrong[0], "spec.egress[0]")
		require.Len(t, p.Item.Egress, 3)
		for _, r := range p.Item.Egress {
			require.Equal(t, pb.NetworkRule_DENY, r.Action)
			require.True(t, r.AnyPeer && r.AnyPort)
		}
	}
	for _, text := range []string{"rubbish", `{"spec":{"tier":"Other","subject":{"namespaces":{}}}}`, `{"spec":{"tier":"Admin"}}`} {
		_, _, err := CompileCluster([]byte(text))
		require.Error(t, err)
	}
}

// Deny rules whose groups are left out deny to all.
func TestADenyOfAGroupThatIsLeftOut(t *testing.T) {
	t.Parallel()
	p, _ := compiled(t, `
metadata: {name: c}
spec:
  tier: Admin
  subject: {namespaces: {}}
  ingress:
  - {action: Accept, from: [{namespaces: {matchLabels: {a: b}}}]}
  - {action: Deny, from: [{namespaces: {}}], protocols: [{tcp: {destinationPort: {number: 80}}}]}
`)
	denied := p.Item.Ingress[1].Groups[0]
	item := p.without(func(name string) bool { return name == denied })
	require.Equal(t, p.Item.Ingress[0], item.Ingress[0])
	require.True(t, item.Ingress[1].AnyPeer)
	require.Equal(t, []string{"TCP 80-80"}, portsOf(item.Ingress[1]))
	require.Same(t, p.Item, p.without(func(string) bool { return false }))
	closed := p.closed()
	require.Len(t, closed.Ingress, 1)
	require.Equal(t, pb.NetworkRule_DENY, closed.Ingress[0].Action)
}

func FuzzCompileCluster(f *testing.F) {
	f.Add([]byte(`{"metadata":{"name":"c"},"spec":{"tier":"Admin","subject":{"pods":{}},"egress":[{"action":"Deny","to":[{"networks":["10.0.0.0/8"]}]}]}}`))
	f.Fuzz(func(t *testing.T, raw []byte) {
		if p, _, err := CompileCluster(raw); err == nil && (p.subject.namespaces == nil || p.Item.Tier == pb.NetworkPolicyItem_NAMESPACE) {
			t.Fatalf("%+v", p)
		}
	})
}
