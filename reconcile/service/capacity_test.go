package service_test

import (
	"fmt"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"

	"timonel/reconcile/service"
	"timonel/reconcile/storytest"
)

// Endpoints hold 1,000 addresses, those of ready pods first and of each subset its
// share, say that there are more, and are written again only when there is a reason.
func TestEndpointsCapacity(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		ready, notReady         int
		wantReady, wantNotReady int
	}{
		"at the limit":      {600, 400, 600, 400},
		"too many together": {700, 400, 700, 300},
		"too many ready":    {1100, 100, 1000, 0},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := storytest.NewWorld(t)
			app := map[string]string{"app": "web"}
			w.Add(&corev1.Service{
				ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: "web"},
				Spec: corev1.ServiceSpec{
					ClusterIP: "10.96.0.7", Selector: app, IPFamilies: []corev1.IPFamily{corev1.IPv4Protocol},
					Ports: []corev1.ServicePort{{Name: "http", Port: 80, Protocol: corev1.ProtocolTCP, TargetPort: intstr.FromString("www")}},
				},
			})
			for i := range c.ready + c.notReady {
				status := corev1.ConditionTrue
				if i >= c.ready {
					status = corev1.ConditionFalse
				}
				w.Add(&corev1.Pod{
					ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: fmt.Sprintf("p%d", i), Labels: app},
					Spec: corev1.PodSpec{NodeName: "a1", Containers: []corev1.Container{{
						Name: "c", Ports: []corev1.ContainerPort{{Name: "www", Protocol: corev1.ProtocolTCP, ContainerPort: int32(8080 + i%2)}},
					}}},
					Status: corev1.PodStatus{
						Phase: corev1.PodRunning, PodIPs: []corev1.PodIP{{IP: fmt.Sprintf("10.244.%d.%d", i/250, i%250+1)}},
						Conditions: []corev1.PodCondition{{Type: corev1.PodReady, Status: status}},
					},
				})
			}
			s := storytest.New(w, service.Endpoints{})
			s.Start()
			s.Run(10)
			ep, ok := w.Snapshot().Endpoints().Get("default", "web")
			if !ok {
				t.Fatal("no endpoints")
			}
			ready, notReady := 0, 0
			for _, subset := range ep.Subsets {
				ready += len(subset.Addresses)
				notReady += len(subset.NotReadyAddresses)
				if n := len(subset.Addresses); c.wantReady == 1000 && n != 500 {
					t.Errorf("a subset with half of the pods has %d ready addresses, not 500", n)
				}
				if len(subset.Addresses)+len(subset.NotReadyAddresses) == 0 {
					t.Errorf("a subset without addresses, which the API refuses: %v", subset)
				}
			}
			if ready != c.wantReady || notReady != c.wantNotReady {
				t.Errorf("%d ready and %d other addresses, want %d and %d", ready, notReady, c.wantReady, c.wantNotReady)
			}
			truncated := ep.Annotations[corev1.EndpointsOverCapacity]
			if more := c.ready+c.notReady > 1000; more != (truncated == "truncated") {
				t.Errorf("the annotation says %q", truncated)
			}
			s.Start()
			if again := s.Run(10); again != "nothing\n" {
				t.Errorf("written again:\n%s", again)
			}
			// Without the pods that are too many the annotation goes.
			for i := range c.ready + c.notReady - 1000 {
				w.EndPod("default", fmt.Sprintf("p%d", i))
			}
			s.Run(10)
			if ep, _ = w.Snapshot().Endpoints().Get("default", "web"); ep.Annotations[corev1.EndpointsOverCapacity] != "" {
				t.Errorf("with 1,000 pods left the annotations are %v", ep.Annotations)
			}
		})
	}
}
