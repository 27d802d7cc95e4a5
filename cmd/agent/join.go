package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/status"

	"timonel/pki"
	pb "timonel/proto/timonel/v1"
)

// joinPatience is for how long an agent with a good token waits for a cluster
// that is still starting.
const joinPatience = 2 * time.Minute

// membership is what an agent knows of its cluster after joining.
type membership struct {
	node  *pki.Node
	peers peers
}

// peers are kept beside the credentials.
type peers struct {
	Controllers []string `json:"controllers"`
	Gossip      []string `json:"gossip"`
}

func credentialsDir(dataDir string) string { return filepath.Join(dataDir, "pki") }
func peersFile(dataDir string) string      { return filepath.Join(dataDir, "pki", "peers.json") }

// readToken returns the token given with --token, from a file for @FILE. ok is
// false when none was given.
func (o *options) readToken() (token pki.Token, ok bool, err error) {
	text := o.token
	if text == "" {
		return pki.Token{}, false, nil
	}
	if file, isFile := strings.CutPrefix(text, "@"); isFile {
		raw, err := os.ReadFile(file)
		if err != nil {
			return pki.Token{}, false, fmt.Errorf("--token: %w", err)
		}
		text = strings.TrimSpace(string(raw))
	}
	token, err = pki.ParseToken(text)
	if err != nil {
		return pki.Token{}, false, fmt.Errorf("--token: %w", err)
	}
	return token, true, nil
}

// membership loads the node's credentials, or joins the cluster for them.
func (o *options) membership(ctx context.Context, log *slog.Logger) (*membership, error) {
	token, hasToken, err := o.readToken()
	if err != nil {
		return nil, err
	}
	dir := credentialsDir(o.dataDir)
	n, err := pki.LoadNode(dir, o.name)
	switch {
	case err == nil:
		if hasToken {
			if err := token.VerifyCA(n.CA); err != nil {
				return nil, fmt.Errorf("--data-dir %s belongs to another cluster than --token: use another folder, or empty this one with: agent cleanup --name %s --data-dir %s (%w)", o.dataDir, o.name, o.dataDir, err)
			}
		}
		m := &membership{node: n}
		raw, err := os.ReadFile(peersFile(o.dataDir))
		if err == nil {
			err = json.Unmarshal(raw, &m.peers)
		}
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			log.Warn("read the known controllers", "error", err)
		}
		return m, nil
	case !errors.Is(err, fs.ErrNotExist):
		return nil, fmt.Errorf("--data-dir: %w", err)
	case !hasToken:
		return nil, fmt.Errorf("--token is needed to join a cluster: get it with timonel token (no credentials in %s)", dir)
	case len(o.controllers) == 0:
		return nil, errors.New("--controllers is needed to join a cluster: give host:port of the controllers' cluster ports")
	}
	return o.join(ctx, log, token, dir)
}

// join asks the controllers in turn for a certificate. A refusal is final; a
// controller that is not there yet is asked again for a while.
func (o *options) join(ctx context.Context, log *slog.Logger, token pki.Token, dir string) (*membership, error) {
	request, err := pki.NewNodeRequest(o.name)
	if err != nil {
		return nil, err
	}
	deadline := time.Now().Add(joinPatience)
	var last error
	for round := 0; ; round++ {
		for _, addr := range o.controllers {
			resp, err := o.ask(ctx, addr, token, request)
			if err == nil {
				return o.accept(token, dir, request, resp)
			}
			if final(err) {
				return nil, fmt.Errorf("join the cluster at %s: %s", addr, reason(err))
			}
			if last == nil || reason(err) != reason(last) {
				log.Warn("join the cluster; trying again", "controller", addr, "error", reason(err))
			}
			last = err
		}
		if time.Now().After(deadline) {
			return nil, fmt.Errorf("join the cluster: no controller of --controllers %s answered within %s: %s", strings.Join(o.controllers, ","), joinPatience, reason(last))
		}
		select {
		case <-ctx.Done():
			return nil, errors.New("stopped before the cluster was joined")
		case <-time.After(min(time.Duration(round+1)*100*time.Millisecond, 2*time.Second)):
		}
	}
}

func (o *options) ask(ctx context.Context, addr string, token pki.Token, request pki.NodeRequest) (*pb.JoinResponse, error) {
	conn, err := grpc.NewClient("passthrough:///"+addr,
		append(pb.DialOptions(), grpc.WithTransportCredentials(credentials.NewTLS(token.ClientTLS(addr))))...)
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	return pb.NewAgentsClient(conn).Join(ctx, &pb.JoinRequest{Token: token.Secret, NodeName: o.name, Csr: request.CSR})
}

func (o *options) accept(token pki.Token, dir string, request pki.NodeRequest, resp *pb.JoinResponse) (*membership, error) {
	if err := token.VerifyCA(resp.Ca); err != nil {
		return nil, fmt.Errorf("join the cluster: %w", err)
	}
	m := &membership{
		node:  &pki.Node{CA: resp.Ca, Pair: pki.KeyPair{Cert: resp.Certificate, Key: request.Key}, GossipKey: resp.GossipKey},
		peers: peers{Controllers: resp.Controllers, Gossip: resp.GossipPeers},
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("--data-dir: %w", err)
	}
	raw, err := json.Marshal(m.peers)
	if err != nil {
		return nil, err
	}
	if err := os.WriteFile(peersFile(o.dataDir), raw, 0o600); err != nil {
		return nil, fmt.Errorf("--data-dir: %w", err)
	}
	if err := m.node.Save(dir); err != nil {
		return nil, fmt.Errorf("--data-dir: %w", err)
	}
	return m, nil
}

// final says whether asking again is of no use: the token, the name or the
// cluster is wrong.
func final(err error) bool {
	switch status.Code(err) {
	case codes.Unauthenticated, codes.PermissionDenied, codes.InvalidArgument, codes.AlreadyExists, codes.Unimplemented:
		return true
	}
	// TLS said so: the wrong cluster, or no controller at all.
	return strings.Contains(err.Error(), "authentication handshake failed") && !strings.Contains(err.Error(), "EOF") &&
		!strings.Contains(err.Error(), "connection reset")
}

// reason is an error without gRPC's wrapping, on one line.
func reason(err error) string {
	text := err.Error()
	if s, ok := status.FromError(err); ok {
		text = s.Message()
	}
	for _, prefix := range []string{"connection error: desc = ", "transport: authentication handshake failed: ", "transport: Error while dialing: "} {
		text = strings.TrimPrefix(strings.Trim(text, `"`), prefix)
	}
	return strings.Trim(text, `"`)
}
