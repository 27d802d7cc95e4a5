package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
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

// tokenVariable may hold the token: arguments can be read by everybody on a machine.
const tokenVariable = "TIMONEL_JOIN_TOKEN"

// maxToken bounds what is read as a token.
const maxToken = 4096

// readToken returns the token in --token-file, or given with --token: in a file for
// @FILE and from standard input for -, or in the environment, from where it is taken
// so that no process of this one inherits it. ok is false when none was given.
func (o *options) readToken(log *slog.Logger) (token pki.Token, ok bool, err error) {
	flag, text := "--token", o.token
	switch {
	case o.tokenFile != "" && text != "":
		return pki.Token{}, false, errors.New("--token and --token-file: give one of them")
	case o.tokenFile != "":
		flag, text = "--token-file", "@"+o.tokenFile
	case text == "":
		flag, text = tokenVariable, os.Getenv(tokenVariable)
		if err := os.Unsetenv(tokenVariable); err != nil {
			return pki.Token{}, false, fmt.Errorf("%s: %w", tokenVariable, err)
		}
	}
	fail := func(err error) (pki.Token, bool, error) { return pki.Token{}, false, fmt.Errorf("%s: %w", flag, err) }
	file, isFile := strings.CutPrefix(text, "@")
	switch {
	case text == "":
		return pki.Token{}, false, nil
	case isFile, text == "-" && flag == "--token":
		in := os.Stdin
		if isFile {
			if in, err = os.Open(file); err != nil {
				return fail(err)
			}
			defer in.Close()
			if info, err := in.Stat(); err != nil {
				return fail(err)
			} else if mode := info.Mode(); mode.IsRegular() && mode.Perm()&0o077 != 0 {
				log.Warn("others on this machine may read the join token: chmod 600 its file, and revoke the token if they could", "flag", flag, "file", file, "mode", fmt.Sprintf("%04o", mode.Perm()))
			}
		}
		raw, err := io.ReadAll(io.LimitReader(in, maxToken))
		if err != nil {
			return fail(err)
		}
		if text = strings.TrimSpace(string(raw)); text == "" {
			return pki.Token{}, false, nil
		}
	case flag == "--token":
		log.Warn("the join token stands on the command line, where everybody on this machine can read it: give --token-file, or it in " + tokenVariable + "; a later version will not take it from there")
	}
	if token, err = pki.ParseToken(text); err != nil {
		return fail(err)
	}
	return token, true, nil
}

// membership loads the node's credentials, or joins the cluster for them.
func (o *options) membership(ctx context.Context, log *slog.Logger) (*membership, error) {
	token, hasToken, err := o.readToken(log)
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
	case errors.Is(err, pki.ErrNodeExpired) && hasToken && len(o.controllers) > 0:
		if err := token.VerifyCA(n.CA); err != nil {
			return nil, fmt.Errorf("--data-dir %s belongs to another cluster than --token: %w", o.dataDir, err)
		}
		request, err := pki.NewNodeRequestFor(o.name, n.Pair.Key)
		if err != nil {
			return nil, err
		}
		return o.join(ctx, log, token, dir, request)
	case !errors.Is(err, fs.ErrNotExist):
		return nil, fmt.Errorf("--data-dir: %w", err)
	case !hasToken:
		return nil, fmt.Errorf("--token-file is needed to join a cluster: make a token with `timonel token create` (no credentials in %s)", dir)
	case len(o.controllers) == 0:
		return nil, errors.New("--controllers is needed to join a cluster: give host:port of the controllers' cluster ports")
	}
	request, err := o.newRequest()
	if err != nil {
		return nil, err
	}
	return o.join(ctx, log, token, dir, request)
}

// newRequest makes the node's key and request. The key is kept until the node has
// joined, as its name is bound to the key before the answer comes.
func (o *options) newRequest() (pki.NodeRequest, error) {
	file := filepath.Join(o.dataDir, "join.key")
	if key, err := os.ReadFile(file); err == nil {
		if request, err := pki.NewNodeRequestFor(o.name, key); err == nil {
			return request, nil
		}
	}
	request, err := pki.NewNodeRequest(o.name)
	if err != nil {
		return request, err
	}
	if err := os.MkdirAll(o.dataDir, 0o711); err != nil {
		return request, fmt.Errorf("--data-dir: %w", err)
	}
	if err := os.WriteFile(file, request.Key, 0o600); err != nil {
		return request, fmt.Errorf("--data-dir: %w", err)
	}
	return request, nil
}

// join asks the controllers in turn for a certificate. A refusal is final; a
// controller that is not there yet is asked again for a while.
func (o *options) join(ctx context.Context, log *slog.Logger, token pki.Token, dir string, request pki.NodeRequest) (*membership, error) {
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
	keys := resp.GossipKeys
	if len(keys) == 0 { // a controller of before there were several
		keys = [][]byte{resp.GossipKey}
	}
	m := &membership{
		node:  &pki.Node{CA: resp.Ca, Pair: pki.KeyPair{Cert: resp.Certificate, Key: request.Key}, GossipKeys: keys},
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
	_ = os.Remove(filepath.Join(o.dataDir, "join.key")) // it is in dir now
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
