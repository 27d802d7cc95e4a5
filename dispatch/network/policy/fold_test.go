package policy

import (
	"fmt"
	"math/rand/v2"
	"testing"

	"github.com/stretchr/testify/require"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"timonel/dispatch/network/policy/oracle"
)

// Whatever happens, in whatever portions, a node is told what one is told that comes last,
// and that is what the API's words about the objects say.
func TestAFoldIsWhatTheObjectsSay(t *testing.T) {
	t.Parallel()
	for seed := range uint64(20) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			t.Parallel()
			d := oracle.Dice{Rand: rand.New(rand.NewPCG(seed, 1)), Blocks: []networkingv1.IPBlock{
				{CIDR: "10.0.0.0/29", Except: []string{"10.0.0.2/31", "10.0.0.7/32"}}, {CIDR: "fd00::/125"}, {CIDR: "0.0.0.0/0"},
			}}
			w, f := oracle.NewWorld(), newFold()
			nodes := map[string]*node{"n1": follow(t, f, "n1"), "n2": follow(t, f, "n2")}
			namespace := func() string { return oracle.Pick(d, "x", "y", "z") }
			revision := int64(0)
			for step := range 60 {
				revision++
				f.Update(revision, func(txn *Txn) {
					for range 1 + d.IntN(4) {
						ns := namespace()
						switch d.IntN(9) {
						case 0:
							w.Namespaces[ns] = oracle.NamespaceObject(ns, d.Labels())
							txn.SetNamespace(w.Namespaces[ns])
						case 1:
							if d.IntN(4) == 0 {
								delete(w.Namespaces, ns)
								txn.RemoveNamespace(ns)
							}
						case 2, 3, 4:
							p := d.Pod(ns, fmt.Sprint("p", d.IntN(6)))
							w.Pods[types.NamespacedName(Name{ns, p.Name})] = p
							txn.SetPod(p)
						case 5:
							name := fmt.Sprint("p", d.IntN(6))
							delete(w.Pods, types.NamespacedName(Name{ns, name}))
							txn.RemovePod(ns, name)
						case 6, 7:
							p := d.Policy(ns, fmt.Sprint("np", d.IntN(3)))
							w.Policies[types.NamespacedName(Name{ns, p.Name})] = p
							txn.Set(Compile(p))
						case 8:
							name := fmt.Sprint("np", d.IntN(3))
							delete(w.Policies, types.NamespacedName(Name{ns, name}))
							txn.Remove(ns, name)
						}
					}
				})
				if d.IntN(10) == 0 {
					name := oracle.Pick(d, "n1", "n2")
					if d.IntN(2) == 0 {
						nodes[name].l.Close()
					}
					nodes[name] = follow(t, f, name)
				}
				if d.IntN(3) == 0 {
					check(t, w, nodes, step%20 == 0)
				}
			}
			check(t, w, nodes, true)

			// All goes, and nothing stays.
			f.Update(revision+1, func(txn *Txn) {
				for n := range w.Policies {
					txn.Remove(n.Namespace, n.Name)
				}
			})
			for _, n := range nodes {
				n.take()
				require.Empty(t, n.items)
			}
			require.Empty(t, f.groups)
			require.Empty(t, f.scopes)
			require.Empty(t, f.policies)
			require.Empty(t, f.named)
			require.Empty(t, f.used)
			require.Zero(t, f.bytes)
			f.Update(revision+2, func(txn *Txn) {
				for n := range w.Pods {
					txn.RemovePod(n.Namespace, n.Name)
				}
				for n := range w.Namespaces {
					txn.RemoveNamespace(n)
				}
			})
			require.Empty(t, f.pods)
			require.Empty(t, f.byNode)
			require.Empty(t, f.namespaces)
		})
	}
}

func allowFrom(namespace, name string, subject, from map[string]string) *networkingv1.NetworkPolicy {
	return &networkingv1.NetworkPolicy{
		ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: name, UID: "u"},
		Spec: networkingv1.NetworkPolicySpec{
			PodSelector: metav1.LabelSelector{MatchLabels: subject}, PolicyTypes: []networkingv1.PolicyType{"Ingress"},
			Ingress: []networkingv1.NetworkPolicyIngressRule{{From: []networkingv1.NetworkPolicyPeer{{PodSelector: &metav1.LabelSelector{MatchLabels: from}}}}},
		},
	}
}

// A change goes to the nodes that it concerns, and to no other.
func TestAChangeGoesToWhomItConcerns(t *testing.T) {
	t.Parallel()
	f := newFold()
	web, client := map[string]string{"app": "web"}, map[string]string{"app": "client"}
	f.Update(1, func(txn *Txn) {
		txn.SetNamespace(oracle.NamespaceObject("x", nil))
		txn.SetPod(oracle.PodObject("x", "web", "n1", web, "10.0.0.1"))
		txn.SetPod(oracle.PodObject("x", "client", "n2", client, "10.0.0.2"))
		txn.SetPod(oracle.PodObject("y", "web", "n3", web, "10.0.0.3"))
	})
	n1, n2, n3 := follow(t, f, "n1"), follow(t, f, "n2"), follow(t, f, "n3")
	quiet := func() {
		t.Helper()
		require.Nil(t, n2.take())
		require.Nil(t, n3.take())
	}
	f.Update(2, func(txn *Txn) { txn.Set(Compile(allowFrom("x", "p", web, client))) })
	group := Compile(allowFrom("x", "p", web, client)).Item.Ingress[0].Groups[0]
	require.Equal(t, []string{"set group " + group + ".x", "set pod x/web", "set policy x/p"}, n1.take())
	require.EqualValues(t, 2, n1.told)
	quiet()
	f.Update(3, func(txn *Txn) { txn.SetPod(oracle.PodObject("x", "client2", "n2", client, "10.0.0.4")) })
	require.Equal(t, []string{"set group " + group + ".x"}, n1.take())
	quiet()
	f.Update(4, func(txn *Txn) { txn.SetPod(oracle.PodObject("y", "client", "n2", client, "10.0.0.5")) })
	require.Nil(t, n1.take(), "a pod of another namespace")
	quiet()
	f.Update(5, func(txn *Txn) { txn.SetPod(oracle.PodObject("x", "web", "n1", nil, "10.0.0.1")) })
	require.Equal(t, []string{"remove group " + group + ".x", "remove pod x/web", "remove policy x/p"}, n1.take())
	quiet()

	// Who waits for a revision is told, if nothing happens for it too.
	f.Want("n2", 7)
	require.Nil(t, n2.take())
	f.Update(8, func(txn *Txn) { txn.SetNamespace(oracle.NamespaceObject("z", nil)) })
	<-n2.l.Moved()
	told, ok := n2.l.Take()
	require.True(t, ok)
	require.EqualValues(t, 8, told.Revision)
	_, ok = n2.l.Take()
	require.False(t, ok)
	f.Want("n2", 8)
	<-n2.l.Moved()
	_, ok = n2.l.Take()
	require.True(t, ok)
}

// A group of many comes in parts, one of which a pod more changes, however many came and
// went before.
func TestPartsOfAGroup(t *testing.T) {
	t.Parallel()
	f := newFold()
	web, client := map[string]string{"app": "web"}, map[string]string{"app": "client"}
	ip := func(i int) string { return fmt.Sprintf("10.%d.%d.%d", i>>16, i>>8&255, i&255) }
	const many = 5000
	f.Update(1, func(txn *Txn) {
		txn.SetPod(oracle.PodObject("x", "web", "n1", web, "10.255.0.1"))
		txn.Set(Compile(allowFrom("x", "p", web, client)))
		for i := range many {
			txn.SetPod(oracle.PodObject("x", fmt.Sprint("c", i), "n2", client, ip(i)))
		}
	})
	n1 := follow(t, f, "n1")
	group := n1.policy(Name{"x", "p"}).Ingress[0].Groups[0]
	require.Len(t, n1.group(group), many)
	require.Greater(t, len(n1.items), many/maxPart)
	for i := range 200 {
		f.Update(int64(2+i), func(txn *Txn) { txn.SetPod(oracle.PodObject("x", fmt.Sprint("d", i), "n2", client, ip(many+i))) })
		require.LessOrEqual(t, len(n1.take()), 3, "one part, or two instead of one")
	}
	require.Len(t, n1.group(group), many+200)
	f.Update(1000, func(txn *Txn) {
		for i := range many - 3 {
			txn.RemovePod("x", fmt.Sprint("c", i))
		}
	})
	n1.take()
	require.Len(t, n1.group(group), 203)
	require.Len(t, n1.items, 3, "the parts are one again")
	fresh := newFold()
	fresh.Update(1, func(txn *Txn) {
		txn.SetPod(oracle.PodObject("x", "web", "n1", web, "10.255.0.1"))
		txn.Set(Compile(allowFrom("x", "p", web, client)))
		for i := range 3 {
			txn.SetPod(oracle.PodObject("x", fmt.Sprint("c", many-3+i), "n2", client, ip(many-3+i)))
		}
		for i := range 200 {
			txn.SetPod(oracle.PodObject("x", fmt.Sprint("d", i), "n2", client, ip(many+i)))
		}
	})
	require.Equal(t, follow(t, fresh, "n1").items, n1.items)
}

// What is too much closes pods, and opens none; and comes back when there is room.
func TestWhatIsTooMuchIsClosed(t *testing.T) {
	t.Parallel()
	web, client := map[string]string{"app": "web"}, map[string]string{"app": "client"}
	f := New(Config{Bytes: 16 << 10, Logger: quiet})
	f.Update(1, func(txn *Txn) {
		txn.SetPod(oracle.PodObject("x", "web", "n1", web, "10.255.0.1"))
		txn.SetPod(oracle.PodObject("y", "web", "n1", web, "10.255.0.2"))
		txn.Set(Compile(allowFrom("x", "p", web, client)))
		txn.Set(Compile(allowFrom("y", "p", web, client)))
		txn.SetPod(oracle.PodObject("y", "c", "n2", client, "10.1.0.1"))
	})
	n1 := follow(t, f, "n1")
	group := n1.policy(Name{"x", "p"}).Ingress[0].Groups[0]
	f.Update(2, func(txn *Txn) {
		for i := range 8000 {
			txn.SetPod(oracle.PodObject("x", fmt.Sprint("c", i), "n2", client, fmt.Sprintf("10.2.%d.%d", i>>8, i&255)))
		}
	})
	n1.take()
	require.Empty(t, n1.group(group), "nobody is in a group that is too much")
	require.True(t, n1.policy(Name{"x", "p"}).IngressIsolated)
	require.Len(t, n1.group(n1.policy(Name{"y", "p"}).Ingress[0].Groups[0]), 1, "another group suffers")
	_, _, withheld := f.Held()
	require.Equal(t, 1, withheld)

	big := allowFrom("y", "big", web, client)
	for i := range 400 {
		big.Spec.Ingress[0].From = append(big.Spec.Ingress[0].From, networkingv1.NetworkPolicyPeer{IPBlock: &networkingv1.IPBlock{CIDR: fmt.Sprintf("192.0.%d.%d/32", i>>8, i&255)}})
	}
	f.Update(3, func(txn *Txn) { txn.Set(Compile(big)) })
	n1.take()
	require.Empty(t, n1.policy(Name{"y", "big"}).Ingress)
	require.True(t, n1.policy(Name{"y", "big"}).IngressIsolated)
	require.Len(t, n1.pod(Name{"y", "web"}).Policies, 2)
	_, _, withheld = f.Held()
	require.Equal(t, 2, withheld)

	f.Update(4, func(txn *Txn) {
		for i := range 8000 {
			txn.RemovePod("x", fmt.Sprint("c", i))
		}
		txn.SetPod(oracle.PodObject("x", "last", "n2", client, "10.3.0.1"))
		big.Spec.Ingress[0].From = big.Spec.Ingress[0].From[:20]
		txn.Set(Compile(big))
	})
	f.Update(5, func(txn *Txn) { txn.RemovePod("y", "c") })
	n1.take()
	require.Len(t, n1.policy(Name{"y", "big"}).Ingress, 1)
}

// A namespace's policies name so many selections and no more, without those of others.
func TestOneNamespaceNamesSoManySelections(t *testing.T) {
	t.Parallel()
	f := newFold()
	web := map[string]string{"app": "web"}
	f.Update(1, func(txn *Txn) {
		txn.SetPod(oracle.PodObject("x", "web", "n1", web))
		txn.SetPod(oracle.PodObject("y", "web", "n1", web))
		for i := range 5 {
			p := allowFrom("x", fmt.Sprint("p", i), web, nil)
			for j := range 1000 {
				p.Spec.Ingress[0].From = append(p.Spec.Ingress[0].From, networkingv1.NetworkPolicyPeer{PodSelector: &metav1.LabelSelector{MatchLabels: map[string]string{"i": fmt.Sprint(i), "j": fmt.Sprint(j)}}})
			}
			txn.Set(Compile(p))
		}
		txn.Set(Compile(allowFrom("y", "p", web, web)))
	})
	n1 := follow(t, f, "n1")
	require.Len(t, n1.policy(Name{"x", "p3"}).Ingress, 1)
	require.Empty(t, n1.policy(Name{"x", "p4"}).Ingress)
	require.True(t, n1.policy(Name{"x", "p4"}).IngressIsolated)
	require.Len(t, n1.policy(Name{"y", "p"}).Ingress, 1)
	f.Update(2, func(txn *Txn) { txn.Remove("x", "p0") })
	f.Update(3, func(txn *Txn) {})
	n1.take()
	require.Len(t, n1.policy(Name{"x", "p4"}).Ingress, 1)
}
