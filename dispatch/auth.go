package dispatch

import (
	"context"
	"slices"
	"strings"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	healthv1 "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"

	"timonel/pki"
	pb "timonel/proto/timonel/v1"
)

// DialOptions are those of one client of a cluster port, TLS credentials aside.
func DialOptions() []grpc.DialOption { return pb.DialOptions() }

// TunnelDialOptions are those of a client of which only tunnels are asked.
func TunnelDialOptions() []grpc.DialOption { return pb.TunnelDialOptions() }

// callers are who may call a method. What is not listed is for controllers only.
var callers = map[string][]pki.Role{
	pb.Agents_Join_FullMethodName:    nil, // anybody: it checks the token
	pb.Agents_Connect_FullMethodName: {pki.RoleNode},
	pb.Agents_Tunnel_FullMethodName:  {pki.RoleNode},
	pb.Agents_Network_FullMethodName: {pki.RoleNode},
	pb.Peers_Status_FullMethodName:   {pki.RoleController, pki.RoleAdmin},
	// Who has heard nothing for a while asks, and the answer says that we are there.
	healthv1.Health_Check_FullMethodName: {pki.RoleNode, pki.RoleController, pki.RoleAdmin},
}

// mayCall says why the caller of a context may not call a method, by what it is and
// by what the state has revoked; nil if it may.
func (d *Dispatcher) mayCall(ctx context.Context, method string) error {
	if err := authorize(ctx, method); err != nil {
		return err
	}
	return d.checkCall(ctx)
}

func authorize(ctx context.Context, method string) error {
	allowed, listed := callers[method]
	if listed && allowed == nil {
		return nil
	}
	if !listed {
		allowed = []pki.Role{pki.RoleController}
	}
	id, err := caller(ctx)
	if err != nil {
		return err
	}
	if !slices.Contains(allowed, id.Role) {
		names := make([]string, len(allowed))
		for i, r := range allowed {
			names[i] = r.String()
		}
		return status.Errorf(codes.PermissionDenied, "%s is for a %s of this cluster; the caller is %s", method, strings.Join(names, " or "), id)
	}
	return nil
}

// caller is who is at the other end, by its certificate. Errors are gRPC statuses.
func caller(ctx context.Context) (pki.Identity, error) {
	id, err := pki.PeerIdentity(ctx)
	if err != nil {
		return id, status.Error(codes.Unauthenticated, err.Error())
	}
	return id, nil
}
