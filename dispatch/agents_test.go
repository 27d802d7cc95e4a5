package dispatch

import (
	"context"
	"errors"
	"io"
	"net"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"

	"timonel/gossip"
	pb "timonel/proto/timonel/v1"
	"timonel/state/objects"
)

func (c *cluster) node(name string) *corev1.Node {
	n, _ := c.controllers["c1"].config.Objects.Snapshot().Nodes().Get("", name)
	return n
}

func (c *cluster) pod(name string) *corev1.Pod {
	p, _ := c.controllers["c1"].config.Objects.Snapshot().Pods().Get("default", name)
	return p
}

func eventually(t *testing.T, what string, f func() bool) {
	t.Helper()
	require.Eventually(t, f, patience, 2*time.Millisecond, what)
}

func ready(n *corev1.Node) corev1.ConditionStatus {
	if n == nil {
		return ""
	}
	c, _ := conditionOf(&n.Status, corev1.NodeReady)
	return c.Status
}

// settle waits until all that the agent has said is dealt with and written.
func (c *cluster) settle(a *agent) {
	c.t.Helper()
	raw, err := (&authenticationv1.TokenRequest{}).Marshal()
	require.NoError(c.t, err)
	const id = 1 << 40
	a.say(&pb.AgentMessage{Message: &pb.AgentMessage_Request{Request: &pb.Request{Id: id, Request: &pb.Request_Token{
		Token: &pb.TokenRequest{Namespace: "default", ServiceAccount: "sa", TokenRequest: raw}}}}})
	timeout := time.After(patience)
	for answered := false; !answered; {
		select {
		case m := <-a.got:
			answered = m.GetReply().GetId() == id
		case <-timeout:
			c.t.Fatal("no reply")
		}
	}
	eventually(c.t, "all is written", func() bool {
		for _, k := range c.controllers {
			if s := k.hub.session(a.name); s != nil {
				s.writer.mu.Lock()
				left := len(s.writer.waiting) + len(s.writer.busy)
				s.writer.mu.Unlock()
				return left == 0
			}
		}
		return false
	})
}

func TestNodeRegistration(t *testing.T) {
	t.Parallel()
	c := newCluster(t, "c1")
	refusals := 3
	c.api.setFail(func(node, method, path string) *apierrors.StatusError {
		if method == "POST" && refusals > 0 {
			refusals--
			return apierrors.NewServerTimeout(schema.GroupResource{Resource: "nodes"}, "create", 1)
		}
		return nil
	})
	a := c.connect("c1", &pb.Hello{NodeName: "a1"})
	a.batch()
	eventually(t, "the node is there in spite of errors", func() bool { return ready(c.node("a1")) == corev1.ConditionTrue })

	// The leader took it for dead; it is not.
	node := c.node("a1").DeepCopy()
	node.Status.Conditions[0].Status = corev1.ConditionUnknown
	node.Labels["team"] = "blue"
	rev := c.put(node)
	eventually(t, "the node is ready again", func() bool {
		n := c.node("a1")
		return objects.Revision(n) > rev && ready(n) == corev1.ConditionTrue
	})
	require.Equal(t, "blue", c.node("a1").Labels["team"], "others' labels are kept")

	// Nothing new: nothing is written.
	writes := c.api.calls("PUT")
	raw, err := nodeObject("a1").Marshal()
	require.NoError(t, err)
	a.say(&pb.AgentMessage{Message: &pb.AgentMessage_NodeStatus{NodeStatus: &pb.NodeStatus{Node: raw}}})
	c.settle(a)
	require.Equal(t, writes, c.api.calls("PUT"))
	changed := nodeObject("a1")
	changed.Labels["zone"] = "z1"
	changed.Status.Capacity = corev1.ResourceList{}
	raw, err = changed.Marshal()
	require.NoError(t, err)
	a.say(&pb.AgentMessage{Message: &pb.AgentMessage_NodeStatus{NodeStatus: &pb.NodeStatus{Node: raw}}})
	eventually(t, "a new label is written", func() bool { return c.node("a1").Labels["zone"] == "z1" })
	require.Equal(t, writes+1, c.api.calls("PUT"), "only the labels differ")
	changed.Annotations = map[string]string{"timonel.io/gossip-address": "10.0.0.1:17946"}
	raw, err = changed.Marshal()
	require.NoError(t, err)
	a.say(&pb.AgentMessage{Message: &pb.AgentMessage_NodeStatus{NodeStatus: &pb.NodeStatus{Node: raw}}})
	eventually(t, "where its gossip is now is written", func() bool {
		return c.node("a1").Annotations["timonel.io/gossip-address"] == "10.0.0.1:17946"
	})
}

func sayStatus(a *agent, uid string, st *corev1.PodStatus) {
	a.t.Helper()
	raw, err := st.Marshal()
	require.NoError(a.t, err)
	a.say(&pb.AgentMessage{Message: &pb.AgentMessage_PodStatus{PodStatus: &pb.PodStatus{Namespace: "default", Name: "web", Uid: uid, Status: raw}}})
}

func TestPodReports(t *testing.T) {
	t.Parallel()
	c := newCluster(t, "c1")
	c.put(podOn("a1", "web", "u1", func(p *corev1.Pod) {
		p.Status.QOSClass = corev1.PodQOSBurstable
		p.Status.Conditions = []corev1.PodCondition{{Type: corev1.PodScheduled, Status: corev1.ConditionTrue}}
	}))
	a := c.connect("c1", &pb.Hello{NodeName: "a1"})
	a.batch()

	conflicts := 2
	c.api.setFail(func(_, method, path string) *apierrors.StatusError {
		if method == "PUT" && strings.HasSuffix(path, "pods/web/status") && conflicts > 0 {
			conflicts--
			return apierrors.NewConflict(schema.GroupResource{Resource: "pods"}, "web", errors.New("test"))
		}
		return nil
	})
	running := &corev1.PodStatus{Phase: corev1.PodRunning, Conditions: []corev1.PodCondition{{Type: corev1.PodReady, Status: corev1.ConditionTrue}}}
	sayStatus(a, "u1", running)
	eventually(t, "status is written", func() bool { return c.pod("web").Status.Phase == corev1.PodRunning })
	require.Len(t, c.pod("web").Status.Conditions, 2, "others' conditions are kept")
	require.Equal(t, corev1.PodQOSBurstable, c.pod("web").Status.QOSClass)

	writes := c.api.calls("PUT /api/v1/namespaces/default/pods")
	sayStatus(a, "u1", running)                                         // the same
	sayStatus(a, "another", &corev1.PodStatus{Phase: corev1.PodFailed}) // a pod that was
	a.say(&pb.AgentMessage{Message: &pb.AgentMessage_PodTerminated{PodTerminated: &pb.PodTerminated{Namespace: "default", Name: "web", Uid: "another"}}})
	c.settle(a)
	require.Zero(t, c.api.calls("DELETE"), "what is said of a pod that is not there is not tried")
	require.Equal(t, writes, c.api.calls("PUT /api/v1/namespaces/default/pods"))
	require.NotNil(t, c.pod("web"), "the pod of another uid is still there")

	sayStatus(a, "u1", &corev1.PodStatus{Phase: corev1.PodSucceeded})
	a.say(&pb.AgentMessage{Message: &pb.AgentMessage_PodTerminated{PodTerminated: &pb.PodTerminated{Namespace: "default", Name: "web", Uid: "u1"}}})
	eventually(t, "the pod is deleted", func() bool { return c.pod("web") == nil })
}

// While the API fails only the newest status waits, and it is written in the end.
func TestNewestStatusWins(t *testing.T) {
	t.Parallel()
	c := newCluster(t, "c1")
	c.put(podOn("a1", "web", "u1"))
	a := c.connect("c1", &pb.Hello{NodeName: "a1"})
	a.batch()
	c.api.setFail(func(string, string, string) *apierrors.StatusError {
		return apierrors.NewServerTimeout(schema.GroupResource{Resource: "pods"}, "update", 1)
	})
	sayStatus(a, "u1", &corev1.PodStatus{Phase: corev1.PodPending})
	sayStatus(a, "u1", &corev1.PodStatus{Phase: corev1.PodRunning})
	sayStatus(a, "u1", &corev1.PodStatus{Phase: corev1.PodRunning, Message: "newest"})
	eventually(t, "it was tried", func() bool { return c.api.calls("pods/web/status") > 0 })
	c.api.setFail(nil)
	eventually(t, "the newest is written", func() bool { return c.pod("web").Status.Message == "newest" })
}

func TestEventsAndRequests(t *testing.T) {
	t.Parallel()
	c := newCluster(t, "c1")
	a := c.connect("c1", &pb.Hello{NodeName: "a1"})
	a.batch()
	raw, err := (&corev1.Event{InvolvedObject: corev1.ObjectReference{Namespace: "default", Name: "web"}, Reason: "Pulled"}).Marshal()
	require.NoError(t, err)
	a.say(&pb.AgentMessage{Message: &pb.AgentMessage_Event{Event: &pb.Event{Event: raw}}})
	eventually(t, "the event is written", func() bool { return c.store.View().Count("/registry/events/default/web.") == 1 })

	raw, err = (&authenticationv1.TokenRequest{}).Marshal()
	require.NoError(t, err)
	ask := func(id uint64) *pb.Reply {
		a.say(&pb.AgentMessage{Message: &pb.AgentMessage_Request{Request: &pb.Request{Id: id, Request: &pb.Request_Token{
			Token: &pb.TokenRequest{Namespace: "default", ServiceAccount: "sa", TokenRequest: raw}}}}})
		timeout := time.After(patience)
		for {
			select {
			case m := <-a.got:
				if r := m.GetReply(); r != nil {
					return r
				}
			case <-timeout:
				t.Fatal("no reply")
			}
		}
	}
	reply := ask(7)
	require.EqualValues(t, 7, reply.Id)
	out := &authenticationv1.TokenRequest{}
	require.NoError(t, out.Unmarshal(reply.Body))
	require.Equal(t, "token of default/sa", out.Status.Token)

	c.api.setFail(func(string, string, string) *apierrors.StatusError {
		return apierrors.NewForbidden(schema.GroupResource{Resource: "serviceaccounts"}, "sa", errors.New("no pod of it runs here"))
	})
	reply = ask(8)
	st := &metav1.Status{}
	require.NoError(t, st.Unmarshal(reply.Status))
	require.Contains(t, st.Message, "no pod of it runs here")
}

func TestTunnels(t *testing.T) {
	t.Parallel()
	c := newCluster(t, "c1", "c2", "c3")
	a := c.connect("c1", &pb.Hello{NodeName: "a1"})
	a.serve = func(conn net.Conn) { _, _ = io.Copy(conn, conn) }
	a.batch()
	for _, from := range []string{"c1", "c2"} {
		t.Run("echo from "+from, func(t *testing.T) {
			t.Parallel()
			conn, err := c.controllers[from].DialKubelet(t.Context(), "a1")
			require.NoError(t, err)
			defer conn.Close()
			sent := strings.Repeat("0123456789", 100_000) // more than any window
			go func() {
				_, _ = io.WriteString(conn, sent)
				_ = conn.(interface{ CloseWrite() error }).CloseWrite()
			}()
			got, err := io.ReadAll(conn)
			require.NoError(t, err)
			require.Equal(t, len(sent), len(got))
			require.Equal(t, sent, string(got))
		})
		t.Run("deadline from "+from, func(t *testing.T) {
			t.Parallel()
			conn, err := c.controllers[from].DialKubelet(t.Context(), "a1")
			require.NoError(t, err)
			defer conn.Close()
			require.NoError(t, conn.SetReadDeadline(time.Now().Add(20*time.Millisecond)))
			_, err = conn.Read(make([]byte, 1))
			require.ErrorIs(t, err, os.ErrDeadlineExceeded)
			require.NoError(t, conn.SetReadDeadline(time.Time{}))
			_, err = conn.Write([]byte("x"))
			require.NoError(t, err)
			_, err = conn.Read(make([]byte, 1))
			require.NoError(t, err)
			conn.Close()
			_, err = conn.Read(make([]byte, 1))
			require.ErrorIs(t, err, net.ErrClosed)
		})
	}
}

func TestTunnelToNobody(t *testing.T) {
	t.Parallel()
	c := newCluster(t, "c1", "c2")
	_, err := c.controllers["c1"].DialKubelet(t.Context(), "a1")
	require.EqualError(t, err, "node a1 is not connected to any controller")

	// A controller that gossip still believes in does not answer.
	c.controllers["c2"].stop()
	c.gossip.set(gossip.Member{Name: "c2", Role: gossip.RoleController, State: gossip.Alive})
	_, err = c.controllers["c1"].DialKubelet(t.Context(), "a1")
	require.ErrorContains(t, err, "any controller that answers (c2: ")

	// An agent that does not dial back.
	a := c.connect("c1", &pb.Hello{NodeName: "a1"})
	a.batch()
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	_, err = c.controllers["c1"].DialKubelet(ctx, "a1")
	require.ErrorContains(t, err, "did not open the connection")

	// A tunnel that nobody asked for.
	stream, err := pb.NewAgentsClient(a.conn).Tunnel(t.Context())
	require.NoError(t, err)
	_, err = stream.Recv()
	require.Equal(t, codes.NotFound, status.Code(err))
}

func TestTunnelEndsWithItsAgent(t *testing.T) {
	t.Parallel()
	c := newCluster(t, "c1", "c2")
	a := c.connect("c1", &pb.Hello{NodeName: "a1"})
	a.serve = func(conn net.Conn) { _, _ = io.Copy(io.Discard, conn) }
	a.batch()
	var conns []net.Conn
	for _, from := range []string{"c1", "c2"} {
		conn, err := c.controllers[from].DialKubelet(t.Context(), "a1")
		require.NoError(t, err)
		conns = append(conns, conn)
	}
	a.conn.Close()
	for _, conn := range conns {
		_, err := conn.Read(make([]byte, 1))
		require.Error(t, err)
		require.NotErrorIs(t, err, io.EOF, "the agent did not end it: who reads has not all there was")
	}
}
