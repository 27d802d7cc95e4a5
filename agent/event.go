package agent

import (
	"cmp"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// event tells the cluster something about an object; of one without a namespace, in the
// default one.
func (a *Agent) event(about corev1.ObjectReference, eventType, reason, message string) {
	now := metav1.Now()
	a.stream.Event(&corev1.Event{
		ObjectMeta:     metav1.ObjectMeta{Namespace: cmp.Or(about.Namespace, metav1.NamespaceDefault)},
		InvolvedObject: about, Type: eventType, Reason: reason, Message: message, FirstTimestamp: now, LastTimestamp: now, Count: 1,
		Source: corev1.EventSource{Component: "timonel-agent", Host: a.cfg.Name}, ReportingController: "timonel-agent", ReportingInstance: a.cfg.Name,
	})
}
