package dispatch

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	pb "timonel/proto/timonel/v1"
)

func podOn(node, name, uid string, change ...func(*corev1.Pod)) *corev1.Pod {
	pod := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: name, UID: types.UID(uid)},
		Spec:       corev1.PodSpec{NodeName: node, Containers: []corev1.Container{{Name: "main", Image: "sample"}}},
	}
	for _, f := range change {
		f(pod)
	}
	return pod
}

func configMap(name, value string) *corev1.ConfigMap {
	return &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: name}, Data: map[string]string{"k": value}}
}

func secret(name, value string) *corev1.Secret {
	return &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: name}, Data: map[string][]byte{"k": []byte(value)}}
}

func withRefs(pod *corev1.Pod) {
	pod.Spec.Containers[0].EnvFrom = []corev1.EnvFromSource{{ConfigMapRef: &corev1.ConfigMapEnvSource{LocalObjectReference: corev1.LocalObjectReference{Name: "env"}}}}
	pod.Spec.InitContainers = []corev1.Container{{Name: "init", Env: []corev1.EnvVar{{Name: "X", ValueFrom: &corev1.EnvVarSource{
		SecretKeyRef: &corev1.SecretKeySelector{LocalObjectReference: corev1.LocalObjectReference{Name: "key"}, Key: "k"}}}}}}
	pod.Spec.Volumes = []corev1.Volume{
		{Name: "s", VolumeSource: corev1.VolumeSource{Secret: &corev1.SecretVolumeSource{SecretName: "volume"}}},
		{Name: "p", VolumeSource: corev1.VolumeSource{Projected: &corev1.ProjectedVolumeSource{Sources: []corev1.VolumeProjection{
			{ConfigMap: &corev1.ConfigMapProjection{LocalObjectReference: corev1.LocalObjectReference{Name: "projected"}}},
			{Secret: &corev1.SecretProjection{LocalObjectReference: corev1.LocalObjectReference{Name: "absent"}}},
		}}}},
	}
}

func TestFullSyncAndChanges(t *testing.T) {
	t.Parallel()
	c := newCluster(t, "c1")
	node := nodeObject("a1")
	c.put(node)
	c.put(&corev1.ServiceAccount{ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: "default"},
		ImagePullSecrets: []corev1.LocalObjectReference{{Name: "pull"}}})
	for _, name := range []string{"env", "projected", "unrelated"} {
		c.put(configMap(name, "1"))
	}
	for _, name := range []string{"key", "volume", "pull", "other"} {
		c.put(secret(name, "1"))
	}
	c.put(podOn("a2", "elsewhere", "u0"))
	last := c.put(podOn("a1", "web", "u1", withRefs))

	a := c.connect("c1", &pb.Hello{NodeName: "a1"})
	require.Equal(t, []string{
		"welcome from c1 full=true",
		"ConfigMap default/env rev=4", "ConfigMap default/projected rev=5",
		"Secret default/key rev=7", "Secret default/pull rev=9", "Secret default/volume rev=8",
		"ServiceAccount default/default rev=3",
		fmt.Sprintf("pod default/web uid=u1 rev=%d resume=0", last),
		"synced",
	}, a.batch())

	c.put(podOn("a2", "elsewhere", "u0")) // not ours
	c.put(configMap("unrelated", "2"))
	rev := c.put(configMap("env", "2"))
	require.Equal(t, []string{fmt.Sprintf("ConfigMap default/env rev=%d", rev), "synced"}, a.batch())

	rev = c.put(secret("absent", "now there"))
	require.Equal(t, []string{fmt.Sprintf("Secret default/absent rev=%d", rev), "synced"}, a.batch())
	c.remove(secret("absent", ""))
	require.Equal(t, []string{"remove Secret default/absent", "synced"}, a.batch())

	synced := a.synced
	now := metav1.Now()
	rev = c.put(podOn("a1", "web", "u1", withRefs, func(p *corev1.Pod) { p.DeletionTimestamp = &now }))
	require.Equal(t, []string{fmt.Sprintf("pod default/web uid=u1 rev=%d resume=%d", rev, synced), "synced"}, a.batch())
	c.remove(podOn("a1", "web", "u1"))
	require.Equal(t, "remove pod default/web uid=u1", a.batch()[0])

	// The same name again, without references.
	synced0 := a.synced
	rev = c.put(podOn("a1", "web", "u2"))
	got := a.batch()
	require.Contains(t, got, fmt.Sprintf("pod default/web uid=u2 rev=%d resume=%d", rev, synced0))
	require.Contains(t, got, "Secret default/pull rev=9", "what was dropped with the last pod is sent again")
}

func TestClusterMessage(t *testing.T) {
	t.Parallel()
	c := newCluster(t, "c1", "c2")
	node := nodeObject("a2")
	node.Spec.PodCIDRs = []string{"10.244.1.0/24"}
	c.put(node)
	a := c.connect("c1", &pb.Hello{NodeName: "a1"})
	timeout := time.After(patience)
	for {
		select {
		case m := <-a.got:
			cl := m.GetCluster()
			if cl == nil || len(cl.Controllers) < 2 || len(cl.Routes) < 2 { // a1 has to register first
				continue
			}
			require.ElementsMatch(t, c.addrs(), cl.Controllers)
			require.Equal(t, "a2", cl.Routes[1].NodeName)
			require.Equal(t, []string{"10.244.1.0/24"}, cl.Routes[1].PodCidrs)
			require.Equal(t, nodeAddress("a2"), cl.Routes[1].NodeAddress)
			return
		case <-timeout:
			t.Fatal("no complete Cluster came")
		}
	}
}

func TestConnectRefusals(t *testing.T) {
	t.Parallel()
	c := newCluster(t, "c1")
	other := nodeObject("a2")
	raw, err := other.Marshal()
	require.NoError(t, err)

	a := c.connect("c1", &pb.Hello{NodeName: "a1", Node: raw})
	require.ErrorContains(t, a.end(), `its Node is called "a2"`)
	a = c.connect("c1", &pb.Hello{NodeName: "a1", Node: []byte("x")})
	require.Equal(t, codes.InvalidArgument, status.Code(a.end()))

	// a1's certificate, a2's name
	conn := c.dial("c1", c.nodeTLS("a1"))
	stream, err := pb.NewAgentsClient(conn).Connect(t.Context())
	require.NoError(t, err)
	require.NoError(t, stream.Send(&pb.AgentMessage{Message: &pb.AgentMessage_Hello{Hello: &pb.Hello{NodeName: "a2", Node: raw}}}))
	_, err = stream.Recv()
	require.Equal(t, codes.PermissionDenied, status.Code(err))
	require.ErrorContains(t, err, "node a1")

	c.controllers["c1"].barrier = func(context.Context) error { return errors.New("no leader") }
	a = c.connect("c1", &pb.Hello{NodeName: "a1"})
	err = a.end()
	require.Equal(t, codes.Unavailable, status.Code(err))
	require.ErrorContains(t, err, "no leader")
}

func TestNewestStreamWins(t *testing.T) {
	t.Parallel()
	c := newCluster(t, "c1")
	first := c.connect("c1", &pb.Hello{NodeName: "a1"})
	first.batch()
	second := c.connect("c1", &pb.Hello{NodeName: "a1"})
	second.batch()
	require.ErrorContains(t, first.end(), "newer stream")
	c.put(podOn("a1", "web", "u1"))
	require.Contains(t, second.batch(), "synced")
	require.Equal(t, []string{"a1"}, c.controllers["c1"].hub.connected())
}

// An agent that reads nothing does not keep others from their changes, and gets
// only the newest when it reads again.
func TestSlowAgent(t *testing.T) {
	t.Parallel()
	c := newCluster(t, "c1")
	slow := c.connect("c1", &pb.Hello{NodeName: "a1"})
	slow.batch()
	fast := c.connect("c1", &pb.Hello{NodeName: "a2"})
	fast.batch()
	slow.hold.Lock()
	big := make([]byte, 64<<10)
	var last int64
	for i := range 100 {
		last = c.put(podOn("a1", "web", "u1", func(p *corev1.Pod) {
			p.Annotations = map[string]string{"n": fmt.Sprint(i), "big": fmt.Sprintf("%x", big)}
		}))
	}
	rev := c.put(podOn("a2", "other", "u2"))
	require.Contains(t, strings.Join(fast.batch(), "\n"), fmt.Sprintf("pod default/other uid=u2 rev=%d ", rev))
	slow.hold.Unlock()
	got := 0
	for {
		got++
		if strings.Contains(strings.Join(slow.batch(), "\n"), fmt.Sprintf("rev=%d ", last)) {
			break
		}
	}
	require.Less(t, got, 50, "what it did not read in time is merged")
}

// A pod that a policy selects comes with the revision that its node must be told of.
func TestAPodSaysWhetherPoliciesHold(t *testing.T) {
	t.Parallel()
	c := newCluster(t, "c1")
	c.put(nodeObject("a1"))
	c.put(podOn("a1", "open", "u1", func(p *corev1.Pod) { p.Labels = map[string]string{"app": "open"} }))
	c.put(podOn("a1", "web", "u2", func(p *corev1.Pod) { p.Labels = map[string]string{"app": "web"} }))
	last := c.put(&networkingv1.NetworkPolicy{
		ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: "p"},
		Spec:       networkingv1.NetworkPolicySpec{PodSelector: metav1.LabelSelector{MatchLabels: map[string]string{"app": "web"}}},
	})
	a := c.connect("c1", &pb.Hello{NodeName: "a1"})
	require.Equal(t, []string{
		"welcome from c1 full=true",
		"pod default/open uid=u1 rev=3 resume=0",
		fmt.Sprintf("pod default/web uid=u2 rev=4 resume=0 policies=%d", last),
		"synced",
	}, a.batch())
}
