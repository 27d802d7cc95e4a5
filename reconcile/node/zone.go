package node

import (
	"cmp"
	"fmt"
	"slices"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"timonel/reconcile"
	"timonel/state/objects"
)

// zone is what is known of a zone at a moment. Nodes that were lost long ago count in
// nothing but size and last.
type zone struct {
	// noticed counts Nodes that are not ready or whose stream is gone, judged or
	// not: when many vanish, not all are judged at the same moment. judged counts
	// those that are not ready or judged unreachable.
	noticed, judged, of int
	// size is how many Nodes it has.
	size int
	// last is when one of them got its eviction taint, awaiting are those that have
	// none and are to get one, with when they were lost.
	last     time.Time
	awaiting []awaiting
	// until is when the first of those that count will not any more, zero for never.
	until time.Time
}

// awaiting is a Node that is to get an eviction taint.
type awaiting struct {
	name  string
	since time.Time
}

// zone counts the Nodes of a zone that are lost.
func (c HealthConfig) zone(in reconcile.Input, name string) zone {
	z := zone{size: in.Snapshot.NodesInZoneLen(name)}
	for node := range in.Snapshot.NodesInZone(name) {
		tainted := lostSince(node)
		z.last = reconcile.Latest(z.last, tainted)
		if c.longTainted(node, in.Now) {
			continue
		}
		if expires := tainted.Add(c.Window); !tainted.IsZero() && (z.until.IsZero() || expires.Before(z.until)) {
			z.until = expires
		}
		z.of++
		noticed, judged := c.missed(in, node)
		if noticed {
			z.noticed++
		}
		if !judged {
			continue
		}
		z.judged++
		if !tainted.IsZero() || node.DeletionTimestamp != nil {
			continue
		}
		// A Node that has been judged is about to be said not ready.
		since := metav1.NewTime(in.Now).Rfc3339Copy().Time
		if ready := reconcile.NodeCondition(node, corev1.NodeReady); !objects.NodeReady(node) {
			if key, _ := c.evictionTaint(in, node, c.judge(in.Health, node.Name, in.Now)); key == "" {
				continue
			}
			since = ready.LastTransitionTime.Time
		}
		z.awaiting = append(z.awaiting, awaiting{node.Name, since})
	}
	return z
}

// missed says whether a Node is noticed and judged as lost.
func (c HealthConfig) missed(in reconcile.Input, node *corev1.Node) (noticed, judged bool) {
	if !objects.NodeReady(node) || c.judge(in.Health, node.Name, in.Now).Unreachable {
		return true, true
	}
	h := in.Health.Nodes[node.Name]
	return !h.Stream && !h.Goodbye, false
}

// partial says whether so much of a zone is lost at once, and not all of it, that it is
// taken for a fault of the network or of the control plane. All of it is lost when its
// power fails; until all have been judged nobody knows that it is so.
func (c HealthConfig) partial(z zone, lost int) bool {
	return z.judged < z.of && lost >= c.ShareMin && float64(lost) >= c.Share*float64(z.of)
}

// rate is from how many Nodes in a second pods of a zone may be evicted. Zero is
// none; why says it to people.
func (c HealthConfig) rate(in reconcile.Input, z zone, judged bool) (rate float64, why string) {
	lost := z.noticed
	if judged {
		lost = z.judged
	}
	rate = c.EvictionRate
	if lost == z.of && c.nobodyLeft(in, judged) {
		return 0, "so are all others"
	}
	if c.partial(z, lost) {
		if z.size <= c.LargeZone {
			return 0, fmt.Sprintf("so are %d of %d nodes at once", lost, z.of)
		}
		rate = c.SecondaryEvictionRate
	}
	if rate <= 0 {
		return 0, "" // as it was asked for
	}
	return rate, ""
}

// nobodyLeft says whether all Nodes of all zones are lost.
func (c HealthConfig) nobodyLeft(in reconcile.Input, judged bool) bool {
	for node := range in.Snapshot.Nodes().All() {
		if isNoticed, isJudged := c.missed(in, node); !isJudged && (judged || !isNoticed) {
			return false
		}
	}
	return true
}

// evictionFrom is when a Node of the zone may get its eviction taint: at once, or after
// others that wait for theirs, who was lost first before the others.
func (z zone) evictionFrom(name string, rate float64, now time.Time) time.Time {
	interval := min(time.Duration(min(float64(time.Second)/rate, float64(never))), never)
	at := now
	if !z.last.IsZero() {
		at = reconcile.Latest(at, z.last.Add(interval))
	}
	i := slices.IndexFunc(z.awaiting, func(a awaiting) bool { return a.name == name })
	for j, a := range z.awaiting {
		if i >= 0 && j != i && cmp.Or(a.since.Compare(z.awaiting[i].since), cmp.Compare(a.name, name)) < 0 {
			at = reconcile.Latest(at, at.Add(interval))
		}
	}
	return at
}

// never is longer than anybody waits.
const never = 365 * 24 * time.Hour

// isEvictionTaint says whether a taint is one of those that evict from lost Nodes.
func isEvictionTaint(t *corev1.Taint) bool {
	return t.Effect == corev1.TaintEffectNoExecute && (t.Key == corev1.TaintNodeUnreachable || t.Key == corev1.TaintNodeNotReady)
}

func hasEvictionTaint(node *corev1.Node) bool {
	for i := range node.Spec.Taints {
		if isEvictionTaint(&node.Spec.Taints[i]) {
			return true
		}
	}
	return false
}
