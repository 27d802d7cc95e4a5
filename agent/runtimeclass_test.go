package agent_test

import (
	"context"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"
	nodev1 "k8s.io/api/node/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	runtimev1 "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// A pod runs in the runtime that its class names. One whose class is not there, or names a
// runtime that is not, waits with an event, and runs as soon as it can.
func TestRuntimeClass(t *testing.T) {
	n, cs := cluster(t, "c1")
	c := cs[0]
	runc := program(t, "runc")
	// Another runtime: runc, and it leaves a mark.
	mark := filepath.Join(t.TempDir(), "mark")
	other := filepath.Join(t.TempDir(), "other")
	require.NoError(t, os.WriteFile(other, []byte("#!/bin/sh\necho \"$@\" >> "+mark+"\nexec "+runc+" \"$@\"\n"), 0o755))
	n.cfg.RuntimeHandlers = map[string]string{"other": other}
	class := func(name, handler string) {
		c.object("RuntimeClass", &nodev1.RuntimeClass{ObjectMeta: metav1.ObjectMeta{Name: name, ResourceVersion: "1"}, Handler: handler})
	}
	class("other", "other")
	class("broken", "nowhere")
	n.start()
	c.wait("the node", 30*time.Second, func() bool { return c.node != nil })
	names := []string{}
	for _, h := range c.node.Status.RuntimeHandlers {
		names = append(names, h.Name)
	}
	require.Equal(t, []string{"", "other", "runc"}, names)

	of := func(name string) *corev1.Pod {
		p := newPod(name, shell("app", "trap 'exit 0' TERM; while true; do sleep 1; done"))
		p.Spec.RuntimeClassName = &p.Name
		c.set(p)
		return p
	}
	p, broken, late := of("other"), of("broken"), of("late")
	c.ready(p)
	raw, err := os.ReadFile(mark)
	require.NoError(t, err)
	require.Contains(t, string(raw), "create")
	boxes, err := runtimeOf(t, n).ListPodSandbox(context.Background(), &runtimev1.ListPodSandboxRequest{})
	require.NoError(t, err)
	require.Len(t, boxes.Items, 1)
	require.Equal(t, "other", boxes.Items[0].RuntimeHandler)

	told := func(p *corev1.Pod, want string) {
		t.Helper()
		c.wait("an event about "+p.Name, 20*time.Second, func() bool {
			return slices.ContainsFunc(c.events, func(e *corev1.Event) bool {
				return e.InvolvedObject.UID == p.UID && e.Reason == "FailedCreatePodSandBox" && strings.Contains(e.Message, want)
			})
		})
	}
	told(broken, `no runtime for "nowhere" is configured`)
	told(late, `Failed to create pod sandbox: runtimeclass.node.k8s.io "late" not found`)
	class("late", "runc")
	c.ready(late)
	c.delete(p, 2)
}
