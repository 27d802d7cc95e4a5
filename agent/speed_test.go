package agent_test

import (
	"fmt"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"
)

// Ten pods at once run, and end, in a time that a person does not notice much.
func TestTenPodsAtOnce(t *testing.T) {
	n, cs := cluster(t, "c1")
	c := cs[0]
	n.start()
	c.wait("the node to be ready", 20*time.Second, func() bool { return nodeReady(c.node) })
	var pods []*corev1.Pod
	began := time.Now()
	for i := range 10 {
		p := newPod(fmt.Sprintf("p%d", i), corev1.Container{Name: "app", Image: "timonel/sample"})
		pods = append(pods, p)
		c.set(p)
	}
	for _, p := range pods {
		c.ready(p)
	}
	all := time.Since(began)
	began = time.Now()
	one := newPod("one", corev1.Container{Name: "app", Image: "timonel/sample"})
	c.set(one)
	c.ready(one)
	alone := time.Since(began)
	began = time.Now()
	c.delete(one, 5)
	t.Logf("ten pods ready after %s, one alone after %s and gone after %s", all.Round(time.Millisecond), alone.Round(time.Millisecond), time.Since(began).Round(time.Millisecond))
	require.Less(t, all, 30*time.Second)
}
