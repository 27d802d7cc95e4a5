//go:build e2e

package e2e

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"timonel/test/harness"
)

// TestNames: pods of two nodes find each other and Services by name; and their
// nodes go on to when all controllers are dead.
func TestNames(t *testing.T) {
	t.Parallel()
	c := harness.Up(t, harness.Options{Controllers: 1, Agents: 2, ControllerFlags: []string{"--cluster-domain=corp.example"}})
	client := c.Client(t, "c1")
	labels := map[string]string{"app": "web"}
	replicas := int32(2)
	_, err := client.CoreV1().Services("default").Create(t.Context(), &corev1.Service{
		ObjectMeta: metav1.ObjectMeta{Name: "web"},
		Spec:       corev1.ServiceSpec{ClusterIP: corev1.ClusterIPNone, Selector: labels, Ports: []corev1.ServicePort{{Name: "http", Port: 80}}},
	}, metav1.CreateOptions{})
	require.NoError(t, err)
	_, err = client.CoreV1().Services("default").Create(t.Context(), &corev1.Service{
		ObjectMeta: metav1.ObjectMeta{Name: "alias"},
		Spec:       corev1.ServiceSpec{Type: corev1.ServiceTypeExternalName, ExternalName: "web-0.web.default.svc.corp.example"},
	}, metav1.CreateOptions{})
	require.NoError(t, err)
	_, err = client.AppsV1().StatefulSets("default").Create(t.Context(), &appsv1.StatefulSet{
		ObjectMeta: metav1.ObjectMeta{Name: "web"},
		Spec: appsv1.StatefulSetSpec{
			ServiceName: "web", Replicas: &replicas, PodManagementPolicy: appsv1.ParallelPodManagement, Selector: &metav1.LabelSelector{MatchLabels: labels},
			Template: corev1.PodTemplateSpec{
				ObjectMeta: metav1.ObjectMeta{Labels: labels},
				Spec: corev1.PodSpec{
					TopologySpreadConstraints: []corev1.TopologySpreadConstraint{{
						MaxSkew: 1, TopologyKey: corev1.LabelHostname, WhenUnsatisfiable: corev1.DoNotSchedule, LabelSelector: &metav1.LabelSelector{MatchLabels: labels},
					}},
					Containers: []corev1.Container{{
						Name: "c", Image: "timonel/busybox:latest", ImagePullPolicy: corev1.PullIfNotPresent, Command: []string{"sleep", "86400"},
					}},
				},
			},
		},
	}, metav1.CreateOptions{})
	require.NoError(t, err)
	ips, node := map[string]string{}, ""
	harness.Eventually(t, time.Minute, "both pods are ready", func() error {
		list, err := client.CoreV1().Pods("default").List(t.Context(), metav1.ListOptions{LabelSelector: "app=web"})
		if err != nil {
			return err
		}
		clear(ips)
		for _, p := range list.Items {
			if len(p.Status.ContainerStatuses) == 1 && p.Status.ContainerStatuses[0].Ready {
				ips[p.Name] = p.Status.PodIP
				if p.Name == "web-0" {
					node = p.Spec.NodeName
				}
			}
		}
		if len(ips) < 2 {
			return fmt.Errorf("%d of 2", len(ips))
		}
		return nil
	})
	found := func(name, want string) {
		t.Helper()
		harness.Eventually(t, 20*time.Second, name+" is "+want, func() error {
			out, err := c.Try(t.Context(), "kubectl", "exec", "web-0", "--", "nslookup", name)
			if err == nil && !strings.Contains(out, want) {
				err = fmt.Errorf("nslookup says: %s", out)
			}
			return err
		})
	}
	require.Contains(t, c.Run(t, "kubectl", "exec", "web-0", "--", "cat", "/etc/resolv.conf"), "search default.svc.corp.example svc.corp.example corp.example\nnameserver 10.96.0.10\n")
	found("kubernetes.default.svc.corp.example", "10.96.0.1\n")
	found("kube-dns.kube-system.svc.corp.example", "10.96.0.10\n")
	found("web.default.svc.corp.example", ips["web-1"]+"\n")
	found("web-1.web.default.svc.corp.example", ips["web-1"]+"\n")
	found("alias.default.svc.corp.example", ips["web-0"]+"\n")
	found("10.96.0.1", "kubernetes.default.svc.corp.example")

	// The node's own programs ask at the same address: a pod cannot be entered without
	// controllers.
	onNode := func() {
		t.Helper()
		harness.Eventually(t, time.Minute, "names are found on "+node, func() error {
			out, err := c.Try(t.Context(), "exec", node, "--", "bash", "-c", lookup("web-1.web.default.svc.corp.example"))
			if err == nil && !strings.Contains(out, ips["web-1"]) {
				err = fmt.Errorf("the answer is %s", out)
			}
			return err
		})
	}
	c.Kill(t, "c1", false)
	onNode()
}

// lookup is a command for bash, which every machine has, that asks for an A record and
// prints the bytes of the answer, the address last.
func lookup(name string) string {
	q := `\0\007\001\0\0\001\0\0\0\0\0\0`
	for label := range strings.SplitSeq(name, ".") {
		q += fmt.Sprintf(`\%03o%s`, len(label), label)
	}
	return `exec 3<>/dev/udp/10.96.0.10/53; printf '` + q + `\0\0\001\0\001' >&3; timeout 3 dd bs=512 count=1 status=none <&3 | od -An -v -w512 -tu1 | tr -s ' ' .`
}
