//go:build e2e

package e2e

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	autoscalingv2 "k8s.io/api/autoscaling/v2"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"timonel/test/harness"
)

// TestMetrics: kubectl top shows what nodes and pods take by any controller, and a
// Deployment under load is made larger, with nothing added to the cluster; of a node that
// is dead nothing is shown.
func TestMetrics(t *testing.T) {
	t.Parallel()
	c := harness.Up(t, harness.Options{Controllers: 3, Agents: 2})
	client := c.Client(t, "c1")
	limit := corev1.ResourceList{corev1.ResourceCPU: resource.MustParse("50m"), corev1.ResourceMemory: resource.MustParse("32Mi")}
	c.Deploy(t, "busy", 1, func(s *corev1.PodSpec) {
		s.Containers[0].Image, s.Containers[0].ReadinessProbe, s.Containers[0].LivenessProbe = "timonel/busybox", nil, nil
		s.Containers[0].Command = []string{"sh", "-c", "while :; do :; done"}
		s.Containers[0].Resources = corev1.ResourceRequirements{Requests: limit, Limits: limit}
		s.TerminationGracePeriodSeconds = new(int64(0))
	})
	percent := int32(50)
	_, err := client.AutoscalingV2().HorizontalPodAutoscalers("default").Create(t.Context(), &autoscalingv2.HorizontalPodAutoscaler{
		ObjectMeta: metav1.ObjectMeta{Name: "busy"},
		Spec: autoscalingv2.HorizontalPodAutoscalerSpec{
			ScaleTargetRef: autoscalingv2.CrossVersionObjectReference{APIVersion: "apps/v1", Kind: "Deployment", Name: "busy"},
			MaxReplicas:    3,
			Metrics: []autoscalingv2.MetricSpec{{Type: autoscalingv2.ResourceMetricSourceType, Resource: &autoscalingv2.ResourceMetricSource{
				Name: corev1.ResourceCPU, Target: autoscalingv2.MetricTarget{Type: autoscalingv2.UtilizationMetricType, AverageUtilization: &percent},
			}}},
		},
	}, metav1.CreateOptions{})
	require.NoError(t, err)

	top := func(what string, want ...string) {
		t.Helper()
		harness.Eventually(t, 90*time.Second, "kubectl top "+what, func() error {
			text, err := c.Try(t.Context(), "kubectl", "top", what, "--no-headers")
			if err != nil {
				return err
			}
			for _, name := range want {
				if !strings.Contains(text, name) {
					return fmt.Errorf("%q is not in %q", name, text)
				}
			}
			return nil
		})
	}
	nodes := func(on string) (string, error) {
		raw, err := c.Client(t, on).RESTClient().Get().AbsPath("/apis/metrics.k8s.io/v1beta1/nodes").SetHeader("Accept", "application/json").DoRaw(t.Context())
		return string(raw), err
	}
	top("nodes", "a1", "a2")
	top("pods", "busy-")
	for _, name := range []string{"c1", "c2", "c3"} {
		text, err := nodes(name)
		require.NoError(t, err)
		require.Contains(t, text, `"name":"a1"`, "by %s", name)
		require.Contains(t, text, `"name":"a2"`, "by %s", name)
	}
	harness.Eventually(t, 3*time.Minute, "the Deployment to be made larger", func() error {
		d, err := client.AppsV1().Deployments("default").Get(t.Context(), "busy", metav1.GetOptions{})
		if err != nil {
			return err
		}
		if d.Status.ReadyReplicas < 2 {
			h, err := client.AutoscalingV2().HorizontalPodAutoscalers("default").Get(context.WithoutCancel(t.Context()), "busy", metav1.GetOptions{})
			return fmt.Errorf("%d replicas are ready; the autoscaler says %+v (%v)", d.Status.ReadyReplicas, h.Status.Conditions, err)
		}
		return nil
	})

	c.Kill(t, "a2", false)
	harness.Eventually(t, 30*time.Second, "nothing to be shown of a2", func() error {
		text, err := nodes("c1")
		if err != nil {
			return err
		}
		if strings.Contains(text, `"name":"a2"`) || !strings.Contains(text, `"name":"a1"`) {
			return fmt.Errorf("%s", text)
		}
		return nil
	})
}
