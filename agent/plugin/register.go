package plugin

import (
	"context"
	"fmt"
	"net"
	"slices"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials/insecure"
	registration "k8s.io/kubelet/pkg/apis/pluginregistration/v1"

	"timonel/agent/hostile"
)

// As the kubelet has them (pkg/kubelet/pluginmanager/operationexecutor), but for more
// time to answer on a node that is busy.
const (
	infoTimeout   = 5 * time.Second
	notifyTimeout = 5 * time.Second
	// registerTimeout bounds what a handler asks a plugin for.
	registerTimeout = 2 * time.Minute
)

const (
	// maxAnswer bounds what a plugin says of itself, in bytes.
	maxAnswer = 64 << 10
	// maxReason bounds what it is told of why it was not taken.
	maxReason   = 1 << 10
	maxName     = 253
	maxEndpoint = 4096
	maxVersions = 32
)

// register asks a socket what it is, hands it to its type's handler and tells it the
// outcome.
func (w *Watcher) register(ctx context.Context, name string) (Plugin, Handler, error) {
	p := Plugin{Socket: name}
	conn, err := Dial(w.cfg.Dir, name, maxAnswer)
	if err != nil {
		return p, nil, err
	}
	defer conn.Close()
	client := registration.NewRegistrationClient(conn)
	asked, cancel := context.WithTimeout(ctx, infoTimeout)
	info, err := client.GetInfo(asked, &registration.InfoRequest{})
	cancel()
	if err != nil {
		return p, nil, fmt.Errorf("ask %s what it is: %w", name, err)
	}
	p.Type, p.Name, p.Endpoint, p.Versions = info.Type, info.Name, info.Endpoint, slices.Clone(info.SupportedVersions)
	h, err := w.take(ctx, p)
	status := &registration.RegistrationStatus{PluginRegistered: err == nil}
	if err != nil {
		status.Error = truncate(err.Error(), maxReason)
	}
	told, cancel := context.WithTimeout(context.WithoutCancel(ctx), notifyTimeout)
	_, tellErr := client.NotifyRegistrationStatus(told, status)
	cancel()
	if err == nil && tellErr != nil { // it does not know that it was taken
		h.Deregister(p)
		err = fmt.Errorf("tell %s that it is registered: %w", name, tellErr)
	}
	if err != nil {
		return p, nil, err
	}
	return p, h, nil
}

func (w *Watcher) take(ctx context.Context, p Plugin) (Handler, error) {
	h := w.cfg.Handlers[p.Type]
	switch {
	case h == nil:
		return nil, fmt.Errorf("RegisterPlugin error -- no handler registered for plugin type: %s at socket %s", truncate(p.Type, maxName), p.Socket)
	case p.Name == "" || len(p.Name) > maxName || strings.ContainsAny(p.Name, "/\x00"):
		return nil, fmt.Errorf("plugin at socket %s: its name of %d bytes is none: want 1 to %d without /", p.Socket, len(p.Name), maxName)
	case len(p.Endpoint) > maxEndpoint || strings.ContainsRune(p.Endpoint, 0):
		return nil, fmt.Errorf("plugin %s at socket %s: its endpoint of %d bytes is no path", p.Name, p.Socket, len(p.Endpoint))
	case len(p.Versions) > maxVersions:
		return nil, fmt.Errorf("plugin %s at socket %s: it names %d versions, %d are read", p.Name, p.Socket, len(p.Versions), maxVersions)
	}
	ctx, cancel := context.WithTimeout(ctx, registerTimeout)
	defer cancel()
	if err := h.Register(ctx, p); err != nil {
		return nil, fmt.Errorf("RegisterPlugin error -- plugin registration failed with err: %w", err)
	}
	return h, nil
}

// Dial returns a connection to the socket called name, beneath a folder, made when it is
// first used. The socket is looked up each time, and no link is followed. Messages of more
// than maxBytes are refused.
func Dial(dir, name string, maxBytes int) (*grpc.ClientConn, error) {
	conn, err := grpc.NewClient("passthrough:///plugin",
		grpc.WithAuthority("localhost"),
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxBytes)),
		grpc.WithMaxHeaderListSize(uint32(min(maxBytes, maxAnswer))),
		grpc.WithDisableServiceConfig(),
		// One that was started anew is found soon.
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff: backoff.Config{BaseDelay: 100 * time.Millisecond, Multiplier: 1.6, Jitter: 0.2, MaxDelay: time.Second}, MinConnectTimeout: 5 * time.Second,
		}),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
			root, err := hostile.OpenRoot(dir)
			if err != nil {
				return nil, err
			}
			defer root.Close()
			return root.DialUnix(ctx, name)
		}))
	if err != nil {
		return nil, fmt.Errorf("connect to %s: %w", name, err)
	}
	return conn, nil
}

func truncate(s string, n int) string {
	if len(s) > n {
		return strings.ToValidUTF8(s[:n], "") + "..."
	}
	return s
}
