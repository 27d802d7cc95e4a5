package apiserver

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"strconv"
	"sync"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/kubernetes/pkg/apis/core"
	"k8s.io/kubernetes/pkg/cluster/ports"
	kubelet "k8s.io/kubernetes/pkg/kubelet/client"
)

// kubeletPlaceholder stands in URLs for a node that reports no address. Nothing
// connects to it, but upstream wants a unicast address; this one is reserved for
// documentation (RFC 5737).
const kubeletPlaceholder = "192.0.2.1"

// kubelets connects to nodes' kubelet APIs through their agents' streams. It
// implements kubelet.ConnectionInfoGetter.
type kubelets struct {
	dial  func(ctx context.Context, node string) (net.Conn, error)
	nodes interface {
		Get(ctx context.Context, name string, options *metav1.GetOptions) (runtime.Object, error)
	}

	mu         sync.Mutex
	transports map[types.NodeName]*http.Transport
}

// GetConnectionInfo implements kubelet.ConnectionInfoGetter. The scheme is plain
// HTTP: the stream below is mutually authenticated TLS already.
func (k *kubelets) GetConnectionInfo(ctx context.Context, name types.NodeName) (*kubelet.ConnectionInfo, error) {
	object, err := k.nodes.Get(ctx, string(name), &metav1.GetOptions{})
	if err != nil {
		if apierrors.IsNotFound(err) {
			k.forget(name)
		}
		return nil, err
	}
	node, ok := object.(*core.Node)
	if !ok {
		return nil, fmt.Errorf("node %s is stored as %T", name, object)
	}
	if k.dial == nil {
		return nil, apierrors.NewServiceUnavailable(fmt.Sprintf("this controller cannot reach the kubelet API of node %s: it has no DialKubelet", name))
	}
	port := int(node.Status.DaemonEndpoints.KubeletEndpoint.Port)
	if port <= 0 {
		port = ports.KubeletPort
	}
	transport := endsApart{k.transport(name)}
	return &kubelet.ConnectionInfo{
		Scheme:                         "http",
		Hostname:                       nodeAddress(node),
		Port:                           strconv.Itoa(port),
		Transport:                      transport,
		InsecureSkipTLSVerifyTransport: transport,
		NodeFeatures:                   node.Status.DeclaredFeatures,
	}, nil
}

// nodeAddress returns an IP address of the node, for URLs only.
func nodeAddress(node *core.Node) string {
	for _, kind := range []core.NodeAddressType{core.NodeInternalIP, core.NodeExternalIP} {
		for _, address := range node.Status.Addresses {
			if ip := net.ParseIP(address.Address); address.Type == kind && ip != nil && ip.IsGlobalUnicast() {
				return address.Address
			}
		}
	}
	return kubeletPlaceholder
}

// transport returns the node's own: whatever the URL says, it connects to that
// node.
func (k *kubelets) transport(name types.NodeName) *http.Transport {
	k.mu.Lock()
	defer k.mu.Unlock()
	if transport, ok := k.transports[name]; ok {
		return transport
	}
	transport := &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			conn, err := k.dial(ctx, string(name))
			if err != nil {
				return nil, fmt.Errorf("connect to the kubelet API of node %s: %w", name, err)
			}
			return tieConn(ctx, newHeaded(conn, string(name)), func(err error) error {
				return fmt.Errorf("the connection to node %s broke, and what was started there may still run: %w", name, err)
			}), nil
		},
		MaxIdleConnsPerHost:    2,
		IdleConnTimeout:        30 * time.Second,
		MaxResponseHeaderBytes: maxAnswerHead,
	}
	if k.transports == nil {
		k.transports = map[types.NodeName]*http.Transport{}
	}
	k.transports[name] = transport
	return transport
}

// endsApart gives the end of an answer by itself, and not with the last of its bytes:
// upstream loses those when it sends logs on by WebSocket.
type endsApart struct{ transport *http.Transport }

// RoundTrip implements http.RoundTripper.
func (t endsApart) RoundTrip(r *http.Request) (*http.Response, error) {
	resp, err := t.transport.RoundTrip(r)
	if err == nil && resp.StatusCode != http.StatusSwitchingProtocols {
		resp.Body = apart{resp.Body}
	}
	return resp, err
}

// WrappedRoundTripper is for those who look for a way to dial.
func (t endsApart) WrappedRoundTripper() http.RoundTripper { return t.transport }

type apart struct{ io.ReadCloser }

func (b apart) Read(p []byte) (int, error) {
	n, err := b.ReadCloser.Read(p)
	if n > 0 && err == io.EOF {
		err = nil // the next call gives it
	}
	return n, err
}

// forget drops what is kept for a node that is gone.
func (k *kubelets) forget(name types.NodeName) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if transport, ok := k.transports[name]; ok {
		transport.CloseIdleConnections()
		delete(k.transports, name)
	}
}
