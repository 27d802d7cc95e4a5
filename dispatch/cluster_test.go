package dispatch

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"
	certificatesv1beta1 "k8s.io/api/certificates/v1beta1"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	nodev1 "k8s.io/api/node/v1"
	storagev1 "k8s.io/api/storage/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/runtime/serializer/protobuf"
	"k8s.io/client-go/kubernetes/scheme"
	"k8s.io/client-go/rest"

	"timonel/gossip"
	"timonel/pki"
	pb "timonel/proto/timonel/v1"
	"timonel/state"
	"timonel/state/objects"
	"timonel/trust"
)

const patience = 20 * time.Second

// cluster is several controllers' dispatchers on one store, with an API of the
// few calls that agents need.
type cluster struct {
	t      *testing.T
	bundle *pki.Bundle
	store  *state.Store
	api    *fakeAPI
	gossip *fakeGossip
	trust  *trust.Registry

	mu          sync.Mutex
	nodes       map[string]pki.Node // who has a certificate
	index       uint64
	controllers map[string]*controller
	known       map[string][]string // the controllers that each real agent was told of
	gossipKeys  map[string][][]byte // that each real agent has kept
}

type controller struct {
	*Dispatcher
	addr    string
	server  *Port
	stop    func()
	barrier func(context.Context) error

	touch sync.Mutex
	lost  chan struct{}
	out   error // why it is out of touch
}

// cutOff makes a controller lose touch with the others.
func (k *controller) cutOff() {
	k.touch.Lock()
	defer k.touch.Unlock()
	k.out = errors.New("out of touch with the cluster")
	close(k.lost)
}

func (k *controller) inTouch() (<-chan struct{}, error) {
	k.touch.Lock()
	defer k.touch.Unlock()
	return k.lost, k.out
}

func newCluster(t *testing.T, names ...string) *cluster {
	t.Helper()
	bundle, err := pki.CreateBundle(filepath.Join(t.TempDir(), "pki"))
	require.NoError(t, err)
	c := &cluster{t: t, bundle: bundle, store: state.New(state.Options{}), gossip: newFakeGossip(), controllers: make(map[string]*controller),
		known: make(map[string][]string), gossipKeys: make(map[string][][]byte)}
	c.nodes = make(map[string]pki.Node)
	c.trust = trust.New(trust.Config{State: committer{c}, Vault: bundle})
	c.api = &fakeAPI{c: c}
	for _, name := range names {
		c.start(name)
	}
	return c
}

// start runs one controller until the test ends or it is stopped.
func (c *cluster) start(name string) *controller {
	c.t.Helper()
	identity, err := c.bundle.Controller(name, nil, nil)
	require.NoError(c.t, err)
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(c.t, err)
	ctx, cancel := context.WithCancel(context.Background())
	cache := objects.NewCache(c.store)
	k := &controller{addr: listener.Addr().String(), barrier: func(context.Context) error { return nil }, lost: make(chan struct{})}
	conns := make(map[string]*grpc.ClientConn)
	var connsMu sync.Mutex
	k.Dispatcher, err = New(Config{
		Name: name, ClusterID: c.bundle.ClusterID(), Store: c.store, Objects: cache,
		Barrier: func(ctx context.Context) error { return k.barrier(ctx) },
		InTouch: k.inTouch,
		API:     func(node string) *rest.Config { return c.api.config(node) },
		Bundle:  c.bundle, Trust: c.trust, Gossip: c.gossip,
		PeerConn: func(_ context.Context, peer string) (grpc.ClientConnInterface, error) {
			connsMu.Lock()
			defer connsMu.Unlock()
			if conns[peer] != nil {
				return conns[peer], nil
			}
			addr := c.addr(peer)
			if addr == "" {
				return nil, errors.New("no such controller")
			}
			conn, err := grpc.NewClient("passthrough:///"+addr, append(DialOptions(),
				grpc.WithTransportCredentials(credentials.NewTLS(identity.ClusterClientTLS())))...)
			conns[peer] = conn
			return conn, err
		},
		Controllers: func() []string { return c.addrs() },
		Status:      func(context.Context) *pb.StatusResponse { return &pb.StatusResponse{Name: name} },
		Network:     testNetwork,
		Logger:      slog.New(slog.DiscardHandler),
	})
	require.NoError(c.t, err)
	k.server = k.NewPort(identity.ClusterServerTLS())
	k.server.Register(k.Register)
	var work sync.WaitGroup
	work.Go(func() { _ = cache.Run(ctx) })
	work.Go(func() { _ = k.Run(ctx) })
	work.Go(func() { _ = k.server.Serve(listener) })
	var once sync.Once
	k.stop = func() {
		once.Do(func() {
			c.gossip.set(gossip.Member{Name: name, Role: gossip.RoleController, State: gossip.Dead})
			cancel()
			k.server.Stop()
			work.Wait()
			connsMu.Lock()
			defer connsMu.Unlock()
			for _, conn := range conns {
				conn.Close()
			}
		})
	}
	c.t.Cleanup(k.stop)
	c.mu.Lock()
	c.controllers[name] = k
	c.mu.Unlock()
	c.gossip.set(gossip.Member{Name: name, Role: gossip.RoleController, State: gossip.Alive, Addr: "127.0.0.1:7946"})
	require.Eventually(c.t, func() bool { return k.running.Load() != nil }, patience, time.Millisecond)
	return k
}

func (c *cluster) tell(agent string, controllers []string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.known[agent] = controllers
}

func (c *cluster) knownTo(agent string) []string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.known[agent]
}

// keep is what a real agent does with keys of gossip.
func (c *cluster) keep(agent string, keys [][]byte) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.gossipKeys[agent] = keys
	return nil
}

// kept names the keys of gossip that a real agent has kept.
func (c *cluster) kept(agent string) []string {
	c.mu.Lock()
	defer c.mu.Unlock()
	if keys := c.gossipKeys[agent]; keys != nil {
		return pki.GossipKeyIDs(keys)
	}
	return []string{pki.GossipKeyID(c.bundle.GossipKey())}
}

func (c *cluster) addr(name string) string {
	c.mu.Lock()
	defer c.mu.Unlock()
	if k := c.controllers[name]; k != nil {
		return k.addr
	}
	return ""
}

func (c *cluster) addrs() (out []string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, k := range c.controllers {
		out = append(out, k.addr)
	}
	return out
}

// put writes an object as the API server would, and returns its revision.
func (c *cluster) put(o runtime.Object) int64 {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.apply(state.Change{Key: keyOf(o), Value: encode(c.t, o)})
}

func (c *cluster) remove(o runtime.Object) int64 {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.apply(state.Change{Key: keyOf(o), Delete: true})
}

// apply commits a change. The caller holds c.mu.
func (c *cluster) apply(change state.Change) int64 {
	c.index++
	txn := state.Txn{Changes: []state.Change{change}}
	return c.store.ApplyBatch([]state.Entry{{Index: c.index, Term: 1, Command: txn.Marshal()}})[0].Revision
}

func keyOf(o runtime.Object) string {
	m := o.(metav1.Object)
	switch o.(type) {
	case *corev1.Pod:
		return "/registry/pods/" + m.GetNamespace() + "/" + m.GetName()
	case *corev1.Node:
		return "/registry/minions/" + m.GetName()
	case *corev1.ConfigMap:
		return "/registry/configmaps/" + m.GetNamespace() + "/" + m.GetName()
	case *corev1.Secret:
		return "/registry/secrets/" + m.GetNamespace() + "/" + m.GetName()
	case *certificatesv1beta1.ClusterTrustBundle:
		return "/registry/clustertrustbundles/" + m.GetName()
	case *nodev1.RuntimeClass:
		return "/registry/runtimeclasses/" + m.GetName()
	case *certificatesv1beta1.PodCertificateRequest:
		return "/registry/podcertificaterequests/" + m.GetNamespace() + "/" + m.GetName()
	case *storagev1.CSIDriver:
		return "/registry/csidrivers/" + m.GetName()
	case *storagev1.VolumeAttachment:
		return "/registry/volumeattachments/" + m.GetName()
	case *corev1.PersistentVolumeClaim:
		return "/registry/persistentvolumeclaims/" + m.GetNamespace() + "/" + m.GetName()
	case *corev1.PersistentVolume:
		return "/registry/persistentvolumes/" + m.GetName()
	case *corev1.ServiceAccount:
		return "/registry/serviceaccounts/" + m.GetNamespace() + "/" + m.GetName()
	case *corev1.Service:
		return "/registry/services/specs/" + m.GetNamespace() + "/" + m.GetName()
	case *networkingv1.NetworkPolicy:
		return "/registry/networkpolicies/" + m.GetNamespace() + "/" + m.GetName()
	case *corev1.Event:
		return "/registry/events/" + m.GetNamespace() + "/" + m.GetName()
	}
	panic(fmt.Sprintf("no key for %T", o))
}

func encode(t *testing.T, o runtime.Object) []byte {
	o = o.DeepCopyObject()
	o.(metav1.Object).SetResourceVersion("")
	s := protobuf.NewSerializer(scheme.Scheme, scheme.Scheme)
	var out bytes.Buffer
	require.NoError(t, scheme.Codecs.EncoderForVersion(s, schema.GroupVersions{corev1.SchemeGroupVersion, networkingv1.SchemeGroupVersion, certificatesv1beta1.SchemeGroupVersion, nodev1.SchemeGroupVersion, storagev1.SchemeGroupVersion}).Encode(o, &out))
	return out.Bytes()
}

// agent is a test's end of a stream.
type agent struct {
	t      *testing.T
	name   string
	conn   *grpc.ClientConn
	stream grpc.BidiStreamingClient[pb.AgentMessage, pb.ControllerMessage]
	cancel context.CancelFunc
	got    chan *pb.ControllerMessage
	err    error // why got was closed
	serve  func(net.Conn)
	synced int64                  // of the last batch
	pods   map[string]*pb.HavePod // what it has, from the batches it read
	objs   map[string]*pb.HaveObject
	hold   sync.Mutex
}

func nodeObject(name string) *corev1.Node {
	return &corev1.Node{
		ObjectMeta: metav1.ObjectMeta{
			Name: name, Labels: map[string]string{"kubernetes.io/hostname": name},
			Annotations: map[string]string{gossipAnnotation: net.JoinHostPort(nodeAddress(name), "27946")},
		},
		Status: corev1.NodeStatus{
			Addresses:  []corev1.NodeAddress{{Type: corev1.NodeInternalIP, Address: nodeAddress(name)}},
			Conditions: []corev1.NodeCondition{{Type: corev1.NodeReady, Status: corev1.ConditionTrue, Reason: "AgentReady"}},
		},
	}
}

// committer is the state as the registry changes it.
type committer struct{ c *cluster }

func (s committer) Store() *state.Store               { return s.c.store }
func (s committer) ReadBarrier(context.Context) error { return nil }

func (s committer) Commit(_ context.Context, txn *state.Txn) (state.Result, error) {
	s.c.mu.Lock()
	defer s.c.mu.Unlock()
	s.c.index++
	return s.c.store.ApplyBatch([]state.Entry{{Index: s.c.index, Term: 1, Command: txn.Marshal()}})[0], nil
}

// credentials are those of a node, made at the first call as if it had joined
// before names were bound.
func (c *cluster) credentials(name string) pki.Node {
	c.t.Helper()
	c.mu.Lock()
	defer c.mu.Unlock()
	if node, ok := c.nodes[name]; ok {
		return node
	}
	c.nodes[name] = c.newCredentials(name)
	return c.nodes[name]
}

func (c *cluster) newCredentials(name string) pki.Node {
	c.t.Helper()
	request, err := pki.NewNodeRequest(name)
	require.NoError(c.t, err)
	cert, err := c.bundle.SignNode(request.CSR, name)
	require.NoError(c.t, err)
	return pki.Node{CA: c.bundle.CA(), Pair: pki.KeyPair{Cert: cert, Key: request.Key}, GossipKeys: [][]byte{c.bundle.GossipKey()}}
}

func (c *cluster) nodeTLS(name string) *tls.Config {
	c.t.Helper()
	return tlsOf(c.t, c.credentials(name))
}

func tlsOf(t *testing.T, node pki.Node) *tls.Config {
	t.Helper()
	config, err := node.ClientTLS()
	require.NoError(t, err)
	return config
}

func (c *cluster) dial(controller string, config *tls.Config) *grpc.ClientConn {
	c.t.Helper()
	conn, err := grpc.NewClient("passthrough:///"+c.addr(controller), append(DialOptions(), grpc.WithTransportCredentials(credentials.NewTLS(config)))...)
	require.NoError(c.t, err)
	c.t.Cleanup(func() { conn.Close() })
	return conn
}

// connect opens an agent's stream to a controller with the given Hello.
func (c *cluster) connect(controller string, hello *pb.Hello) *agent {
	c.t.Helper()
	return c.connectAs(controller, hello, c.nodeTLS(hello.NodeName))
}

// noInstance is that of an agent of before there were instances. One of which a test
// says nothing has the same in all its streams.
const noInstance = "none"

// connectAs opens an agent's stream with the given certificate.
func (c *cluster) connectAs(controller string, hello *pb.Hello, config *tls.Config) *agent {
	c.t.Helper()
	if hello.Node == nil {
		raw, err := nodeObject(hello.NodeName).Marshal()
		require.NoError(c.t, err)
		hello.Node = raw
	}
	switch hello.Instance {
	case "":
		hello.Instance = "the agent's"
	case noInstance:
		hello.Instance = ""
	}
	a := &agent{t: c.t, name: hello.NodeName, got: make(chan *pb.ControllerMessage, 1024), pods: map[string]*pb.HavePod{}, objs: map[string]*pb.HaveObject{}}
	a.conn = c.dial(controller, config)
	ctx, cancel := context.WithCancel(context.Background())
	a.cancel = cancel
	c.t.Cleanup(cancel)
	var err error
	a.stream, err = pb.NewAgentsClient(a.conn).Connect(ctx, grpc.WaitForReady(true)) // a handshake may take long on a busy machine
	require.NoError(c.t, err)
	if err = a.stream.Send(&pb.AgentMessage{Message: &pb.AgentMessage_Hello{Hello: hello}}); err != io.EOF { // it ended already: Recv says why
		require.NoError(c.t, err)
	}
	go func() {
		defer close(a.got)
		for {
			m, err := a.stream.Recv()
			func() { // a test whose agent reads nothing holds the lock
				a.hold.Lock()
				defer a.hold.Unlock()
			}()
			if err != nil {
				a.err = err
				return
			}
			if open := m.GetTunnelOpen(); open != nil && a.serve != nil {
				go a.tunnel(ctx, open)
				continue
			}
			a.got <- m
		}
	}()
	return a
}

// tunnel dials back and serves the connection with a.serve.
func (a *agent) tunnel(ctx context.Context, open *pb.TunnelOpen) {
	stream, err := pb.NewAgentsClient(a.conn).Tunnel(metadata.AppendToOutgoingContext(ctx, pb.TunnelIDKey, open.Id))
	if err != nil {
		return
	}
	conn := newStreamConn(stream, "controller")
	a.serve(conn)
	conn.Close()
	conn.flush()
	_ = stream.CloseSend()
	conn.drain()
}

func (a *agent) say(m *pb.AgentMessage) {
	a.t.Helper()
	require.NoError(a.t, a.stream.Send(m))
}

// batch reads up to and including the next Synced and describes each message.
func (a *agent) batch() []string {
	a.t.Helper()
	var out []string
	timeout := time.After(patience)
	for {
		select {
		case m, ok := <-a.got:
			if !ok {
				a.t.Fatalf("the stream ended after %q: %v", out, a.err)
			}
			a.take(m)
			if line := describe(a.t, m); line != "" {
				out = append(out, line)
			}
			if m.GetSynced() != nil {
				a.synced = m.GetSynced().Revision
				return out
			}
		case <-timeout:
			a.t.Fatalf("nothing more came after %q", out)
		}
	}
}

// end waits until the stream has ended and returns why.
func (a *agent) end() error {
	a.t.Helper()
	timeout := time.After(patience)
	for {
		select {
		case _, ok := <-a.got:
			if !ok {
				return a.err
			}
		case <-timeout:
			a.t.Fatal("the stream did not end")
		}
	}
}

func describe(t *testing.T, m *pb.ControllerMessage) string {
	switch m := m.GetMessage().(type) {
	case *pb.ControllerMessage_Welcome:
		return fmt.Sprintf("welcome from %s full=%t", m.Welcome.Controller, m.Welcome.Full)
	case *pb.ControllerMessage_Synced:
		return "synced"
	case *pb.ControllerMessage_PodSet:
		pod := &corev1.Pod{}
		require.NoError(t, pod.Unmarshal(m.PodSet.Pod))
		line := fmt.Sprintf("pod %s/%s uid=%s rev=%s resume=%d", pod.Namespace, pod.Name, pod.UID, pod.ResourceVersion, m.PodSet.Revision)
		if n := m.PodSet.GetPolicies(); n != 0 {
			line += fmt.Sprintf(" policies=%d", n)
		}
		return line
	case *pb.ControllerMessage_PodRemove:
		return fmt.Sprintf("remove pod %s/%s uid=%s", m.PodRemove.Namespace, m.PodRemove.Name, m.PodRemove.Uid)
	case *pb.ControllerMessage_ObjectSet:
		var o interface {
			metav1.Object
			Unmarshal([]byte) error
		}
		switch m.ObjectSet.Kind {
		case kindConfigMap:
			o = &corev1.ConfigMap{}
		case kindSecret:
			o = &corev1.Secret{}
		case kindClaim:
			o = &corev1.PersistentVolumeClaim{}
		case kindVolume:
			o = &corev1.PersistentVolume{}
		case kindRuntimeClass:
			o = &nodev1.RuntimeClass{}
		case kindDriver:
			o = &storagev1.CSIDriver{}
		case kindAttachment:
			o = &storagev1.VolumeAttachment{}
		default:
			o = &corev1.ServiceAccount{}
		}
		require.NoError(t, o.Unmarshal(m.ObjectSet.Object))
		return fmt.Sprintf("%s %s/%s rev=%s", m.ObjectSet.Kind, o.GetNamespace(), o.GetName(), o.GetResourceVersion())
	case *pb.ControllerMessage_ObjectRemove:
		return fmt.Sprintf("remove %s %s/%s", m.ObjectRemove.Kind, m.ObjectRemove.Namespace, m.ObjectRemove.Name)
	}
	return "" // Cluster comes when it comes
}

// nodeAddress is a node's own (RFC 5737): the nodes are called a1, a2 and so on.
func nodeAddress(name string) string {
	n := 200
	for _, r := range name {
		n = (n*31 + int(r)) % 150
	}
	return fmt.Sprintf("198.51.100.%d", n+1)
}
