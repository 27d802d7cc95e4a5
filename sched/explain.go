package sched

import "fmt"

// Verdict is what one node says to one pod.
type Verdict struct {
	Node string
	// Reasons say why the pod cannot run there; none: it can.
	Reasons []string
	// Score is the weighted sum by which feasible nodes are compared. It is 0
	// when the node is the only feasible one, for then nothing is compared.
	Score int64
	// Scores are the weighted parts of Score, by the names of [Weights]; those
	// that are equal for all nodes are left out.
	Scores map[string]int64
}

// Explain returns what every node says to a pending pod as things are, other
// pending pods that hold no nominated node left aside, in the order nodes are
// tried. An error says why no node was asked.
func Explain(c Config, in Input, namespace, name string) ([]Verdict, error) {
	cfg, err := c.compile()
	if err != nil {
		return nil, err
	}
	if err := in.complete(); err != nil {
		return nil, err
	}
	p, ok := in.Cluster.pods.Get(podKey(namespace, name))
	if !ok {
		return nil, fmt.Errorf("pod %s/%s does not exist or is finished", namespace, name)
	}
	if p.pod.Spec.NodeName != "" {
		return nil, fmt.Errorf("pod %s/%s is on node %s already", namespace, name, p.pod.Spec.NodeName)
	}
	if cfg.of(p.pod) == nil {
		return nil, fmt.Errorf("pod %s/%s names scheduler %q, which is none of the profiles", namespace, name, p.pod.Spec.SchedulerName)
	}
	r := newRound(cfg, in)
	cand, rejected := r.prepare(p)
	if rejected != nil {
		if rejected.err != nil {
			return nil, rejected.err
		}
		return nil, fmt.Errorf("no node fits: %s", rejected.text())
	}
	verdicts := make([]Verdict, 0, len(in.Cluster.order))
	var feasible []int32
	var at []int
	for _, slot := range in.Cluster.order {
		n := r.nodes[slot]
		v := Verdict{Node: n.name}
		switch s := r.filter(cand, n); {
		case s == nil:
			feasible = append(feasible, slot)
			at = append(at, len(verdicts))
		case s.err != nil:
			return nil, fmt.Errorf("node %s: %w", n.name, s.err)
		default:
			v.Reasons = s.reasons
		}
		verdicts = append(verdicts, v)
	}
	if len(feasible) > 1 {
		for i := range feasible {
			verdicts[at[i]].Scores = map[string]int64{}
		}
		r.eachScore(cand, feasible, func(name string, weight int64, scores []int64) {
			for i := range feasible {
				verdicts[at[i]].Scores[name] = weight * scores[i]
				verdicts[at[i]].Score += weight * scores[i]
			}
		})
	}
	return verdicts, nil
}
