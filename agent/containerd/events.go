package containerd

import (
	"context"
	"log/slog"
	"time"

	apievents "github.com/containerd/containerd/api/events"
	"github.com/containerd/typeurl/v2"
)

// EventType is what happened to a container's or sandbox's task.
type EventType int

const (
	// TaskStarted: the first process runs.
	TaskStarted EventType = iota + 1
	// TaskExited: the first process has ended. CRI learns of it from the same
	// event, so its own answer may follow some milliseconds later.
	TaskExited
	// TaskOOM: the kernel killed a process for want of memory.
	TaskOOM
	// Resubscribed: events may have been missed; look at everything again.
	Resubscribed
	// ImageCreated: an image has a new name; ID is that name.
	ImageCreated
)

// Event is one thing that containerd said. ID is a container's or sandbox's.
type Event struct {
	Type EventType
	ID   string
}

// Run hands events to handle, one at a time, until ctx ends. It subscribes
// again whenever containerd went away, and then says Resubscribed.
func (r *Runtime) Run(ctx context.Context, handle func(Event)) error {
	for ctx.Err() == nil {
		r.subscribe(ctx, handle)
		select {
		case <-ctx.Done():
		case <-time.After(100 * time.Millisecond):
		}
	}
	return nil
}

// subscribe reads one subscription to its end.
func (r *Runtime) subscribe(ctx context.Context, handle func(Event)) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	if _, err := r.waitVersion(ctx); err != nil {
		return
	}
	ch, errs := r.client.Subscribe(ctx, `namespace==`+Namespace+`,topic~="^/tasks/(start|exit|oom)$"`,
		`namespace==`+Namespace+`,topic~="^/images/"`)
	handle(Event{Type: Resubscribed})
	for {
		select {
		case env := <-ch:
			if env == nil || env.Event == nil {
				continue
			}
			v, err := typeurl.UnmarshalAny(env.Event)
			if err != nil {
				slog.Warn("cannot read a containerd event", "topic", env.Topic, "error", err)
				continue
			}
			switch e := v.(type) {
			case *apievents.TaskStart:
				handle(Event{Type: TaskStarted, ID: e.ContainerID})
			case *apievents.TaskExit:
				if e.ID == e.ContainerID { // not an exec's
					handle(Event{Type: TaskExited, ID: e.ContainerID})
				}
			case *apievents.TaskOOM:
				handle(Event{Type: TaskOOM, ID: e.ContainerID})
			case *apievents.ImageCreate:
				handle(Event{Type: ImageCreated, ID: e.Name})
			case *apievents.ImageUpdate:
				handle(Event{Type: ImageCreated, ID: e.Name})
			}
		case err := <-errs:
			if ctx.Err() == nil {
				slog.Warn("containerd's event stream ended; subscribing again", "error", err)
			}
			return
		}
	}
}
