package agent

import (
	"context"
	"time"

	"timonel/agent/kubelet"
	"timonel/agent/metering"
)

// meterEvery is how often it is measured what the node takes, as metrics-server does.
const meterEvery = 15 * time.Second

// meter tells the controllers what the node and its containers take, until ctx ends.
func (a *Agent) meter(ctx context.Context) error {
	ticker := time.NewTicker(meterEvery)
	defer ticker.Stop()
	var last metering.Sample
	said := 0
	for {
		now, err := a.sample(ctx)
		if err == nil {
			if u := metering.Between(last, now); u != nil {
				raw, left, encodeErr := metering.Encode(u)
				if err = encodeErr; err == nil {
					a.stream.SetUsage(raw)
				}
				if left != said {
					said = left
					a.log.Warn("pods have no metrics: what the controllers are told has a bound", "pods", left)
				}
			}
			last = now
		}
		if err != nil && ctx.Err() == nil {
			a.log.Warn("measure what the node takes", "error", err)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-ticker.C:
		}
	}
}

func (a *Agent) sample(ctx context.Context) (metering.Sample, error) {
	s := metering.Sample{}
	node := kubelet.NodeStats(a.cfg.Name)
	if node.CPU != nil && node.CPU.UsageCoreNanoSeconds != nil {
		s.CPU = time.Duration(*node.CPU.UsageCoreNanoSeconds)
	}
	if node.Memory != nil && node.Memory.WorkingSetBytes != nil {
		s.Memory = *node.Memory.WorkingSetBytes
	}
	var err error
	s.Containers, err = a.pods.Counters(ctx)
	s.At = time.Now()
	return s, err
}
