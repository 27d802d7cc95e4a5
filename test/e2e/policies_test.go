//go:build e2e

package e2e

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"timonel/test/harness"
)

// TestPolicies: who may reach the pods of a policy changes with labels, on both nodes; and
// the policy holds from a pod's first packet, while an agent is away, and after it comes back
// when all controllers are dead.
func TestPolicies(t *testing.T) {
	t.Parallel()
	c := harness.Up(t, harness.Options{Controllers: 1, Agents: 2})
	client := c.Client(t, "c1")
	policies := client.NetworkingV1().NetworkPolicies("default")
	_, err := policies.Create(t.Context(), &networkingv1.NetworkPolicy{
		ObjectMeta: metav1.ObjectMeta{Name: "friends"},
		Spec: networkingv1.NetworkPolicySpec{
			PodSelector: metav1.LabelSelector{MatchLabels: map[string]string{"app": "web"}},
			Ingress: []networkingv1.NetworkPolicyIngressRule{{From: []networkingv1.NetworkPolicyPeer{
				{PodSelector: &metav1.LabelSelector{MatchLabels: map[string]string{"friend": "yes"}}},
			}}},
		},
	}, metav1.CreateOptions{})
	require.NoError(t, err)
	_, err = policies.Create(t.Context(), &networkingv1.NetworkPolicy{
		ObjectMeta: metav1.ObjectMeta{Name: "shut-in"},
		Spec: networkingv1.NetworkPolicySpec{
			PodSelector: metav1.LabelSelector{MatchLabels: map[string]string{"shut": "in"}}, PolicyTypes: []networkingv1.PolicyType{networkingv1.PolicyTypeEgress},
		},
	}, metav1.CreateOptions{})
	require.NoError(t, err)
	c.Deploy(t, "web", 2, func(s *corev1.PodSpec) {
		s.TopologySpreadConstraints = []corev1.TopologySpreadConstraint{{
			MaxSkew: 1, TopologyKey: corev1.LabelHostname, WhenUnsatisfiable: corev1.DoNotSchedule,
			LabelSelector: &metav1.LabelSelector{MatchLabels: map[string]string{"app": "web"}},
		}}
	})
	servers := c.Pods(t, "web")
	require.Len(t, servers, 2)
	// What a client sees of a server is said in its log: it asks all the time.
	ask := func(ip string) string {
		return fmt.Sprintf(`timeout 2 bash -c 'exec 3<>/dev/tcp/%s/8080 && echo open' 2>/dev/null || echo shut`, ip)
	}
	var urls []string
	for _, s := range servers {
		urls = append(urls, s.Status.PodIP)
	}
	run := func(name, node string, labels map[string]string) {
		_, err := client.CoreV1().Pods("default").Create(t.Context(), &corev1.Pod{
			ObjectMeta: metav1.ObjectMeta{Name: name, Labels: labels},
			Spec: corev1.PodSpec{NodeName: node, Containers: []corev1.Container{{
				Name: "c", Image: "timonel/busybox:latest", ImagePullPolicy: corev1.PullIfNotPresent,
				Command: []string{"sh", "-c", "while true; do for u in " + strings.Join(urls, " ") + "; do echo | nc -w 2 $u 8080 >/dev/null 2>&1 && echo open || echo shut; done; sleep 1; done"},
			}}},
		}, metav1.CreateOptions{})
		require.NoError(t, err)
	}
	run("friend", "a1", map[string]string{"friend": "yes"})
	run("stranger", "a1", nil)
	run("prisoner", "a2", map[string]string{"friend": "yes", "shut": "in"})
	// says waits until a pod's last words are all the same.
	says := func(pod, want string) {
		t.Helper()
		harness.Eventually(t, time.Minute, pod+" sees "+want, func() error {
			out, err := c.Try(t.Context(), "kubectl", "logs", pod, "--tail=4")
			if err == nil && out != strings.Repeat(want+"\n", 4) {
				err = fmt.Errorf("the log ends %q", out)
			}
			return err
		})
	}
	says("friend", "open")
	says("stranger", "shut")
	says("prisoner", "shut")
	for _, pod := range []string{"stranger", "prisoner"} {
		require.NotContains(t, c.Run(t, "kubectl", "logs", pod), "open", "from the first packet")
	}
	c.Run(t, "kubectl", "label", "pod", "stranger", "friend=yes")
	says("stranger", "open")
	c.Run(t, "kubectl", "label", "pod", "stranger", "friend-")
	says("stranger", "shut")

	c.Kill(t, "a1", true)
	node := func(name, ip string) string {
		out, _ := c.Try(t.Context(), "exec", name, "--", "bash", "-c", ask(ip))
		return strings.TrimSpace(out)
	}
	// A node reaches its own pods, and is nobody's friend elsewhere.
	look := func() {
		t.Helper()
		for _, s := range servers {
			for _, n := range []string{"a1", "a2"} {
				want := map[bool]string{true: "open", false: "shut"}[s.Spec.NodeName == n]
				require.Equal(t, want, node(n, s.Status.PodIP), "%s to the pod on %s", n, s.Spec.NodeName)
			}
		}
	}
	look()
	c.Start(t, "a1")
	c.WaitNode(t, "a1", true, time.Minute)
	look()
	says("stranger", "shut")
	says("friend", "open")

	waitKept(t, c, "a2", "shut-in")
	c.Kill(t, "c1", false)
	c.Kill(t, "a2", true)
	require.NoError(t, c.Spec.Start(t.Context(), "a2")) // it cannot become Ready
	look()
}
