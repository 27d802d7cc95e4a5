package eviction

import (
	"maps"
	"time"

	corev1 "k8s.io/api/core/v1"
)

// Observation is how much of something there is, and how much is left.
type Observation struct{ Available, Capacity int64 }

// Observations are what was seen of a node at one moment. What could not be seen
// is not there.
type Observations map[Signal]Observation

// short says whether too little is left; reclaiming, whether it is so still while
// more is being freed.
func (t Threshold) short(o Observation, reclaiming bool) bool {
	least := t.Value.of(o.Capacity)
	if reclaiming && t.MinReclaim != nil {
		least.Add(*t.MinReclaim.of(o.Capacity))
	}
	return least.CmpInt64(o.Available) > 0
}

// short are the thresholds that are met.
func short(thresholds []Threshold, seen Observations, reclaiming func(Signal) bool) []Threshold {
	var out []Threshold
	for _, t := range thresholds {
		if o, ok := seen[t.Signal]; ok && t.short(o, reclaiming(t.Signal)) {
			out = append(out, t)
		}
	}
	return out
}

// Pressure is what a node remembers from one look to the next. The zero value is
// that of a node that has not looked yet.
type Pressure struct {
	met      map[Signal]bool // and not over
	observed map[corev1.NodeConditionType]time.Time
}

// Decision is what follows from a look.
type Decision struct {
	// Conditions are those that the Node has.
	Conditions []corev1.NodeConditionType
	// Short are the thresholds that are met, the one to do something about first.
	Short []Threshold
}

// conditionOrder is the order in which conditions are named.
var conditionOrder = []corev1.NodeConditionType{corev1.NodeMemoryPressure, corev1.NodeDiskPressure, corev1.NodePIDPressure}

// Next is what a node remembers and does after it saw something. Thresholds are in
// the order of signals ([ParseHard]). A condition stays for transition after it
// was seen last, so that it does not come and go with each pod.
func (p Pressure) Next(thresholds []Threshold, seen Observations, transition time.Duration, now time.Time) (Pressure, Decision) {
	var d Decision
	d.Short = short(thresholds, seen, func(s Signal) bool { return p.met[s] })
	next := Pressure{met: map[Signal]bool{}, observed: map[corev1.NodeConditionType]time.Time{}}
	maps.Copy(next.observed, p.observed)
	for _, t := range d.Short {
		next.met[t.Signal] = true
		next.observed[t.Signal.condition()] = now
	}
	for _, c := range conditionOrder {
		at, ok := next.observed[c]
		switch {
		case !ok:
		case at.Equal(now) || now.Sub(at) < transition:
			d.Conditions = append(d.Conditions, c)
		default:
			delete(next.observed, c)
		}
	}
	return next, d
}

// Relieved says whether, after something was freed, nothing is short any more.
func Relieved(thresholds []Threshold, seen Observations) bool {
	return len(short(thresholds, seen, func(Signal) bool { return true })) == 0
}
