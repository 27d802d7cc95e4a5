package pod

import (
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// Events of one pod, as many as upstream's: some at once, then one every five minutes.
// Each is a write to the log, and what a container prints decides how many there are.
const (
	eventBurst = 25
	eventEvery = 5 * time.Minute
)

// allowance is what may be told of, and comes back with time.
type allowance struct{ full time.Time }

// told is what a worker has told of its pod.
type told struct {
	left allowance
	said map[string]string // by reason and container, the last message of what would repeat
}

// take says whether one more may be told.
func (a *allowance) take(now time.Time) bool {
	if a.full.Before(now) {
		a.full = now
	}
	if a.full.Sub(now) > (eventBurst-1)*eventEvery {
		return false
	}
	a.full = a.full.Add(eventEvery)
	return true
}

// event tells the cluster about the pod; container may be empty.
func (w *worker) event(pod *corev1.Pod, kind, reason, message, container string) {
	w.annotatedEvent(pod, kind, reason, message, container, nil)
}

func (w *worker) annotatedEvent(pod *corev1.Pod, kind, reason, message, container string, annotations map[string]string) {
	if w.orphan {
		return
	}
	w.mu.Lock()
	told := w.told.left.take(w.m.cfg.Now())
	w.mu.Unlock()
	if !told {
		return
	}
	ref := corev1.ObjectReference{
		Kind: "Pod", APIVersion: "v1", Namespace: pod.Namespace, Name: pod.Name, UID: pod.UID, ResourceVersion: pod.ResourceVersion,
	}
	if container != "" {
		field := "spec.containers"
		for i := range pod.Spec.InitContainers {
			if pod.Spec.InitContainers[i].Name == container {
				field = "spec.initContainers"
			}
		}
		for i := range pod.Spec.EphemeralContainers {
			if pod.Spec.EphemeralContainers[i].Name == container {
				field = "spec.ephemeralContainers"
			}
		}
		ref.FieldPath = field + "{" + container + "}"
	}
	now := metav1.NewTime(w.m.cfg.Now())
	w.m.cfg.Reporter.Event(&corev1.Event{
		ObjectMeta:     metav1.ObjectMeta{Namespace: pod.Namespace, Annotations: annotations},
		InvolvedObject: ref, Type: kind, Reason: reason, Message: strings.TrimSpace(begin(message, maxEventMessage)),
		Source: corev1.EventSource{Component: "timonel-agent", Host: w.m.cfg.NodeName}, ReportingController: "timonel-agent", ReportingInstance: w.m.cfg.NodeName,
		FirstTimestamp: now, LastTimestamp: now, Count: 1,
	})
}

// eventOnce is event for what would repeat: the same message is told once
// until another one of its reason.
func (w *worker) eventOnce(pod *corev1.Pod, kind, reason, message, container string) {
	key := reason + "/" + container
	w.mu.Lock()
	again := w.told.said[key] == message
	w.told.said[key] = message
	w.mu.Unlock()
	if again {
		return
	}
	w.event(pod, kind, reason, message, container)
}
