//go:build e2e

package e2e

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/status"

	"timonel/pki"
	pb "timonel/proto/timonel/v1"
	"timonel/test/harness"
)

// TestWhoMayBeANode is a cluster whose tokens end in all ways, and whose only worker
// is stolen and built anew.
func TestWhoMayBeANode(t *testing.T) {
	t.Parallel()
	c := harness.Up(t, harness.Options{Controllers: 3, Agents: 1})
	addresses := map[string]string{}
	var clusterPorts []string
	for _, name := range c.Spec.ControllerNames() {
		addresses[name] = c.Spec.ClusterAddress(name)
		clusterPorts = append(clusterPorts, c.Spec.ClusterAddress(name))
	}

	t.Run("tokens", func(t *testing.T) {
		// create returns what `timonel token create` prints, which is the token's text, and its id.
		create := func(flags ...string) (text, id string) {
			out := c.Run(t, append([]string{"token", "create"}, flags...)...)
			text = out[strings.Index(out, "timonel1."):]
			token, err := pki.ParseToken(text)
			require.NoError(t, err)
			id, _, _ = strings.Cut(token.Secret, "-")
			require.Contains(t, out, "Token "+id+" is good until ")
			return strings.TrimSpace(text), id
		}
		refused := func(text, want string) {
			t.Helper()
			require.Contains(t, joinAs(t, c, "x9", text, clusterPorts), want)
		}
		const bad = "the join token is wrong, expired, used up or revoked: make one with `timonel token create`"

		short, shortID := create("--ttl", "1s")
		harness.Eventually(t, 10*time.Second, "the token ends", func() error {
			if strings.Contains(c.Run(t, "token", "list"), shortID) {
				return errors.New("it is in the list")
			}
			return nil
		})
		refused(short, bad)

		named, namedID := create("--names", "x1", "--description", "for the first")
		require.Regexp(t, namedID+` .* 0 +x1 +timonel-admin +for the first`, c.Run(t, "token", "list"))
		refused(named, "the join token "+namedID+" is not for a node called x9")
		c.Run(t, "token", "revoke", namedID)
		refused(named, bad)
		require.NotContains(t, c.Run(t, "token", "list"), namedID)
		out, err := c.Try(t.Context(), "token", "revoke", namedID)
		require.Error(t, err)
		require.Contains(t, out, "not found")

		once, onceID := create("--uses", "1")
		joined := raceToJoin(t, once, addresses)
		require.Equal(t, 1, joined, "of all that join at once with a token for one, one does")
		refused(once, bad)
		require.Regexp(t, onceID+` .* 1 of 1 `, c.Run(t, "token", "list"))

		taken, _ := create()
		require.Contains(t, joinAs(t, c, "c7", taken, clusterPorts), "reserved for controllers")
		require.Contains(t, joinAs(t, c, "a1", taken, clusterPorts), "the name a1 is bound to another key since")
	})

	t.Run("the status says what expires when", func(t *testing.T) {
		kinds := map[string]int{}
		for _, e := range c.Status(t).Expiries {
			kinds[e.Kind]++
			require.True(t, e.At.After(time.Now()), "%v", e)
		}
		require.Equal(t, 2, kinds["authority"])
		require.Equal(t, 3, kinds["controller"])
		require.Equal(t, 1, kinds["kubeconfig"])
		require.Equal(t, 1, kinds["node"], "those that joined above and have no Node do not count")
		require.Contains(t, c.Run(t, "status"), "  controller c2\n")
	})

	require.Regexp(t, `a1 +bound +[0-9a-f]{12} `, c.Run(t, "node", "list"))
	stolen, err := pki.LoadNode(filepath.Join(c.Spec.DataDir("a1"), "pki"), "a1")
	require.NoError(t, err)

	t.Run("a stolen certificate is that of a node and no more", func(t *testing.T) {
		api := apiAs(t, stolen)
		for _, on := range c.Spec.ControllerNames() {
			for path, method := range map[string]string{
				"/timonel/v1/tokens": http.MethodGet, "/timonel/v1/tokens/x": http.MethodDelete, "/timonel/v1/nodes": http.MethodGet,
				"/timonel/v1/nodes/a2/revoke": http.MethodPost, "/timonel/v1/nodes/a2/reset": http.MethodPost, "/timonel/v1/members": http.MethodGet,
				"/timonel/v1/snapshot": http.MethodGet, "/timonel/v1/snapshots": http.MethodGet, "/api/v1/secrets": http.MethodGet, "/metrics": http.MethodGet,
				"/api/v1/nodes/a2": http.MethodDelete, "/apis/rbac.authorization.k8s.io/v1/clusterroles": http.MethodGet,
			} {
				code, body := ask(t, api, method, "https://"+c.Spec.APIAddress(on)+path)
				require.Equal(t, http.StatusForbidden, code, "%s %s on %s: %s", method, path, on, body)
			}
			conn := dial(t, stolen, addresses[on])
			for _, service := range []grpc.ServiceDesc{pb.Peers_ServiceDesc, pb.Consensus_ServiceDesc, pb.Membership_ServiceDesc} {
				methods := []string{"AnythingElse"}
				for _, m := range service.Methods {
					methods = append(methods, m.MethodName)
				}
				for _, s := range service.Streams {
					methods = append(methods, s.StreamName)
				}
				for _, method := range methods {
					err := conn.Invoke(t.Context(), "/"+service.ServiceName+"/"+method, &pb.StatusRequest{}, &pb.StatusResponse{})
					require.Equal(t, codes.PermissionDenied, status.Code(err), "%s/%s on %s: %v", service.ServiceName, method, on, err)
				}
			}
			require.Error(t, raftHandshake(t, stolen, net.JoinHostPort(c.Spec.Address(on).String(), "7444")))
		}
	})

	t.Run("a node that is revoked is cut on all controllers", func(t *testing.T) {
		ended := map[string]chan error{}
		for _, on := range c.Spec.ControllerNames() {
			ended[on] = make(chan error, 1)
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			defer cancel()
			request, err := http.NewRequestWithContext(ctx, http.MethodGet, "https://"+c.Spec.APIAddress(on)+"/api/v1/services?watch=true", nil)
			require.NoError(t, err)
			response, err := apiAs(t, stolen).Do(request)
			require.NoError(t, err)
			defer response.Body.Close()
			require.Equal(t, http.StatusOK, response.StatusCode)
			_, err = io.ReadFull(response.Body, make([]byte, 1))
			require.NoError(t, err)
			go func() {
				_, err := io.Copy(io.Discard, response.Body)
				ended[on] <- errors.Join(err, ctx.Err())
			}()
		}
		c.Run(t, "node", "revoke", "a1", "--reason", "stolen from the rack")
		for on, end := range ended {
			require.NotErrorIs(t, <-end, context.DeadlineExceeded, "a watch on %s goes on", on)
		}
		for _, on := range c.Spec.ControllerNames() {
			code, body := ask(t, apiAs(t, stolen), http.MethodGet, "https://"+c.Spec.APIAddress(on)+"/api/v1/services")
			require.Equal(t, http.StatusUnauthorized, code, "%s: %s", on, body)
			stream, err := pb.NewAgentsClient(dial(t, stolen, addresses[on])).Connect(t.Context())
			require.NoError(t, err)
			_, err = stream.Recv()
			require.Equal(t, codes.PermissionDenied, status.Code(err), "%s: %v", on, err)
			require.Contains(t, renew(t, stolen, addresses[on]).Error(), "revoked")
		}
		harness.Eventually(t, 20*time.Second, "no controller has a stream of the agent", func() error {
			for _, k := range c.Status(t).Controllers {
				if len(k.Agents) > 0 {
					return fmt.Errorf("%s has %v", k.Name, k.Agents)
				}
			}
			return nil
		})
		require.Regexp(t, `a1 +revoked .*stolen from the rack`, c.Run(t, "node", "list"))
		token := c.Run(t, "token", "create")
		require.Contains(t, joinAs(t, c, "a1", token[strings.Index(token, "timonel1."):], clusterPorts), "`timonel node reset a1` lets a machine of that name join again")
	})

	t.Run("a machine that was built anew takes the name after a reset", func(t *testing.T) {
		c.Kill(t, "a1", false)
		c.Run(t, "node", "reset", "a1", "--reason", "a new machine")
		c.Run(t, "wipe", "a1")
		c.Start(t, "a1")
		require.Regexp(t, `a1 +bound `, c.Run(t, "node", "list"))
		for _, on := range c.Spec.ControllerNames() {
			code, _ := ask(t, apiAs(t, stolen), http.MethodGet, "https://"+c.Spec.APIAddress(on)+"/api/v1/services")
			require.Equal(t, http.StatusUnauthorized, code, "the key of before is good on %s", on)
			require.Contains(t, renew(t, stolen, addresses[on]).Error(), "revoked")
		}
	})
}

// joinAs runs an agent that is to be refused, and returns what it says.
func joinAs(t *testing.T, c *harness.Cluster, name, token string, controllers []string) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), "token")
	require.NoError(t, os.WriteFile(file, []byte(token), 0o600))
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	cmd := exec.CommandContext(ctx, harness.Program(t, "agent"), "--name", name, "--data-dir", filepath.Join(t.TempDir(), "data"),
		"--node-ip", c.Spec.Network().Host().String(), "--gossip-port=17947", "--containerd-binary=true",
		"--token-file", file, "--controllers", strings.Join(controllers, ","))
	out, err := cmd.CombinedOutput()
	require.Error(t, err)
	require.NoError(t, ctx.Err(), "a token that is refused is tried again: %s", out)
	return string(out)
}

// raceToJoin has two nodes for each controller join at once, and counts who got in.
func raceToJoin(t *testing.T, text string, addresses map[string]string) (joined int) {
	t.Helper()
	token, err := pki.ParseToken(text)
	require.NoError(t, err)
	answers := make(chan error)
	for controller, address := range addresses {
		for i := range 2 {
			name := fmt.Sprintf("x-%s-%d", controller, i)
			request, err := pki.NewNodeRequest(name)
			require.NoError(t, err)
			conn, err := grpc.NewClient("passthrough:///"+address, grpc.WithTransportCredentials(credentials.NewTLS(token.ClientTLS(address))))
			require.NoError(t, err)
			t.Cleanup(func() { conn.Close() })
			go func() {
				ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
				defer cancel()
				_, err := pb.NewAgentsClient(conn).Join(ctx, &pb.JoinRequest{Token: token.Secret, NodeName: name, Csr: request.CSR})
				answers <- err
			}()
		}
	}
	for range 2 * len(addresses) {
		if err := <-answers; err == nil {
			joined++
		} else {
			require.Equal(t, codes.PermissionDenied, status.Code(err), "%v", err)
		}
	}
	return joined
}

func apiAs(t *testing.T, node *pki.Node) *http.Client {
	t.Helper()
	config, err := node.ClientTLS()
	require.NoError(t, err)
	config.VerifyConnection = nil // the API's certificate is not that of a controller's cluster port
	config.InsecureSkipVerify = true
	transport := &http.Transport{TLSClientConfig: config, ForceAttemptHTTP2: true}
	t.Cleanup(transport.CloseIdleConnections)
	return &http.Client{Transport: transport}
}

func ask(t *testing.T, api *http.Client, method, url string) (int, string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	request, err := http.NewRequestWithContext(ctx, method, url, bytes.NewReader([]byte("{}")))
	require.NoError(t, err)
	response, err := api.Do(request)
	require.NoError(t, err)
	defer response.Body.Close()
	body, err := io.ReadAll(io.LimitReader(response.Body, 4096))
	require.NoError(t, err)
	return response.StatusCode, string(body)
}

func dial(t *testing.T, node *pki.Node, address string) *grpc.ClientConn {
	t.Helper()
	config, err := node.ClientTLS()
	require.NoError(t, err)
	conn, err := grpc.NewClient("passthrough:///"+address, grpc.WithTransportCredentials(credentials.NewTLS(config)))
	require.NoError(t, err)
	t.Cleanup(func() { conn.Close() })
	return conn
}

// renew asks for another certificate by the one that the node has.
func renew(t *testing.T, node *pki.Node, address string) error {
	t.Helper()
	request, err := pki.NewNodeRequestFor("a1", node.Pair.Key)
	require.NoError(t, err)
	_, err = pb.NewAgentsClient(dial(t, node, address)).Join(t.Context(), &pb.JoinRequest{NodeName: "a1", Csr: request.CSR})
	require.Error(t, err)
	return err
}

// raftHandshake is the error with which Raft's port ends a connection.
func raftHandshake(t *testing.T, node *pki.Node, address string) error {
	t.Helper()
	config, err := node.ClientTLS()
	require.NoError(t, err)
	conn, err := tls.Dial("tcp", address, config)
	if err != nil {
		return err
	}
	defer conn.Close()
	require.NoError(t, conn.SetDeadline(time.Now().Add(10*time.Second)))
	_, err = conn.Read(make([]byte, 1)) // the server's verdict
	require.NotErrorIs(t, err, os.ErrDeadlineExceeded, "the connection is kept")
	return err
}
