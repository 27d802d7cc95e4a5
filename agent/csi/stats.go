package csi

import (
	"context"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"k8s.io/apimachinery/pkg/types"
)

const (
	// statsEvery is how old figures of a volume's usage may be, as the kubelet's
	// (volumeStatsAggPeriod).
	statsEvery = time.Minute
	// maxUsages bounds how many figures of one volume are read.
	maxUsages = 16
)

// Usage is how much of a volume is used, in bytes and inodes; negative: the driver does not
// say.
type Usage struct {
	Time                                time.Time
	Capacity, Available, Used           int64
	Inodes, InodesAvailable, InodesUsed int64
}

// measured is what is known of a volume's usage.
type measured struct {
	usage Usage
	known bool
	asked time.Time // zero: never
	busy  bool
}

// Stats is how much of a pod's volume is used, as its driver last said. It does not wait:
// what is older than a minute is asked for again, beside. known is false of what no driver
// has measured.
func (m *Manager) Stats(uid types.UID, name string) (usage Usage, known bool) {
	u := user{uid, name}
	m.mu.Lock()
	defer m.mu.Unlock()
	v := m.volumes[m.byUser[u]]
	if v == nil {
		return Usage{}, false
	}
	e, d, now := v.uses[u], m.drivers[v.Driver], m.cfg.Now()
	if v.stats == nil {
		v.stats = map[user]*measured{}
	}
	s := v.stats[u]
	if s == nil {
		s = &measured{}
		v.stats[u] = s
	}
	due := s.asked.IsZero() || !now.Before(s.asked.Add(statsEvery))
	if !due || s.busy || m.ctx == nil || m.ctx.Err() != nil || e.rec == nil || !e.rec.Done || d == nil || !d.ready || !d.can.stats {
		return s.usage, s.known
	}
	s.busy, s.asked = true, now
	req := &csi.NodeGetVolumeStatsRequest{VolumeId: v.Handle, VolumePath: m.seen(e.rec.Path)}
	if v.staged != nil {
		req.StagingTargetPath = m.seen(v.staged.Path)
	}
	m.wg.Go(func() {
		ctx, cancel := context.WithTimeout(m.ctx, callTimeout)
		defer cancel()
		resp, err := d.client().NodeGetVolumeStats(ctx, req)
		m.mu.Lock()
		defer m.mu.Unlock()
		s.busy = false
		if err != nil {
			m.log.Debug("usage of a volume", "driver", d.name, "volume", req.VolumeId, "error", err)
			return
		}
		s.usage, s.known = usageOf(resp, m.cfg.Now()), true
	})
	return s.usage, s.known
}

// usageOf is what a driver says of a volume. What is negative it does not know, as
// upstream takes it.
func usageOf(resp *csi.NodeGetVolumeStatsResponse, now time.Time) Usage {
	u := Usage{Time: now, Capacity: -1, Available: -1, Used: -1, Inodes: -1, InodesAvailable: -1, InodesUsed: -1}
	for i, s := range resp.GetUsage() {
		if i >= maxUsages {
			break
		}
		switch s.GetUnit() {
		case csi.VolumeUsage_BYTES:
			u.Capacity, u.Available, u.Used = s.GetTotal(), s.GetAvailable(), s.GetUsed()
		case csi.VolumeUsage_INODES:
			u.Inodes, u.InodesAvailable, u.InodesUsed = s.GetTotal(), s.GetAvailable(), s.GetUsed()
		}
	}
	return u
}
