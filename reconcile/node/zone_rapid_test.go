package node_test

import (
	"encoding/json"
	"fmt"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	"pgregory.net/rapid"

	"timonel/reconcile"
	"timonel/reconcile/node"
	"timonel/reconcile/storytest"
	"timonel/state/objects"
)

// evictionTaint is when a Node got its NoExecute taint for being lost, false if it has none.
func evictionTaint(n *corev1.Node) (time.Time, bool) {
	for _, t := range n.Spec.Taints {
		if t.Effect == corev1.TaintEffectNoExecute && t.Key == corev1.TaintNodeUnreachable {
			return t.TimeAdded.Time, true
		}
	}
	return time.Time{}, false
}

// adds says whether a patch of a Node gives it an eviction taint.
func adds(t *rapid.T, patch []byte) bool {
	var n corev1.Node
	if err := json.Unmarshal(patch, &n); err != nil {
		t.Fatalf("patch: %v", err)
	}
	_, has := evictionTaint(&n)
	return has
}

// TestEvictionsOfZones loses Nodes of zones at random and gives them back. No two of a
// zone get an eviction taint within less than the rate's time; none gets one while more
// of its zone is lost than is taken for real; and in the end each that is lost has one,
// unless its zone is such, and no other.
func TestEvictionsOfZones(t *testing.T) {
	t.Parallel()
	tainted, waited, heldBack, secondary := 0, 0, 0, 0
	rapid.Check(t, func(t *rapid.T) {
		large := rapid.SampledFrom([]int{4, 50}).Draw(t, "large zones begin above")
		cfg := node.HealthConfig{LargeZone: large}
		w := storytest.NewWorld(t)
		s := storytest.New(w, node.NodeLifecycle{Health: cfg})
		zones := map[string]int{}
		var names []string
		for z := range rapid.IntRange(1, 3).Draw(t, "zones") {
			zone := fmt.Sprintf("z%d", z)
			zones[zone] = rapid.IntRange(1, 7).Draw(t, "nodes of "+zone)
			for i := range zones[zone] {
				n := storytest.Node(fmt.Sprintf("%s-%d", zone, i))
				n.Labels = map[string]string{corev1.LabelTopologyZone: zone}
				w.Add(n)
				names = append(names, n.Name)
			}
		}
		health := reconcile.Health{Since: w.Now.Add(-time.Hour), Nodes: map[string]reconcile.NodeHealth{}}
		set := func(name string, stream bool) {
			next := reconcile.Health{Since: health.Since, Nodes: map[string]reconcile.NodeHealth{}}
			for k, v := range health.Nodes {
				next.Nodes[k] = v
			}
			h := reconcile.NodeHealth{Stream: stream, StreamSince: w.Now, Gossip: reconcile.GossipAlive, GossipSince: w.Now}
			if !stream {
				h.Gossip = reconcile.GossipDead
			}
			next.Nodes[name] = h
			health = next
			s.SetHealth(health)
		}
		for _, name := range names {
			set(name, true)
		}
		// interval is the time between two evictions of a zone, 0 for none.
		interval := func(zone string) time.Duration {
			lost, judged, of, ready := 0, 0, 0, 0
			for n := range w.Snapshot().Nodes().All() {
				h := health.Nodes[n.Name]
				gone := !h.Stream || !objects.NodeReady(n)
				if !gone {
					ready++
				}
				if at, ok := evictionTaint(n); n.Labels[corev1.LabelTopologyZone] != zone || ok && w.Now.Sub(at) >= 5*time.Minute {
					continue
				}
				of++
				if gone {
					lost++
				}
				if !objects.NodeReady(n) || !h.Stream && w.Now.Sub(h.StreamSince) >= time.Second {
					judged++
				}
			}
			switch {
			case ready == 0:
				return 0
			case judged == of || lost < 2 || float64(lost) < 0.55*float64(of):
				return 10 * time.Second
			case zones[zone] > large:
				return 100 * time.Second
			}
			return 0
		}
		s.Before = func(c reconcile.Request) {
			if c.Resource != reconcile.NodesResource || c.Verb != reconcile.VerbPatch || c.Subresource != "" {
				return
			}
			before, _ := w.Snapshot().Nodes().Get("", c.Name)
			if _, has := evictionTaint(before); has || !adds(t, c.Patch) {
				return
			}
			tainted++
			zone := before.Labels[corev1.LabelTopologyZone]
			least := interval(zone)
			switch least {
			case 0:
				t.Fatalf("at %s %s gets an eviction taint although so many are lost:\n%s\n%v", w.Now, c.Name, s.Show("minions"), health.Nodes)
			case 100 * time.Second:
				secondary++
			}
			for other := range w.Snapshot().NodesInZone(objects.Zone(before)) {
				if at, ok := evictionTaint(other); ok && w.Now.Sub(at) < least {
					t.Fatalf("%s gets its eviction taint %s after %s in a zone whose nodes have one in %s", c.Name, w.Now.Sub(at), other.Name, least)
				}
			}
		}
		rest := func() {
			for n := 0; s.Step(); n++ {
				if n > 5000 {
					t.Fatalf("it never rests:\n%s", s.Run(6))
				}
			}
		}
		s.Start()
		rest()
		for range rapid.IntRange(1, 12).Draw(t, "steps") {
			for range rapid.IntRange(0, 3).Draw(t, "changes") {
				name := rapid.SampledFrom(names).Draw(t, "node")
				set(name, rapid.Bool().Draw(t, "stream"))
			}
			for range rapid.IntRange(0, 30).Draw(t, "work") {
				s.Step()
			}
			w.Now = w.Now.Add(time.Duration(rapid.SampledFrom([]int{0, 1, 2, 5, 12, 301}).Draw(t, "seconds")) * time.Second)
		}
		for range 200 { // the slowest of zones needs 700 s, and taints older than 300 s count no more
			rest()
			w.Now = w.Now.Add(7 * time.Second)
		}
		for n := range w.Snapshot().Nodes().All() {
			_, has := evictionTaint(n)
			zone := n.Labels[corev1.LabelTopologyZone]
			switch lost := !health.Nodes[n.Name].Stream; {
			case !lost && has:
				t.Fatalf("%s is back and has an eviction taint", n.Name)
			case lost && !has && interval(zone) > 0:
				t.Fatalf("%s is lost and has no eviction taint", n.Name)
			case lost && !has:
				heldBack++
			case lost:
				waited++
			}
		}
	})
	if tainted < 20 || waited < 20 || heldBack < 5 || secondary < 2 {
		t.Errorf("%d nodes were tainted, %d in the end, %d held back, %d at the secondary rate: nothing was tried", tainted, waited, heldBack, secondary)
	}
}
