package main

import (
	"context"
	"fmt"
	"net"
	"time"

	"golang.org/x/sys/unix"

	"timonel/internal/ports"
)

const (
	// connectionCost is about what an idle connection of TLS and HTTP/2 takes in memory.
	connectionCost = 48 << 10
	// acceptPatience is for how long a port may fail to accept connections before this
	// controller says that it is not ready and gives leadership away.
	acceptPatience = time.Second
)

// portLimits says how many connections each port may have: a share of the
// descriptors, of which a part is kept for the log, the disk and what this
// controller opens itself, and no more than the memory is for.
type portLimits struct{ api, cluster, raft int }

// dividePorts divides what is allowed to a process with so many descriptors and so
// many bytes of memory for connections.
func dividePorts(descriptors, memory uint64) portLimits {
	reserve := max(128, descriptors/8)
	free := int(max(descriptors, reserve+64) - reserve)
	afford := int(max(memory/connectionCost, 512))
	raft := min(256, max(16, free/16))
	return portLimits{
		api:     max(16, min(free*5/8, afford)),
		cluster: max(16, min(free/4, afford)),
		raft:    raft,
	}
}

func limitsOfPorts(memory int64) portLimits {
	var files unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &files); err != nil {
		files.Cur = 1024
	}
	return dividePorts(files.Cur, uint64(memory))
}

// listen opens a port within limits, which have the name of its flag.
func (k *controller) listen(port int, limits ports.Limits) (*ports.Listener, error) {
	inner, err := net.Listen("tcp", k.address(port))
	if err != nil {
		return nil, portError(limits.Name, err)
	}
	l := ports.Limit(inner, limits)
	k.listeners = append(k.listeners, l)
	return l, nil
}

// acceptErr says which port accepts no connections, for how long and why; nil if all do.
func (k *controller) acceptErr() error {
	for _, l := range k.listeners {
		if since, err := l.Failing(); err != nil && time.Since(since) > acceptPatience {
			return fmt.Errorf("--%s takes no connections since %s (%w): raise the limit of open files (LimitNOFILE), or find who opens so many", l.Name(), since.Format(time.TimeOnly), err)
		}
	}
	return nil
}

// watchPorts gives leadership away while this controller cannot take connections: a
// leader that nobody reaches is worse than none.
func (k *controller) watchPorts(ctx context.Context) error {
	var told error
	for pause(ctx, acceptPatience/2) {
		err := k.acceptErr()
		if err != nil && told == nil {
			k.log.Error("connections cannot be accepted", "error", err)
		}
		if told = err; err != nil {
			k.stepDown()
		}
	}
	return ctx.Err()
}
