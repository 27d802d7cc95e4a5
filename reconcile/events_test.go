package reconcile

import (
	"bytes"
	"log/slog"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	testclock "k8s.io/utils/clock/testing"
)

// TestDroppedEventsAreCounted checks that a flood of events does not become one of
// messages: it is said once in a while how many were dropped.
func TestDroppedEventsAreCounted(t *testing.T) {
	t.Parallel()
	var out bytes.Buffer
	clk := testclock.NewFakePassiveClock(time.Date(2026, 11, 28, 0, 0, 0, 0, time.UTC))
	r := newRecorder(nil, "c1", clk, slog.New(slog.NewTextHandler(&out, nil)))
	e := Event{Object: corev1.ObjectReference{Kind: "Pod", Namespace: "shop", Name: "p"}, Type: corev1.EventTypeNormal, Reason: "Scheduled", Message: "m"}
	for range eventBacklog + 100 {
		r.record("test", e)
	}
	if n := strings.Count(out.String(), "events dropped"); n != 1 {
		t.Fatalf("said %d times that events were dropped, want once:\n%s", n, &out)
	}
	clk.SetTime(clk.Now().Add(saysDropped))
	out.Reset()
	r.record("test", e)
	if !strings.Contains(out.String(), "dropped=100 ") {
		t.Errorf("said %q, want the 99 that were not said and this one", &out)
	}
}
