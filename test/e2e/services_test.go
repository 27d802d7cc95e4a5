//go:build e2e

package e2e

import (
	"bytes"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"

	"timonel/test/harness"
)

// TestServices: a Service of pods on two nodes is reached from nodes by its address and
// from outside by its port on each node; while an agent is away and comes back, when a
// pod goes, and when all controllers are dead.
func TestServices(t *testing.T) {
	t.Parallel()
	c := harness.Up(t, harness.Options{Controllers: 1, Agents: 2})
	client := c.Client(t, "c1")
	c.Deploy(t, "web", 2, func(s *corev1.PodSpec) {
		s.TopologySpreadConstraints = []corev1.TopologySpreadConstraint{{
			MaxSkew: 1, TopologyKey: corev1.LabelHostname, WhenUnsatisfiable: corev1.DoNotSchedule,
			LabelSelector: &metav1.LabelSelector{MatchLabels: map[string]string{"app": "web"}},
		}}
	})
	service, err := client.CoreV1().Services("default").Create(t.Context(), &corev1.Service{
		ObjectMeta: metav1.ObjectMeta{Name: "web"},
		Spec: corev1.ServiceSpec{
			Type: corev1.ServiceTypeNodePort, Selector: map[string]string{"app": "web"},
			Ports: []corev1.ServicePort{{Port: 80, TargetPort: intstr.FromInt32(8080)}},
		},
	}, metav1.CreateOptions{})
	require.NoError(t, err)

	// Connections of their own, so that each is balanced anew.
	outside := &http.Client{Timeout: 3 * time.Second, Transport: &http.Transport{DisableKeepAlives: true}}
	fromOutside := func(node string) (string, error) {
		answer, err := outside.Get(fmt.Sprintf("http://%s:%d/", c.Spec.Address(node), service.Spec.Ports[0].NodePort))
		if err != nil {
			return "", err
		}
		defer answer.Body.Close()
		text, err := io.ReadAll(io.LimitReader(answer.Body, 4096))
		return string(text), err
	}
	fromNode := func(node string) (string, error) {
		return c.Try(t.Context(), "exec", node, "--", "timeout", "3", "bash", "-c",
			`exec 3<>/dev/tcp/`+service.Spec.ClusterIP+`/80; printf 'GET / HTTP/1.0\r\n\r\n' >&3; cat <&3`)
	}
	// served waits until each of the pods has answered by the way.
	served := func(what string, ask func(node string) (string, error), pods ...string) {
		t.Helper()
		for _, node := range []string{"a1", "a2"} {
			missing := map[string]bool{}
			for _, p := range pods {
				missing[p] = true
			}
			harness.Eventually(t, 30*time.Second, what+" by "+node, func() error {
				text, err := ask(node)
				if err != nil {
					return err
				}
				for p := range missing {
					if strings.Contains(text, p) {
						delete(missing, p)
					}
				}
				if len(missing) > 0 {
					return fmt.Errorf("%v have not answered, but %.80q", missing, text)
				}
				return nil
			})
		}
	}
	pods := func() (names []string) {
		list, err := client.CoreV1().Pods("default").List(t.Context(), metav1.ListOptions{LabelSelector: "app=web"})
		require.NoError(t, err)
		for _, p := range list.Items {
			if p.DeletionTimestamp == nil {
				names = append(names, p.Name)
			}
		}
		return names
	}
	first := pods()
	require.Len(t, first, 2)
	served("the Service from outside", fromOutside, first...)
	served("the Service from nodes", fromNode, first...)

	c.Kill(t, "a1", true)
	for range 20 { // what is in the kernel stays
		for _, ask := range []func(string) (string, error){fromOutside, fromNode} {
			text, err := ask("a1")
			require.NoError(t, err, "while the agent is away: %s", text)
		}
	}
	c.Start(t, "a1")
	c.WaitNode(t, "a1", true, time.Minute)

	require.NoError(t, client.CoreV1().Pods("default").Delete(t.Context(), first[0], metav1.DeleteOptions{}))
	c.WaitAvailable(t, "web", 2, time.Minute)
	second := pods()
	require.Len(t, second, 2)
	require.NotContains(t, second, first[0])
	served("the new pod from outside", fromOutside, second...)
	served("the new pod from nodes", fromNode, second...)

	// What an agent knows is on its disk about a second later, in the order of changes.
	_, err = client.CoreV1().Services("default").Create(t.Context(), &corev1.Service{
		ObjectMeta: metav1.ObjectMeta{Name: "newest"}, Spec: corev1.ServiceSpec{Ports: []corev1.ServicePort{{Port: 80}}},
	}, metav1.CreateOptions{})
	require.NoError(t, err)
	waitKept(t, c, "a2", "newest")
	c.Kill(t, "c1", false)
	c.Kill(t, "a2", true)
	require.NoError(t, c.Spec.Start(t.Context(), "a2")) // it cannot become Ready
	served("the Service from outside, without controllers", fromOutside, second...)
	served("the Service from nodes, without controllers", fromNode, second...)
}

// waitKept waits until what an agent knows of the network, of which a text is part, is on
// its disk.
func waitKept(t *testing.T, c *harness.Cluster, agent, text string) {
	t.Helper()
	harness.Eventually(t, 20*time.Second, agent+" has kept what it knows", func() error {
		kept, err := os.ReadFile(filepath.Join(c.Spec.DataDir(agent), "network.feed"))
		if err == nil && !bytes.Contains(kept, []byte(text)) {
			err = fmt.Errorf("%s is not in it", text)
		}
		return err
	})
}
