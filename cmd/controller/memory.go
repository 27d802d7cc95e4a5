package main

import (
	"fmt"
	"math"

	"github.com/KimMachineGun/automemlimit/memlimit"
	"k8s.io/apimachinery/pkg/api/resource"
)

// shares is what a controller's memory is divided into, in bytes. This is the one place
// that says so; each part keeps its own bound. docs/memory.md explains the table.
type shares struct {
	// memory is all there is. The Go runtime is told to collect harder near nine tenths.
	memory int64
	// state bounds keys and values. Decoded beside, for the scheduler and the
	// reconcilers, they take up to four times that.
	state int64
	// history bounds what was replaced or deleted and is kept for watches and lists.
	history int64
	// objects bounds the API server's decoded objects, by the size of their encodings:
	// in memory they are four times as large.
	objects int64
	// logCache bounds the log's newest entries, kept for followers that lack them, and
	// queue what a leader has appended and not on disk.
	logCache, queue int64
	// proposals bounds the writes on their way to a leader, a fifth of each controller's
	// clients.
	proposals int64
	// watches bounds what waits for clients that watch and do not read.
	watches int64
	// bodies bounds what bodies of requests take, and the objects that are in them.
	bodies int64
	// answers bounds what the API's answers take, and the objects that are read for them.
	answers int64
	// reports bounds what agents said and is not written yet, all agents together.
	reports int64
	// usage bounds what agents said that their nodes take.
	usage int64
	// tunnels bounds what is on its way between clients and nodes: logs, exec, attach,
	// port-forward.
	tunnels int64
	// network bounds what every node is told of Services, their endpoints and other nodes.
	network int64
	// connections bounds what the connections of strangers take: see dividePorts.
	connections int64
}

const (
	// leastMemory is what a controller without any load needs, and some.
	leastMemory = 256 << 20
	// leastStateLimit is what a cluster needs for itself many times over.
	leastStateLimit = 16 << 20
)

// memoryShares divides the memory. The error names the flag that is wrong.
func (c *config) memoryShares() (shares, error) {
	memory, err := memlimit.FromSystem()
	if err != nil {
		memory = 2 << 30 // the kernel does not say
	}
	if limit, err := memlimit.FromCgroup(); err == nil {
		memory = min(memory, limit)
	}
	s := shares{memory: int64(min(memory, math.MaxInt64))}
	if c.memory != "" {
		if s.memory, err = quantity("memory", c.memory, leastMemory); err != nil {
			return s, err
		}
	}
	s.state = max(s.memory/8, 64<<20)
	s.history = min(max(s.memory/32, 64<<20), 1<<30)
	s.objects = max(s.memory/64, 16<<20)
	s.logCache = min(max(s.memory/128, 16<<20), 128<<20)
	s.queue = min(max(s.memory/64, 32<<20), 256<<20)
	s.watches = min(max(s.memory/128, 16<<20), 256<<20)
	s.bodies = min(max(s.memory/8, 96<<20), 4<<30)
	s.answers = min(max(s.memory/8, 96<<20), 4<<30)
	s.proposals = min(max(s.memory/128, 40<<20), 160<<20)
	s.reports = min(max(s.memory/128, 16<<20), 256<<20)
	s.usage = min(max(s.memory/64, 16<<20), 256<<20)
	s.tunnels = min(max(s.memory/32, 64<<20), 1<<30)
	s.network = min(max(s.memory/32, 32<<20), 256<<20)
	s.connections = max(s.memory/32, 24<<20)
	if c.stateLimit != "" {
		if s.state, err = quantity("state-limit", c.stateLimit, leastStateLimit); err != nil {
			return s, err
		}
		if s.state > s.memory {
			return s, fmt.Errorf("--state-limit: %s is more than the memory, %d MiB", c.stateLimit, s.memory>>20)
		}
	}
	return s, nil
}

// quantity reads a flag that is an amount of memory.
func quantity(flag, value string, least int64) (int64, error) {
	q, err := resource.ParseQuantity(value)
	if err != nil {
		return 0, fmt.Errorf("--%s: %q is not an amount of memory such as 2Gi or 512Mi", flag, value)
	}
	if q.Value() < least {
		return 0, fmt.Errorf("--%s: %s is under the least, %d MiB", flag, value, least>>20)
	}
	return q.Value(), nil
}
