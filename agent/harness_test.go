package agent_test

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/stretchr/testify/require"
	"github.com/vishvananda/netlink"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"
	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	storagev1 "k8s.io/api/storage/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"timonel/agent"
	"timonel/agent/imagegc"
	"timonel/pki"
	pb "timonel/proto/timonel/v1"
	"timonel/test/needs"
)

const (
	inNamespace = "TIMONEL_TEST_NETNS"
	podCIDR     = "10.251.7.0/24"
	nodeIP      = "10.250.0.2"
)

// TestMain runs the tests in a network namespace of their own, so that bridges,
// routes and listeners are nobody else's.
func TestMain(m *testing.M) {
	if os.Getenv(inNamespace) == "" && os.Geteuid() == 0 {
		cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
		cmd.Env = append(os.Environ(), inNamespace+"=1")
		cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
		cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET, Pdeathsig: syscall.SIGKILL}
		if err := cmd.Start(); err == nil {
			if err := cmd.Wait(); err != nil {
				fmt.Fprintln(os.Stderr, err)
				os.Exit(1)
			}
			return
		}
		os.Exit(m.Run()) // no namespaces here: what needs one is skipped
	}
	if os.Getenv(inNamespace) != "" {
		if err := network(); err != nil {
			fmt.Fprintln(os.Stderr, "set up the test's network:", err)
			os.Exit(1)
		}
	}
	os.Exit(m.Run())
}

// network gives the namespace a loopback and one device with the node's address.
func network() error {
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return err
	}
	if err := netlink.LinkSetUp(lo); err != nil {
		return err
	}
	device := &netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: "node0"}}
	if err := netlink.LinkAdd(device); err != nil {
		return err
	}
	addr, err := netlink.ParseAddr(nodeIP + "/24")
	if err != nil {
		return err
	}
	if err := netlink.AddrAdd(device, addr); err != nil {
		return err
	}
	return netlink.LinkSetUp(device)
}

// needContainerd skips where containers cannot be run.
func needContainerd(t *testing.T) {
	t.Helper()
	if testing.Short() {
		t.Skip("runs real containers: not with -short")
	}
	if os.Geteuid() != 0 || os.Getenv(inNamespace) == "" {
		needs.Skip(t, "runs real containers: needs root and a network namespace")
	}
	for _, name := range []string{"containerd", "runc"} {
		if runtimeDir(t) != "" {
			break
		}
		if _, err := exec.LookPath(name); err != nil {
			t.Skipf("runs real containers: needs %s", name)
		}
	}
	if _, err := os.Stat(agent.DefaultCNIBin); err != nil {
		t.Skip("runs real containers: needs the CNI plugins")
	}
}

// runtimeEnv names the folder of the containerd and runc that the tests run, or is "system"
// for those of PATH. Default: what `make runtime` made, if it did.
const runtimeEnv = "TIMONEL_TEST_RUNTIME"

// runtimeDir is that folder, or empty for PATH.
func runtimeDir(t *testing.T) string {
	t.Helper()
	dir := os.Getenv(runtimeEnv)
	switch dir {
	case "system":
		return ""
	case "":
		dir = filepath.Join("..", "bin", "runtime")
		if _, err := os.Stat(filepath.Join(dir, "containerd")); err != nil {
			return ""
		}
	}
	dir, err := filepath.Abs(dir)
	require.NoError(t, err)
	return dir
}

// program is the path of containerd or runc as the tests run them.
func program(t *testing.T, name string) string {
	t.Helper()
	if dir := runtimeDir(t); dir != "" {
		return filepath.Join(dir, name)
	}
	path, err := exec.LookPath(name)
	require.NoError(t, err)
	return path
}

// images builds the image archives once for all tests.
var images = sync.OnceValues(func() (string, error) {
	dir, err := os.MkdirTemp("", "timonel-test-images-")
	if err != nil {
		return "", err
	}
	out, err := exec.Command("go", "run", "timonel/images/build", "-out", dir).CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("build images: %w: %s", err, out)
	}
	return dir, nil
})

// controller is a controller's end of the stream, in this process.
type controller struct {
	pb.UnimplementedAgentsServer
	t    *testing.T
	name string
	addr string
	stop func()

	mu       sync.Mutex
	changed  chan struct{} // closed and replaced at each change
	stream   grpc.BidiStreamingServer[pb.AgentMessage, pb.ControllerMessage]
	hello    *pb.Hello
	node     *corev1.Node
	csi      *storagev1.CSINode
	statuses map[string]*corev1.PodStatus // by uid
	history  map[string][]corev1.PodStatus
	gone     map[string]bool
	events   []*corev1.Event
	goodbyes int
	tunnels  map[string]chan grpc.BidiStreamingServer[pb.Chunk, pb.Chunk]
	revision int64

	pods    map[string]*corev1.Pod
	objects []*pb.ObjectSet
}

func newController(t *testing.T, name string, bundle *pki.Bundle) *controller {
	t.Helper()
	c := &controller{
		t: t, name: name, changed: make(chan struct{}), statuses: map[string]*corev1.PodStatus{}, history: map[string][]corev1.PodStatus{},
		gone: map[string]bool{}, tunnels: map[string]chan grpc.BidiStreamingServer[pb.Chunk, pb.Chunk]{}, pods: map[string]*corev1.Pod{}, revision: 1,
	}
	material, err := bundle.Controller(name, []net.IP{net.IPv4(127, 0, 0, 1)}, nil)
	require.NoError(t, err)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	c.addr = l.Addr().String()
	s := grpc.NewServer(append(pb.ServerOptions(), grpc.Creds(credentials.NewTLS(material.ClusterServerTLS())))...)
	pb.RegisterAgentsServer(s, c)
	go func() { _ = s.Serve(l) }()
	c.stop = sync.OnceFunc(s.Stop)
	t.Cleanup(c.stop)
	return c
}

func (c *controller) update(f func()) {
	c.mu.Lock()
	defer c.mu.Unlock()
	f()
	close(c.changed)
	c.changed = make(chan struct{})
}

// wait waits until ok, looked at after each message, says so.
func (c *controller) wait(what string, timeout time.Duration, ok func() bool) {
	c.t.Helper()
	deadline := time.After(timeout)
	for {
		c.mu.Lock()
		done, changed := ok(), c.changed
		c.mu.Unlock()
		if done {
			return
		}
		select {
		case <-changed:
		case <-deadline:
			c.mu.Lock()
			defer c.mu.Unlock()
			var b strings.Builder
			for uid, st := range c.statuses {
				fmt.Fprintf(&b, "\n%s %s", c.pods[uid].GetName(), describe(st))
			}
			for _, e := range c.events {
				fmt.Fprintf(&b, "\n  event %s %s: %s", e.InvolvedObject.Name, e.Reason, e.Message)
			}
			c.t.Fatalf("timed out after %s waiting for %s; statuses:%s", timeout, what, b.String())
		}
	}
}

func describe(st *corev1.PodStatus) string {
	var b strings.Builder
	fmt.Fprintf(&b, "phase=%s reason=%s ip=%s", st.Phase, st.Reason, st.PodIP)
	for _, cs := range append(append([]corev1.ContainerStatus{}, st.InitContainerStatuses...), st.ContainerStatuses...) {
		fmt.Fprintf(&b, " %s{ready=%v restarts=%d", cs.Name, cs.Ready, cs.RestartCount)
		switch {
		case cs.State.Waiting != nil:
			fmt.Fprintf(&b, " waiting %s %q", cs.State.Waiting.Reason, cs.State.Waiting.Message)
		case cs.State.Running != nil:
			b.WriteString(" running")
		case cs.State.Terminated != nil:
			fmt.Fprintf(&b, " terminated %s %d %q", cs.State.Terminated.Reason, cs.State.Terminated.ExitCode, cs.State.Terminated.Message)
		}
		b.WriteString("}")
	}
	return b.String()
}

// Connect implements the stream: a full list at first, then what tests push.
func (c *controller) Connect(stream grpc.BidiStreamingServer[pb.AgentMessage, pb.ControllerMessage]) error {
	first, err := stream.Recv()
	if err != nil {
		return err
	}
	c.mu.Lock()
	msgs := []*pb.ControllerMessage{
		{Message: &pb.ControllerMessage_Welcome{Welcome: &pb.Welcome{Controller: c.name, Epoch: "cluster-1", Full: true}}},
		{Message: &pb.ControllerMessage_Cluster{Cluster: &pb.Cluster{Routes: []*pb.NodeRoute{{NodeName: "a1", PodCidrs: []string{podCIDR}, NodeAddress: nodeIP}}}}},
	}
	for _, o := range c.objects {
		msgs = append(msgs, &pb.ControllerMessage{Message: &pb.ControllerMessage_ObjectSet{ObjectSet: o}})
	}
	for _, p := range c.pods {
		msgs = append(msgs, podSet(c.t, p, c.revision))
	}
	msgs = append(msgs, &pb.ControllerMessage{Message: &pb.ControllerMessage_Synced{Synced: &pb.Synced{Revision: c.revision}}})
	for _, m := range msgs {
		if err := stream.Send(m); err != nil {
			c.mu.Unlock()
			return err
		}
	}
	c.mu.Unlock()
	c.update(func() {
		c.stream, c.hello = stream, first.GetHello()
		c.node = &corev1.Node{}
		_ = c.node.Unmarshal(c.hello.GetNode())
	})
	defer c.update(func() { c.stream = nil })
	for {
		m, err := stream.Recv()
		if err != nil {
			return nil
		}
		c.receive(stream, m)
	}
}

func (c *controller) receive(stream grpc.BidiStreamingServer[pb.AgentMessage, pb.ControllerMessage], m *pb.AgentMessage) {
	c.update(func() {
		switch m := m.Message.(type) {
		case *pb.AgentMessage_NodeStatus:
			n := &corev1.Node{}
			_ = n.Unmarshal(m.NodeStatus.Node)
			c.node = n
		case *pb.AgentMessage_CsiNode:
			n := &storagev1.CSINode{}
			_ = n.Unmarshal(m.CsiNode.CsiNode)
			c.csi = n
		case *pb.AgentMessage_PodStatus:
			st := &corev1.PodStatus{}
			_ = st.Unmarshal(m.PodStatus.Status)
			c.statuses[m.PodStatus.Uid] = st
			c.history[m.PodStatus.Uid] = append(c.history[m.PodStatus.Uid], *st)
		case *pb.AgentMessage_PodTerminated:
			c.gone[m.PodTerminated.Uid] = true
		case *pb.AgentMessage_Event:
			e := &corev1.Event{}
			_ = e.Unmarshal(m.Event.Event)
			c.events = append(c.events, e)
		case *pb.AgentMessage_Goodbye:
			c.goodbyes++
		case *pb.AgentMessage_Request:
			tr := &authenticationv1.TokenRequest{Status: authenticationv1.TokenRequestStatus{
				Token: "token-for-" + m.Request.GetToken().ServiceAccount, ExpirationTimestamp: metav1.NewTime(time.Now().Add(time.Hour)),
			}}
			raw, _ := tr.Marshal()
			_ = stream.Send(&pb.ControllerMessage{Message: &pb.ControllerMessage_Reply{Reply: &pb.Reply{Id: m.Request.Id, Body: raw}}})
		}
	})
}

// Tunnel hands the agent's answer to whoever opened the tunnel.
func (c *controller) Tunnel(stream grpc.BidiStreamingServer[pb.Chunk, pb.Chunk]) error {
	md, _ := metadata.FromIncomingContext(stream.Context())
	id := md.Get(pb.TunnelIDKey)[0]
	c.mu.Lock()
	ch := c.tunnels[id]
	c.mu.Unlock()
	ch <- stream
	<-stream.Context().Done()
	return nil
}

// dial opens a tunnel to the agent's kubelet API.
func (c *controller) dial(ctx context.Context) (net.Conn, error) {
	id := uuid.NewString()
	ch := make(chan grpc.BidiStreamingServer[pb.Chunk, pb.Chunk], 1)
	c.mu.Lock()
	c.tunnels[id] = ch
	stream := c.stream
	c.mu.Unlock()
	if stream == nil {
		return nil, io.ErrUnexpectedEOF
	}
	if err := stream.Send(&pb.ControllerMessage{Message: &pb.ControllerMessage_TunnelOpen{TunnelOpen: &pb.TunnelOpen{Id: id, Target: "kubelet"}}}); err != nil {
		return nil, err
	}
	select {
	case <-ctx.Done():
		return nil, ctx.Err()
	case s := <-ch:
		near, far := net.Pipe()
		go func() {
			defer far.Close()
			for {
				m, err := s.Recv()
				if err != nil {
					return
				}
				if _, err := far.Write(m.Data); err != nil {
					return
				}
			}
		}()
		go func() {
			buf := make([]byte, 4096)
			for {
				n, err := far.Read(buf)
				if err != nil || s.Send(&pb.Chunk{Data: buf[:n]}) != nil {
					return
				}
			}
		}()
		return near, nil
	}
}

// http is a client of the agent's kubelet API.
func (c *controller) http() *http.Client {
	return &http.Client{Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext:       func(ctx context.Context, _, _ string) (net.Conn, error) { return c.dial(ctx) },
	}}
}

func (c *controller) get(path string) (int, string) {
	c.t.Helper()
	resp, err := c.http().Get("http://kubelet" + path)
	require.NoError(c.t, err)
	defer resp.Body.Close()
	raw, err := io.ReadAll(resp.Body)
	require.NoError(c.t, err)
	return resp.StatusCode, string(raw)
}

func podSet(t *testing.T, p *corev1.Pod, revision int64) *pb.ControllerMessage {
	raw, err := p.Marshal()
	require.NoError(t, err)
	return &pb.ControllerMessage{Message: &pb.ControllerMessage_PodSet{PodSet: &pb.PodSet{Pod: raw, Revision: revision}}}
}

// set binds a pod to the node, or changes it.
func (c *controller) set(p *corev1.Pod) {
	c.t.Helper()
	c.mu.Lock()
	defer c.mu.Unlock()
	c.revision++
	c.pods[string(p.UID)] = p
	if c.stream != nil {
		require.NoError(c.t, c.stream.Send(podSet(c.t, p, c.revision)))
	}
}

// object makes a ConfigMap or Secret known to the node.
func (c *controller) object(kind string, o interface{ Marshal() ([]byte, error) }) {
	c.t.Helper()
	raw, err := o.Marshal()
	require.NoError(c.t, err)
	c.mu.Lock()
	defer c.mu.Unlock()
	c.revision++
	set := &pb.ObjectSet{Kind: kind, Object: raw, Revision: c.revision}
	c.objects = append(c.objects, set)
	if c.stream != nil {
		require.NoError(c.t, c.stream.Send(&pb.ControllerMessage{Message: &pb.ControllerMessage_ObjectSet{ObjectSet: set}}))
	}
}

// delete asks for a graceful end and waits for it.
func (c *controller) delete(p *corev1.Pod, grace int64) {
	c.t.Helper()
	p = p.DeepCopy()
	end := metav1.NewTime(time.Now().Add(time.Duration(grace) * time.Second))
	p.DeletionTimestamp, p.DeletionGracePeriodSeconds = &end, &grace
	c.set(p)
	uid := string(p.UID)
	c.wait("pod "+p.Name+" to be gone", time.Duration(grace+30)*time.Second, func() bool { return c.gone[uid] })
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.pods, uid)
	c.revision++
	require.NoError(c.t, c.stream.Send(&pb.ControllerMessage{Message: &pb.ControllerMessage_PodRemove{PodRemove: &pb.PodRemove{
		Namespace: p.Namespace, Name: p.Name, Uid: uid, Revision: c.revision,
	}}}))
}

// until waits for a pod's status to be as wanted and returns it.
func (c *controller) until(p *corev1.Pod, what string, timeout time.Duration, ok func(*corev1.PodStatus) bool) *corev1.PodStatus {
	c.t.Helper()
	uid := string(p.UID)
	c.wait("pod "+p.Name+" to be "+what, timeout, func() bool { st := c.statuses[uid]; return st != nil && ok(st) })
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.statuses[uid]
}

func (c *controller) ready(p *corev1.Pod) *corev1.PodStatus {
	c.t.Helper()
	return c.until(p, "ready", 30*time.Second, isReady)
}

func isReady(st *corev1.PodStatus) bool {
	for _, cond := range st.Conditions {
		if cond.Type == corev1.PodReady {
			return cond.Status == corev1.ConditionTrue
		}
	}
	return false
}

// node is one agent under test, on a data folder that outlives restarts.
type testNode struct {
	t      *testing.T
	cfg    agent.Config
	cancel context.CancelFunc
	done   chan error
}

// cluster is a bundle with an agent a1 and as many controllers as named.
func cluster(t *testing.T, names ...string) (*testNode, []*controller) {
	t.Helper()
	needContainerd(t)
	imagesDir, err := images()
	require.NoError(t, err)
	bundle, err := pki.CreateBundle(filepath.Join(t.TempDir(), "bundle"))
	require.NoError(t, err)
	var list []*controller
	var addrs []string
	for _, name := range names {
		c := newController(t, name, bundle)
		list, addrs = append(list, c), append(addrs, c.addr)
	}
	req, err := pki.NewNodeRequest("a1")
	require.NoError(t, err)
	cert, err := bundle.SignNode(req.CSR, "a1")
	require.NoError(t, err)
	tlsConfig, err := (&pki.Node{CA: bundle.CA(), Pair: pki.KeyPair{Cert: cert, Key: req.Key}}).ClientTLS()
	require.NoError(t, err)

	// Not t.TempDir: mounts have to go before the folder does.
	dir, err := os.MkdirTemp("", "timonel-agent-")
	require.NoError(t, err)
	level := slog.LevelWarn
	if testing.Verbose() {
		level = slog.LevelInfo
	}
	n := &testNode{t: t, cfg: agent.Config{
		Name: "a1", DataDir: dir, Controllers: addrs, TLS: tlsConfig, NodeIPs: []net.IP{net.ParseIP(nodeIP)},
		ImagesDir: imagesDir, ContainerdBinary: program(t, "containerd"), KubernetesServiceIP: "10.96.0.1",
		Logger: slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: level})),
		// How full the disk of the machine is that tests run on is no matter of theirs.
		EvictionHard: "none", ImageGC: &imagegc.Policy{High: 100, Low: 80},
	}}
	t.Cleanup(func() {
		n.stop()
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		cfg := n.cfg
		cfg.SetDefaults()
		if err := agent.Cleanup(ctx, cfg, false); err != nil {
			t.Errorf("cleanup: %v", err)
		}
	})
	return n, list
}

func (n *testNode) start() {
	n.t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	a, err := agent.New(ctx, n.cfg)
	if err != nil {
		cancel()
	}
	require.NoError(n.t, err)
	n.cancel, n.done = cancel, make(chan error, 1)
	go func() { n.done <- a.Run(ctx) }()
}

func (n *testNode) stop() {
	if n.cancel == nil {
		return
	}
	n.cancel()
	if err := <-n.done; err != nil {
		n.t.Errorf("agent: %v", err)
	}
	n.cancel = nil
}

func newPod(name string, containers ...corev1.Container) *corev1.Pod {
	grace := int64(5)
	for i := range containers {
		c := &containers[i]
		if c.Image == "" {
			c.Image = "timonel/busybox"
		}
		if c.ImagePullPolicy == "" {
			c.ImagePullPolicy = corev1.PullIfNotPresent
		}
		if c.TerminationMessagePath == "" {
			c.TerminationMessagePath, c.TerminationMessagePolicy = "/dev/termination-log", corev1.TerminationMessageReadFile
		}
	}
	return &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: name, UID: types.UID(uuid.NewString()), Generation: 1, CreationTimestamp: metav1.Now()},
		Spec: corev1.PodSpec{
			NodeName: "a1", RestartPolicy: corev1.RestartPolicyAlways, DNSPolicy: corev1.DNSDefault, ServiceAccountName: "default",
			TerminationGracePeriodSeconds: &grace, Containers: containers,
		},
	}
}

func shell(name, script string) corev1.Container {
	return corev1.Container{Name: name, Command: []string{"sh", "-c", script}}
}
