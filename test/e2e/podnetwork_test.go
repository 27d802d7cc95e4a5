//go:build e2e

package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
	"k8s.io/utils/ptr"

	"timonel/test/harness"
)

// TestPodNetwork: pods have addresses of both families and reach each other, and Services
// of both, across nodes: of one segment, with a router between, and of one again.
func TestPodNetwork(t *testing.T) {
	t.Parallel()
	c := harness.Up(t, harness.Options{Controllers: 1, Agents: 2, ControllerFlags: []string{
		"--cluster-cidr=10.246.0.0/21,fd00:246::/56", "--node-cidr-mask-size-ipv4=23", "--service-cidr=10.96.0.0/16,fd00:96::/112",
	}})
	client := c.Client(t, "c1")
	c.Deploy(t, "web", 2, func(s *corev1.PodSpec) {
		s.TopologySpreadConstraints = []corev1.TopologySpreadConstraint{{
			MaxSkew: 1, TopologyKey: corev1.LabelHostname, WhenUnsatisfiable: corev1.DoNotSchedule,
			LabelSelector: &metav1.LabelSelector{MatchLabels: map[string]string{"app": "web"}},
		}}
		withShell(s)
	})
	pods := map[string]corev1.Pod{}
	for _, p := range c.Pods(t, "web") {
		require.Len(t, p.Status.PodIPs, 2, "a pod has an address of each family")
		pods[p.Spec.NodeName] = p
	}
	require.Len(t, pods, 2)
	service, err := client.CoreV1().Services("default").Create(t.Context(), &corev1.Service{
		ObjectMeta: metav1.ObjectMeta{Name: "web"},
		Spec: corev1.ServiceSpec{
			IPFamilyPolicy: ptr.To(corev1.IPFamilyPolicyPreferDualStack), Selector: map[string]string{"app": "web"},
			Ports: []corev1.ServicePort{{Port: 80, TargetPort: intstr.FromInt32(8080)}},
		},
	}, metav1.CreateOptions{})
	require.NoError(t, err)
	require.Len(t, service.Spec.ClusterIPs, 2)

	reached := func(when string) {
		t.Helper()
		for from, to := range map[string]string{"a1": "a2", "a2": "a1"} {
			for _, ip := range pods[to].Status.PodIPs {
				harness.Eventually(t, time.Minute, fmt.Sprintf("%s: the pod of %s, %s, reached from the one of %s", when, to, ip.IP, from), func() error {
					return fetch(t, c, pods[from].Name, ip.IP, "8080", pods[to].Name)
				})
			}
			for _, ip := range service.Spec.ClusterIPs {
				harness.Eventually(t, time.Minute, fmt.Sprintf("%s: the pod of %s reached by the Service at %s from the one of %s", when, to, ip, from), func() error {
					return fetch(t, c, pods[from].Name, ip, "80", pods[to].Name)
				})
			}
		}
	}
	route := func(node, want string) {
		t.Helper()
		harness.Eventually(t, 30*time.Second, "route of "+node, func() error {
			if got := c.Run(t, "exec", node, "--", "ip", "route"); !strings.Contains(got, want) {
				return fmt.Errorf("%s is not in\n%s", want, got)
			}
			return nil
		})
	}
	reached("of one segment")
	route("a1", "via "+c.Spec.Address("a2").String()+" dev eth0")

	// The two nodes have no wire to each other any more but the host's, which routes.
	c.Run(t, "partition", "a1", "--from", "a2")
	gateway := c.Spec.Network().Host().String()
	for _, pair := range [][2]string{{"a1", "a2"}, {"a2", "a1"}} {
		c.Run(t, "exec", pair[0], "--", "ip", "route", "add", c.Spec.Address(pair[1]).String()+"/32", "via", gateway)
	}
	route("a1", "dev timonel-vxlan")
	route("a2", "dev timonel-vxlan")
	reached("with a router between")

	for _, pair := range [][2]string{{"a1", "a2"}, {"a2", "a1"}} {
		c.Run(t, "exec", pair[0], "--", "ip", "route", "del", c.Spec.Address(pair[1]).String()+"/32")
	}
	c.Run(t, "partition", "a1", "--heal")
	route("a1", "via "+c.Spec.Address("a2").String()+" dev eth0")
	reached("of one segment again")
}

// TestAnotherPodNetwork: where pods get their addresses from another pod network, the agent
// makes none of its own, and Services and names work on top.
func TestAnotherPodNetwork(t *testing.T) {
	t.Parallel()
	conf := t.TempDir()
	require.NoError(t, os.WriteFile(filepath.Join(conf, "10-theirs.conflist"), []byte(`{"cniVersion": "0.4.0", "name": "theirs", "plugins": [
		{"type": "ptp", "ipMasq": false, "ipam": {"type": "host-local", "dataDir": "`+t.TempDir()+`", "ranges": [[{"subnet": "10.249.0.0/24"}]], "routes": [{"dst": "0.0.0.0/0"}]}},
		{"type": "tuning", "sysctl": {"net.ipv4.conf.all.log_martians": "1"}}]}`), 0o600))
	c := harness.Up(t, harness.Options{Controllers: 1, Agents: 1, ControllerFlags: []string{"--cluster-cidr=10.249.0.0/24"}, AgentFlags: []string{"--cni-conf-dir=" + conf}})
	c.Deploy(t, "web", 2, withShell)
	_, err := c.Client(t, "c1").CoreV1().Services("default").Create(t.Context(), &corev1.Service{
		ObjectMeta: metav1.ObjectMeta{Name: "web"},
		Spec:       corev1.ServiceSpec{Selector: map[string]string{"app": "web"}, Ports: []corev1.ServicePort{{Port: 80, TargetPort: intstr.FromInt32(8080)}}},
	}, metav1.CreateOptions{})
	require.NoError(t, err)
	service, err := c.Client(t, "c1").CoreV1().Services("default").Get(t.Context(), "web", metav1.GetOptions{})
	require.NoError(t, err)
	pods := c.Pods(t, "web")
	for i, p := range pods {
		require.True(t, strings.HasPrefix(p.Status.PodIP, "10.249.0."), p.Status.PodIP)
		other := pods[1-i]
		harness.Eventually(t, time.Minute, "the other pod by its address", func() error { return fetch(t, c, p.Name, other.Status.PodIP, "8080", other.Name) })
		harness.Eventually(t, time.Minute, "the other pod by the Service", func() error { return fetch(t, c, p.Name, service.Spec.ClusterIP, "80", other.Name) })
		harness.Eventually(t, time.Minute, "the Service's name", func() error {
			out, err := c.Try(t.Context(), "kubectl", "exec", p.Name, "-c", "shell", "--", "nslookup", "web.default.svc.cluster.local")
			if err == nil && !strings.Contains(out, service.Spec.ClusterIP) {
				err = fmt.Errorf("nslookup says: %s", out)
			}
			return err
		})
	}
	links := c.Run(t, "exec", "a1", "--", "ip", "link")
	require.NotContains(t, links, "timonel0")
	require.NotContains(t, links, "timonel-vxlan")
}

// withShell adds a container with a shell.
func withShell(s *corev1.PodSpec) {
	s.Containers = append(s.Containers, corev1.Container{
		Name: "shell", Image: "docker.io/timonel/busybox:latest", ImagePullPolicy: corev1.PullIfNotPresent, Command: []string{"sleep", "86400"},
	})
}

// fetch asks a server from a pod and looks for a text in the answer. (wget of Debian's
// static busybox crashes when it looks an address up.)
func fetch(t *testing.T, c *harness.Cluster, pod, ip, port, want string) error {
	text, err := c.Try(t.Context(), "kubectl", "exec", pod, "-c", "shell", "--", "sh", "-c",
		`printf 'GET / HTTP/1.0\r\n\r\n' | nc -w 3 `+ip+" "+port)
	if err == nil && !strings.Contains(text, want) {
		err = fmt.Errorf("%s is not in %q", want, text)
	}
	return err
}
