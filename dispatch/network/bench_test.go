package network

import (
	"context"
	"fmt"
	"runtime"
	"slices"
	"sync"
	"testing"
	"time"

	kruntime "k8s.io/apimachinery/pkg/runtime"

	"timonel/network/feed"
)

// BenchmarkEndpointChangeTo100Agents is the time from the commit of a changed
// EndpointSlice, among 1,000 Services, to the View of each of 100 agents.
func BenchmarkEndpointChangeTo100Agents(b *testing.B) {
	h := newHouse(b)
	h.put(many(1000)...)
	k := h.controller(nil)
	agents := make([]*agent, 100)
	for i := range agents {
		agents[i] = newAgent(b, fmt.Sprint("n", i), "")
		agents[i].connect(k)
		defer agents[i].stop()
	}
	for _, a := range agents {
		a.eventuallySynced()
	}
	var took []time.Duration
	for i := 0; b.Loop(); i++ {
		took = append(took, changeTo(b, agents, func() { h.put(slice("a", "s5-x", "s5", fmt.Sprintf("10.9.%d.%d", i/250%250, i%250))) })...)
	}
	reportTimes(b, took)
}

// changeTo is how long after a change each agent has another View.
func changeTo(b *testing.B, agents []*agent, change func()) (took []time.Duration) {
	var mu sync.Mutex
	var done sync.WaitGroup
	var began time.Time
	started := make(chan struct{})
	for _, a := range agents {
		after := a.store.View().Revision()
		done.Go(func() {
			<-started
			if _, err := a.store.Changes(b.Context(), after); err != nil {
				return
			}
			mu.Lock()
			took = append(took, time.Since(began))
			mu.Unlock()
		})
	}
	began = time.Now()
	close(started)
	change()
	done.Wait()
	return took
}

func reportTimes(b *testing.B, took []time.Duration) {
	slices.Sort(took)
	b.ReportMetric(float64(took[len(took)/2].Microseconds())/1000, "p50-ms")
	b.ReportMetric(float64(took[len(took)*99/100].Microseconds())/1000, "p99-ms")
}

// BenchmarkFirstSyncOf10000Services is the time until an agent that knows nothing knows
// 10,000 Services of 10 endpoints each, and what that takes.
func BenchmarkFirstSyncOf10000Services(b *testing.B) {
	live := func() float64 {
		runtime.GC()
		runtime.GC()
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return float64(m.HeapAlloc) / (1 << 20)
	}
	h := newHouse(b)
	all := many(10000)
	for part := range slices.Chunk(all, 500) {
		h.put(part...)
	}
	clear(all)
	k := h.controller(nil)
	for _, wait := range []func(context.Context, int64) error{k.cache.WaitRevision, k.feed.Wait} {
		if err := wait(b.Context(), h.store.View().Revision()); err != nil {
			b.Fatal(err)
		}
	}
	without := live()
	another := New(k.feed.cfg)
	another.reload(k.cache.Snapshot())
	controller := live() - without
	runtime.KeepAlive(another)
	var agentBytes float64
	for b.Loop() {
		b.StopTimer()
		before := live()
		a := newAgent(b, "n1", "")
		b.StartTimer()
		a.connect(k)
		a.eventuallySynced()
		b.StopTimer()
		agentBytes = live() - before
		n := 0
		for name := range a.store.View().Services() {
			n += len(a.store.View().Slices(feed.Name{Namespace: name.Namespace, Name: name.Name}))
		}
		if n != 10000 {
			b.Fatalf("%d slices", n)
		}
		a.stop()
		b.StartTimer()
	}
	f := k.feed.Figures()
	b.ReportMetric(float64(f.Bytes)/(1<<20), "items-MiB")
	b.ReportMetric(controller, "controller-MiB")
	b.ReportMetric(agentBytes, "agent-MiB")
}

// BenchmarkPodChangeTo100Agents is the time from the commit of a pod's address, among
// 150,000 pods of 5,000 nodes, to the View of each of 100 agents whose pods let it in.
func BenchmarkPodChangeTo100Agents(b *testing.B) {
	h := newHouse(b)
	h.put(inNamespace("a", "x"), allow("a", "p", "web", "client", "x"))
	var batch []kruntime.Object
	for i := range 150000 {
		app, namespace := "other", "b"
		if i%1500 == 0 {
			app, namespace = "web", "a"
		}
		batch = append(batch, pod(namespace, fmt.Sprint("p", i), fmt.Sprint("n", i%1500/30+50*(i/1500)), app, fmt.Sprintf("10.%d.%d.%d", i>>16, i>>8&255, i&255)))
		if len(batch) == 2000 {
			h.put(batch...)
			batch = nil
		}
	}
	k := h.controller(nil)
	agents := make([]*agent, 100)
	for i := range agents {
		agents[i] = newAgent(b, fmt.Sprint("n", 50*i), "")
		agents[i].connect(k)
		defer agents[i].stop()
	}
	for _, a := range agents {
		a.eventuallySynced()
		if a.store.View().Policy("a", "p") == nil {
			b.Fatalf("agent %s has not the policy", a.name)
		}
	}
	var took []time.Duration
	for i := 0; b.Loop(); i++ {
		took = append(took, changeTo(b, agents, func() { h.put(pod("a", "client", "n1", "client", fmt.Sprintf("10.200.%d.%d", i/250%250, i%250))) })...)
	}
	reportTimes(b, took)
}
