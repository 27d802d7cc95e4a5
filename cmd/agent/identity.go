package main

import (
	"context"
	"crypto/tls"
	"log/slog"
	"sync/atomic"
	"time"

	"timonel/pki"
	pb "timonel/proto/timonel/v1"
)

// renewRetry is how long a renewal that failed is not tried again, at most.
const renewRetry = 10 * time.Minute

// identity is the node's certificate, which is renewed while the agent runs.
type identity struct {
	node *pki.Node
	dir  string
	name string
	log  *slog.Logger
	tls  *tls.Config
	cert atomic.Pointer[tls.Certificate]
}

// newIdentity returns the identity whose tls shows the newest certificate to each
// new connection.
func newIdentity(node *pki.Node, dir, name string, log *slog.Logger) (*identity, error) {
	config, err := node.ClientTLS()
	if err != nil {
		return nil, err
	}
	i := &identity{node: node, dir: dir, name: name, log: log, tls: config}
	i.cert.Store(&config.Certificates[0])
	config.Certificates = nil
	config.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return i.cert.Load(), nil }
	return i, nil
}

// renew renews the certificate when two thirds of its life are over, by ask, until
// ctx ends. The stream goes on.
func (i *identity) renew(ctx context.Context, ask func(context.Context, *pb.JoinRequest) (*pb.JoinResponse, error)) {
	for {
		from, until, err := i.node.Validity()
		if err != nil {
			i.log.Error("the node's certificate cannot be renewed", "error", err)
			return
		}
		life := until.Sub(from)
		wait := time.Until(from.Add(life * 2 / 3))
		if !sleep(ctx, wait) {
			return
		}
		for {
			err := i.once(ctx, ask)
			if err == nil {
				break
			}
			if ctx.Err() != nil {
				return
			}
			i.log.Warn("the node's certificate was not renewed; trying again", "expires", until, "error", reason(err))
			if !sleep(ctx, min(renewRetry, life/50)) {
				return
			}
		}
	}
}

func (i *identity) once(ctx context.Context, ask func(context.Context, *pb.JoinRequest) (*pb.JoinResponse, error)) error {
	request, err := pki.NewNodeRequestFor(i.name, i.node.Pair.Key)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	answer, err := ask(ctx, &pb.JoinRequest{NodeName: i.name, Csr: request.CSR})
	if err != nil {
		return err
	}
	next := *i.node
	next.Pair.Cert = answer.Certificate
	cert, err := next.Pair.TLS()
	if err != nil {
		return err
	}
	if err := next.SaveCertificate(i.dir); err != nil {
		return err
	}
	i.node = &next
	i.cert.Store(&cert)
	i.log.Info("the node's certificate was renewed", "expires", cert.Leaf.NotAfter)
	return nil
}

func sleep(ctx context.Context, d time.Duration) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return true
	case <-ctx.Done():
		return false
	}
}
