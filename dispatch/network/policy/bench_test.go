package policy

import (
	"fmt"
	"runtime"
	"testing"

	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"timonel/dispatch/network/policy/oracle"
)

// large is a cluster of so many pods, 30 on a node and 100 in a namespace, of ten apps
// there, each with a policy that lets those of its namespace in, and another for all that
// lets in whoever is of monitoring.
func large(pods int) *Fold {
	f := New(Config{Bytes: 64 << 20, Logger: quiet})
	f.Update(1, func(t *Txn) {
		for i := range pods / 100 {
			name := fmt.Sprint("ns", i)
			t.SetNamespace(oracle.NamespaceObject(name, map[string]string{"kubernetes.io/metadata.name": name, "team": fmt.Sprint(i % 20)}))
			for j := range 10 {
				t.Set(Compile(allowFrom(name, fmt.Sprint("p", j), map[string]string{"app": fmt.Sprint(j)}, map[string]string{"app": fmt.Sprint((j + 1) % 10)})))
			}
			all := allowFrom(name, "monitoring", nil, nil)
			all.Spec.Ingress[0].From = []networkingv1.NetworkPolicyPeer{{
				NamespaceSelector: &metav1.LabelSelector{MatchLabels: map[string]string{"team": "1"}},
				PodSelector:       &metav1.LabelSelector{MatchLabels: map[string]string{"app": "9"}},
			}}
			t.Set(Compile(all))
		}
		for i := range pods {
			t.SetPod(oracle.PodObject(fmt.Sprint("ns", i/100), fmt.Sprint("pod", i), fmt.Sprint("node", i/30), map[string]string{"app": fmt.Sprint(i % 10)}, fmt.Sprintf("10.%d.%d.%d", i>>16, i>>8&255, i&255)))
		}
	})
	return f
}

// BenchmarkOnePodChanges is a pod that gets another address: what it costs, and how many of
// the nodes are told.
func BenchmarkOnePodChanges(b *testing.B) {
	for _, pods := range []int{1000, 150000} {
		b.Run(fmt.Sprintf("pods=%d", pods), func(b *testing.B) {
			live := func() float64 {
				runtime.GC()
				var m runtime.MemStats
				runtime.ReadMemStats(&m)
				return float64(m.HeapAlloc) / (1 << 20)
			}
			before := live()
			f := large(pods)
			nodes := min(pods/30, 1700) // those of one controller of three
			followers := make([]*Follower, nodes)
			for i := range followers {
				followers[i] = f.Follow(fmt.Sprint("node", i))
			}
			for _, l := range followers {
				l.Take()
			}
			held := live() - before
			told := 0
			for i := 0; b.Loop(); i++ {
				p := oracle.PodObject("ns2", "pod205", "node6", map[string]string{"app": "5"}, fmt.Sprintf("10.200.%d.%d", i>>8&255, i&255))
				f.Update(int64(i+2), func(t *Txn) { t.SetPod(p) })
				b.StopTimer()
				for _, l := range followers {
					if _, ok := l.Take(); ok {
						told++
					}
				}
				b.StartTimer()
			}
			bytes, _, _ := f.Held()
			b.ReportMetric(float64(told)/float64(b.N), "nodes-told/op")
			b.ReportMetric(held, "MiB")
			b.ReportMetric(float64(bytes)/(1<<20), "items-MiB")
		})
	}
}
