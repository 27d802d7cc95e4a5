package main

import "testing"

func TestDividePorts(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct{ descriptors, memory uint64 }{
		"few descriptors":    {256, 256 << 20},
		"a usual login":      {1024, 256 << 20},
		"little memory":      {1 << 20, 32 << 20},
		"a large machine":    {1 << 20, 2 << 30},
		"hardly descriptors": {64, 2 << 30},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			l := dividePorts(c.descriptors, c.memory)
			sum := l.api + l.cluster + l.raft
			if l.api < 16 || l.cluster < 16 || l.raft < 16 {
				t.Errorf("%+v: a port has nothing", l)
			}
			if reserve := int(c.descriptors) - sum; c.descriptors >= 256 && reserve < 128 {
				t.Errorf("%+v leaves %d of %d descriptors for the log and the disk", l, reserve, c.descriptors)
			}
			if cost := uint64(l.api) * connectionCost; l.api > 512 && cost > c.memory {
				t.Errorf("%+v: idle connections of the API take %d MiB of %d", l, cost>>20, c.memory>>20)
			}
		})
	}
}
