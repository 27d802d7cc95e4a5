package reconcile

import (
	"cmp"
	"context"
	"fmt"
	"log/slog"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/tools/record"
	"k8s.io/utils/clock"
)

var EventsResource = corev1.SchemeGroupVersion.WithResource("events")

// eventBacklog is how many events wait to be written before more are dropped.
const eventBacklog = 4096

// recorder writes events in the background: like ones are counted in one
// object, and a flood about one object is cut off, as Kubernetes does it.
type recorder struct {
	writer     Writer
	correlator *record.EventCorrelator
	host       string
	now        func() time.Time
	backlog    chan *corev1.Event
	log        *slog.Logger

	// mu guards how many events were dropped since that was last said, and when it was.
	mu      sync.Mutex
	dropped int
	said    time.Time
}

// saysDropped is how often it is said that events are dropped: it is when there is too
// much to do that many are.
const saysDropped = 10 * time.Second

func newRecorder(w Writer, host string, clk clock.PassiveClock, log *slog.Logger) *recorder {
	return &recorder{
		writer: w, host: host, now: clk.Now, log: log,
		correlator: record.NewEventCorrelatorWithOptions(record.CorrelatorOptions{Clock: clk}),
		backlog:    make(chan *corev1.Event, eventBacklog),
	}
}

// record queues an event. It never blocks: events are for people, and are the
// first to go when there is too much to do.
func (r *recorder) record(component string, e Event) {
	now := metav1.NewTime(r.now())
	component = cmp.Or(e.Component, component)
	namespace := e.Object.Namespace
	if namespace == "" {
		namespace = metav1.NamespaceDefault
	}
	ev := &corev1.Event{
		ObjectMeta: metav1.ObjectMeta{
			Name:      fmt.Sprintf("%s.%x", e.Object.Name, now.UnixNano()),
			Namespace: namespace,
		},
		InvolvedObject: e.Object,
		Reason:         e.Reason, Message: e.Message, Type: e.Type,
		FirstTimestamp: now, LastTimestamp: now, Count: 1,
		Source:              corev1.EventSource{Component: component, Host: r.host},
		ReportingController: component, ReportingInstance: r.host,
	}
	select {
	case r.backlog <- ev:
	default:
		r.drop(e)
	}
}

// drop notes that an event is not written, and says so now and then.
func (r *recorder) drop(e Event) {
	now := r.now()
	r.mu.Lock()
	r.dropped++
	n, say := r.dropped, now.Sub(r.said) >= saysDropped
	if say {
		r.dropped, r.said = 0, now
	}
	r.mu.Unlock()
	if say {
		r.log.Warn("events dropped: too many wait to be written", "dropped", n, "last", e.Object.Kind+" "+e.Object.Name, "reason", e.Reason)
	}
}

// run writes events until ctx ends.
func (r *recorder) run(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			return
		case ev := <-r.backlog:
			r.write(ctx, ev)
		}
	}
}

func (r *recorder) write(ctx context.Context, ev *corev1.Event) {
	result, err := r.correlator.EventCorrelate(ev)
	if err != nil || result.Skip {
		return
	}
	ev = result.Event
	c := Create(EventsResource, ev)
	if ev.Count > 1 {
		c = Request{Verb: VerbPatch, Resource: EventsResource, Namespace: ev.Namespace, Name: ev.Name, PatchType: types.StrategicMergePatchType, Patch: result.Patch}
	}
	err = r.writer.Write(ctx, c)
	if c.Verb == VerbPatch && apierrors.IsNotFound(err) { // the counted event has expired
		ev.ResourceVersion = ""
		err = r.writer.Write(ctx, Create(EventsResource, ev))
	}
	switch {
	case err == nil:
		r.correlator.UpdateState(ev)
	case ctx.Err() == nil && !apierrors.HasStatusCause(err, corev1.NamespaceTerminatingCause):
		r.log.Debug("event not written", "object", ev.InvolvedObject.Kind+" "+ev.InvolvedObject.Name, "reason", ev.Reason, "err", err)
	}
}
