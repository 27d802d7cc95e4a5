package containerd

import (
	"context"
	"fmt"
	"net"
	"time"

	"github.com/containerd/containerd/v2/client"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	runtimev1 "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// maxMessage is the largest CRI message that is accepted, as the kubelet's.
const maxMessage = 16 << 20

// Runtime speaks to one containerd: CRI and containerd's own API over the same
// connection. It reconnects by itself when containerd comes back.
type Runtime struct {
	runtimev1.RuntimeServiceClient
	Images runtimev1.ImageServiceClient

	conn   *grpc.ClientConn
	client *client.Client
	socket string
}

// Dial connects to the containerd that serves socket and checks that it offers
// CRI v1.
func Dial(ctx context.Context, socket string) (*Runtime, error) {
	conn, err := dial(socket)
	if err != nil {
		return nil, err
	}
	c, err := client.NewWithConn(conn, client.WithDefaultNamespace(Namespace))
	if err != nil {
		conn.Close()
		return nil, fmt.Errorf("containerd client: %w", err)
	}
	r := &Runtime{
		RuntimeServiceClient: runtimev1.NewRuntimeServiceClient(conn),
		Images:               runtimev1.NewImageServiceClient(conn),
		conn:                 conn, client: c, socket: socket,
	}
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	if _, err := r.waitVersion(ctx); err != nil {
		conn.Close()
		return nil, fmt.Errorf("containerd at %s does not answer CRI v1 (is its cri plugin disabled?): %w", socket, err)
	}
	return r, nil
}

// Close ends the connection.
func (r *Runtime) Close() error { return r.conn.Close() }

// waitVersion asks for the version until CRI has started or ctx has ended.
func (r *Runtime) waitVersion(ctx context.Context) (*runtimev1.VersionResponse, error) {
	for {
		v, err := r.Version(ctx, &runtimev1.VersionRequest{})
		switch {
		case err == nil:
			return v, nil
		case ctx.Err() != nil:
			return nil, err
		case status.Code(err) == codes.Unimplemented:
			return nil, err
		}
		select {
		case <-ctx.Done():
			return nil, err
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// Ping returns nil when the socket is served by a containerd whose CRI answers.
func Ping(ctx context.Context, socket string) error {
	conn, err := dial(socket)
	if err != nil {
		return err
	}
	defer conn.Close()
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	_, err = runtimev1.NewRuntimeServiceClient(conn).Version(ctx, &runtimev1.VersionRequest{})
	return err
}

// Unavailable says whether err means that containerd could not be reached, so
// that the same call may succeed once it is back.
func Unavailable(err error) bool {
	return status.Code(err) == codes.Unavailable
}

// NotFound says whether err means that the thing asked for is not there.
func NotFound(err error) bool {
	return status.Code(err) == codes.NotFound
}

func dial(socket string) (*grpc.ClientConn, error) {
	conn, err := grpc.NewClient("passthrough:///"+socket,
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, "unix", socket)
		}),
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           backoff.Config{BaseDelay: 50 * time.Millisecond, Multiplier: 1.5, Jitter: 0.2, MaxDelay: time.Second},
			MinConnectTimeout: 5 * time.Second,
		}),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxMessage), grpc.MaxCallSendMsgSize(maxMessage)),
	)
	if err != nil {
		return nil, fmt.Errorf("containerd socket %s: %w", socket, err)
	}
	return conn, nil
}
