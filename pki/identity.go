package pki

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"slices"
	"strings"

	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"
)

// Subjects of the cluster's certificates.
const (
	ControllerPrefix = "timonel:controller:"
	ControllerGroup  = "timonel:controllers"
	NodePrefix       = "system:node:"
	NodeGroup        = "system:nodes"
	AdminGroup       = "system:masters"
)

// Role says what a certificate's owner is.
type Role int

// The roles that a certificate can give.
const (
	RoleNone       Role = iota // no certificate, or one of somebody else
	RoleController             // a controller of this cluster
	RoleNode                   // an agent of this cluster
	RoleAdmin                  // a person in group system:masters
)

func (r Role) String() string {
	switch r {
	case RoleController:
		return "controller"
	case RoleNode:
		return "node"
	case RoleAdmin:
		return "admin"
	}
	return "nobody"
}

// Identity is who a certificate belongs to.
type Identity struct {
	Role Role
	Name string // of the controller, node or user, without prefix
}

func (i Identity) String() string {
	if i.Role == RoleNone {
		return "a caller without a certificate of this cluster"
	}
	return i.Role.String() + " " + i.Name
}

// IdentityOf reads the identity in a certificate's subject. The certificate must
// have been verified already.
func IdentityOf(cert *x509.Certificate) Identity {
	cn, groups := cert.Subject.CommonName, cert.Subject.Organization
	if name, ok := strings.CutPrefix(cn, ControllerPrefix); ok && name != "" && slices.Contains(groups, ControllerGroup) {
		return Identity{RoleController, name}
	}
	if name, ok := strings.CutPrefix(cn, NodePrefix); ok && name != "" && slices.Contains(groups, NodeGroup) {
		return Identity{RoleNode, name}
	}
	if slices.Contains(groups, AdminGroup) {
		return Identity{RoleAdmin, cn}
	}
	return Identity{}
}

// PeerIdentity reads who called a gRPC method. A caller without a certificate
// has RoleNone and no error; an error means that the call came without TLS.
func PeerIdentity(ctx context.Context) (Identity, error) {
	cert, err := PeerCertificate(ctx)
	if cert == nil {
		return Identity{}, err
	}
	return IdentityOf(cert), nil
}

// PeerCertificate is the verified certificate of who called a gRPC method, nil for
// a caller without one; an error means that the call came without TLS.
func PeerCertificate(ctx context.Context) (*x509.Certificate, error) {
	p, ok := peer.FromContext(ctx)
	if !ok {
		return nil, errors.New("the call has no peer")
	}
	info, ok := p.AuthInfo.(credentials.TLSInfo)
	if !ok {
		return nil, fmt.Errorf("the call from %s did not come over TLS", p.Addr)
	}
	if len(info.State.VerifiedChains) == 0 || len(info.State.VerifiedChains[0]) == 0 {
		return nil, nil
	}
	return info.State.VerifiedChains[0][0], nil
}
