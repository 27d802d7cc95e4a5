//go:build e2e

package e2e

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/intstr"

	"timonel/test/harness"
)

// TestLoadBalancer: a machine on the nodes' segment that is no node reaches Services by
// addresses of a pool; one is there again within 3 s after the machine that had it has
// lost its power, and so it is when only the agent dies; two Services share one; source
// ranges hold; and all of it goes on while all controllers are dead.
func TestLoadBalancer(t *testing.T) {
	t.Parallel()
	c := harness.Up(t, harness.Options{Controllers: 3, Agents: 3})
	client := c.Client(t, "")
	c.Deploy(t, "web", 3, func(s *corev1.PodSpec) {
		s.TopologySpreadConstraints = []corev1.TopologySpreadConstraint{{
			MaxSkew: 1, TopologyKey: corev1.LabelHostname, WhenUnsatisfiable: corev1.DoNotSchedule,
			LabelSelector: &metav1.LabelSelector{MatchLabels: map[string]string{"app": "web"}},
		}}
	})
	segment, err := c.Spec.Address("a1").Prefix(24)
	require.NoError(t, err)
	first := segment.Addr().As4()
	first[3] = 200
	pool := netip.AddrFrom4(first)
	// In place of the one that `timonel up` makes.
	_, err = client.CoreV1().ConfigMaps("kube-system").Update(t.Context(), &corev1.ConfigMap{
		ObjectMeta: metav1.ObjectMeta{Name: "load-balancer-pools"},
		Data:       map[string]string{"default": fmt.Sprintf("addresses: [%s-%s]", pool, pool.Next())},
	}, metav1.UpdateOptions{})
	require.NoError(t, err)
	balancer := func(name string, port int32) {
		_, err := client.CoreV1().Services("default").Create(t.Context(), &corev1.Service{
			ObjectMeta: metav1.ObjectMeta{Name: name, Annotations: map[string]string{"timonel.io/load-balancer-sharing": "web"}},
			Spec: corev1.ServiceSpec{
				Type: corev1.ServiceTypeLoadBalancer, Selector: map[string]string{"app": "web"},
				Ports: []corev1.ServicePort{{Port: port, TargetPort: intstr.FromInt32(8080)}},
			},
		}, metav1.CreateOptions{})
		require.NoError(t, err)
		harness.Eventually(t, 20*time.Second, name+" has the address", func() error {
			svc, err := client.CoreV1().Services("default").Get(t.Context(), name, metav1.GetOptions{})
			if err == nil && (len(svc.Status.LoadBalancer.Ingress) != 1 || svc.Status.LoadBalancer.Ingress[0].IP != pool.String()) {
				err = fmt.Errorf("it has %v", svc.Status.LoadBalancer.Ingress)
			}
			return err
		})
	}
	outside := &http.Client{Timeout: 400 * time.Millisecond, Transport: &http.Transport{DisableKeepAlives: true}}
	ask := func(port int) error {
		answer, err := outside.Get(fmt.Sprintf("http://%s:%d/", pool, port))
		if err != nil {
			return err
		}
		defer answer.Body.Close()
		_, err = io.Copy(io.Discard, answer.Body)
		return err
	}
	reached := func(port int, what string) time.Duration {
		t.Helper()
		return harness.Eventually(t, 30*time.Second, what, func() error { return ask(port) })
	}
	holder := func() string {
		l, err := client.CoordinationV1().Leases("kube-system").Get(t.Context(), "load-balancer-"+pool.String(), metav1.GetOptions{})
		require.NoError(t, err)
		require.NotNil(t, l.Spec.HolderIdentity)
		return *l.Spec.HolderIdentity
	}
	// gap is the longest time without an answer from before do until five answers after it.
	gap := func(do func()) (longest time.Duration) {
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		var mu sync.Mutex
		var wait sync.WaitGroup
		last, after, did := time.Now(), 0, false
		for range 4 { // some of what is asked meanwhile goes to pods that are dead
			wait.Go(func() {
				for ctx.Err() == nil {
					err := ask(80)
					mu.Lock()
					if err == nil {
						longest, last = max(longest, time.Since(last)), time.Now()
						if did {
							after++
						}
						if after >= 200 {
							cancel()
						}
					}
					mu.Unlock()
					select {
					case <-ctx.Done():
					case <-time.After(25 * time.Millisecond):
					}
				}
			})
		}
		do()
		mu.Lock()
		did = true
		mu.Unlock()
		wait.Wait()
		require.GreaterOrEqual(t, after, 200, "the Service does not come back")
		return longest
	}

	balancer("web", 80)
	reached(80, "the Service by its address")
	balancer("beside", 81)
	reached(81, "the Service that shares the address")

	dead := holder()
	took := gap(func() { c.Kill(t, dead, false) })
	t.Logf("%s lost its power: no answer for %s", dead, took)
	require.LessOrEqual(t, took, 3*time.Second)
	second := holder()
	require.NotEqual(t, dead, second)
	c.Start(t, dead)
	require.Equal(t, second, holder(), "it moves only when it has to")

	took = gap(func() {
		c.Kill(t, second, true)
		require.NoError(t, c.Spec.Start(t.Context(), second))
	})
	t.Logf("the agent of %s was killed and started again: no answer for %s", second, took)
	require.LessOrEqual(t, took, 3*time.Second)
	c.WaitNode(t, second, true, time.Minute)

	ranges := func(list ...string) {
		raw, err := json.Marshal(map[string]any{"spec": map[string]any{"loadBalancerSourceRanges": list}})
		require.NoError(t, err)
		_, err = client.CoreV1().Services("default").Patch(t.Context(), "web", types.MergePatchType, raw, metav1.PatchOptions{})
		require.NoError(t, err)
	}
	ranges("203.0.113.0/24")
	harness.Eventually(t, 20*time.Second, "other sources are kept out", func() error {
		if ask(80) == nil {
			return errors.New("it is reached")
		}
		return nil
	})
	reached(81, "the other Service, which has no ranges")
	ranges("203.0.113.0/24", segment.Masked().String())
	reached(80, "the Service from one of its ranges")

	// Nobody is left to take an endpoint away: those of the node that was dead have to be
	// what they are by now.
	harness.Eventually(t, time.Minute, "every endpoint answers", func() error {
		for range 20 {
			if err := ask(80); err != nil {
				return err
			}
		}
		return nil
	})
	now := holder()
	for _, name := range c.Spec.ControllerNames() {
		c.Kill(t, name, false)
	}
	for range 20 {
		require.NoError(t, ask(80), "without controllers")
	}
	c.Kill(t, now, true)
	require.NoError(t, c.Spec.Start(t.Context(), now)) // it cannot become Ready
	out, err := c.Try(t.Context(), "exec", strings.TrimSpace(now), "--", "true")
	require.NoError(t, err, out)
	reached(80, "the Service without controllers, after the agent was started again")
}
