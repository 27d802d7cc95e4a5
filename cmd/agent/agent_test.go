package main

import (
	"context"
	"io"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/spf13/pflag"
	"github.com/stretchr/testify/require"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/status"

	"timonel/agent/eviction"
	"timonel/agent/imagegc"
	"timonel/pki"
	pb "timonel/proto/timonel/v1"
	"timonel/test/needs"
)

// joiner is a controller that can only be joined.
type joiner struct {
	pb.UnimplementedAgentsServer
	bundle *pki.Bundle
	asked  int
}

func (j *joiner) Join(_ context.Context, r *pb.JoinRequest) (*pb.JoinResponse, error) {
	j.asked++
	if r.Token != j.bundle.BootstrapSecret() {
		return nil, status.Error(codes.PermissionDenied, "the join token is not this cluster's")
	}
	cert, err := j.bundle.SignNode(r.Csr, r.NodeName)
	if err != nil {
		return nil, status.Error(codes.InvalidArgument, err.Error())
	}
	return &pb.JoinResponse{Certificate: cert, Ca: j.bundle.CA(), GossipKey: j.bundle.GossipKey(), Controllers: []string{"127.0.0.1:1"}}, nil
}

func serve(t *testing.T) (*joiner, string) {
	t.Helper()
	bundle, err := pki.CreateBundle(filepath.Join(t.TempDir(), "bundle"))
	require.NoError(t, err)
	material, err := bundle.Controller("c1", []net.IP{net.IPv4(127, 0, 0, 1)}, nil)
	require.NoError(t, err)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	s := grpc.NewServer(append(pb.ServerOptions(), grpc.Creds(credentials.NewTLS(material.ClusterServerTLS())))...)
	j := &joiner{bundle: bundle}
	pb.RegisterAgentsServer(s, j)
	go func() { _ = s.Serve(l) }()
	t.Cleanup(s.Stop)
	return j, l.Addr().String()
}

func execute(t *testing.T, args ...string) error {
	t.Helper()
	cmd := command()
	cmd.SetArgs(args)
	cmd.SetOut(io.Discard)
	cmd.SetErr(io.Discard)
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	return cmd.ExecuteContext(ctx)
}

func TestErrorsNameTheFlagAndChangeNothing(t *testing.T) {
	if os.Geteuid() != 0 {
		require.ErrorContains(t, execute(t, "--node-ip", "127.0.0.1", "--data-dir", t.TempDir()), "must run as root")
		needs.Skip(t, "the rest needs root")
	}
	busy, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	defer busy.Close()
	port := strconv.Itoa(busy.Addr().(*net.TCPAddr).Port)
	one, addr := serve(t)
	two, _ := serve(t)
	tampered := one.bundle.Token()
	tampered = tampered[:len(tampered)-4] + "abcd"

	for _, tc := range []struct {
		name string
		args []string
		want string
	}{
		{"an unknown flag", []string{"--nope"}, "--nope"},
		{"a name that is none", []string{"--name", "A_B"}, "--name"},
		{"the root folder", []string{"--data-dir", "/"}, "--data-dir"},
		{"controllers without a port", []string{"--controllers", "c1"}, "--controllers"},
		{"an address of nobody", []string{"--node-ip", "203.0.113.9"}, "--node-ip"},
		{"not an address", []string{"--node-ip", "x"}, "--node-ip"},
		{"a label", []string{"--labels", "a"}, "--labels"},
		{"a taint", []string{"--taints", "a=b:Never"}, "--taints"},
		{"too few pods", []string{"--max-pods", "0"}, "--max-pods"},
		{"images removed at more than all", []string{"--image-gc-high-threshold", "101"}, "--image-gc-high-threshold"},
		{"images removed to more than from", []string{"--image-gc-low-threshold", "90"}, "--image-gc-low-threshold"},
		{"a threshold of nothing", []string{"--eviction-hard", "disk<10%"}, "--eviction-hard"},
		{"a threshold of everything", []string{"--eviction-hard", "nodefs.available<110%"}, "--eviction-hard"},
		{"a threshold that says nothing", []string{"--eviction-minimum-reclaim", "nodefs.available<1%"}, "--eviction-minimum-reclaim"},
		{"a condition of no time", []string{"--eviction-pressure-transition-period", "0s"}, "--eviction-pressure-transition-period"},
		{"logs rotated at no size", []string{"--container-log-max-size", "lots"}, "--container-log-max-size"},
		{"logs rotated at each line", []string{"--container-log-max-size", "1Ki"}, "--container-log-max-size"},
		{"logs of one file", []string{"--container-log-max-files", "1"}, "--container-log-max-files"},
		{"logs of far too many files", []string{"--container-log-max-files", "1001"}, "--container-log-max-files"},
		{"name servers that are none", []string{"--cluster-dns", "10.0.0.1,none"}, "--cluster-dns"},
		{"a domain that is none", []string{"--cluster-domain", "a..b"}, "--cluster-domain"},
		{"a stub domain without servers", []string{"--dns-stub-domain", "acme.local="}, "--dns-stub-domain"},
		{"no such resolv.conf", []string{"--resolv-conf", "/does/not/exist"}, "--resolv-conf"},
		{"no folder of another pod network", []string{"--cni-conf-dir", "/does/not/exist"}, "--cni-conf-dir"},
		{"a pod network of no kind", []string{"--pod-network-mode", "gre"}, "--pod-network-mode"},
		{"a VXLAN of no number", []string{"--pod-network-vxlan-id", "0"}, "--pod-network-vxlan-id"},
		{"a VXLAN at no port", []string{"--pod-network-vxlan-port", "0"}, "--pod-network-vxlan-port"},
		{"packets too small for IPv6", []string{"--pod-network-mtu", "500"}, "--pod-network-mtu"},
		{"a network that is none", []string{"--non-masquerade-cidr", "10.0.0.0"}, "--non-masquerade-cidr"},
		{"a port that is none", []string{"--gossip-port", "70000"}, "--gossip-port"},
		{"a port in use", []string{"--gossip-port", port}, "in use"},
		{"no such images folder", []string{"--images", "/does/not/exist"}, "--images"},
		{"no containerd", []string{"--containerd-binary", "/does/not/exist"}, "apt-get install containerd"},
		{"no containerd at the socket", []string{"--containerd", "/does/not/exist.sock"}, "--containerd"},
		{"a runtime of no program", []string{"--runtime-handler", "other"}, "--runtime-handler"},
		{"a runtime that is not there", []string{"--runtime-handler", "other=/does/not/exist"}, "--runtime-handler"},
		{"a runtime that is not to be found", []string{"--runtime-handler", "other=true"}, "--runtime-handler"},
		{"a runtime of another's name", []string{"--runtime-handler", "runc=/bin/true"}, "--runtime-handler"},
		{"a runtime outside", []string{"--runtime-handler", "../x=/bin/true"}, "--runtime-handler"},
		{"a runtime of somebody's containerd", []string{"--runtime-handler", "a=/bin/true", "--containerd", "/x.sock"}, "--runtime-handler"},
		{"a log level", []string{"--log-level", "loud"}, "--log-level"},
		{"no token", nil, "--token-file is needed"},
		{"no controllers", []string{"--token", one.bundle.Token()}, "--controllers is needed"},
		{"a token that is none", []string{"--token", "timonel9.x"}, "--token"},
		{"a token file that is not there", []string{"--token", "@/does/not/exist"}, "--token"},
		{"no such token file", []string{"--token-file", "/does/not/exist"}, "--token-file: open /does/not/exist"},
		{"two tokens", []string{"--token-file", "f", "--token", "@f"}, "give one of them"},
		{"a wrong secret", []string{"--token", tampered, "--controllers", addr}, "token"},
		{"another cluster", []string{"--token", two.bundle.Token(), "--controllers", addr}, "another cluster"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			dir := filepath.Join(t.TempDir(), "data")
			args := append([]string{"--name", "a1", "--data-dir", dir, "--node-ip", "127.0.0.1", "--gossip-port", "17946", "--containerd-binary", "true"}, tc.args...)
			began := time.Now()
			err := execute(t, args...)
			require.ErrorContains(t, err, tc.want)
			require.NotContains(t, err.Error(), "\n")
			require.Less(t, time.Since(began), 10*time.Second, "a wrong value is not tried again")
			require.NoDirExists(t, filepath.Join(dir, "pki"))
		})
	}
	require.Equal(t, 1, one.asked, "only the wrong secret was sent: a token of another cluster never is")
}

func TestJoinKeepsCredentialsAndRefusesOtherClusters(t *testing.T) {
	j, addr := serve(t)
	other, _ := serve(t)
	o := &options{name: "a1", dataDir: t.TempDir(), token: j.bundle.Token(), controllers: []string{addr}, logLevel: "error"}
	log, err := o.logger()
	require.NoError(t, err)
	m, err := o.membership(t.Context(), log)
	require.NoError(t, err)
	require.Equal(t, []string{"127.0.0.1:1"}, m.peers.Controllers)
	entries, err := os.ReadDir(credentialsDir(o.dataDir))
	require.NoError(t, err)
	for _, e := range entries {
		info, err := e.Info()
		require.NoError(t, err)
		require.EqualValues(t, 0o600, info.Mode().Perm(), e.Name())
	}
	again, err := o.membership(t.Context(), log)
	require.NoError(t, err)
	require.Equal(t, m.node.Pair.Cert, again.node.Pair.Cert)
	require.Equal(t, 1, j.asked)

	o.token = other.bundle.Token()
	_, err = o.membership(t.Context(), log)
	require.ErrorContains(t, err, "belongs to another cluster")
	o.token = ""
	_, err = o.membership(t.Context(), log)
	require.NoError(t, err, "a token is needed once")
	o.name = "a2"
	_, err = o.membership(t.Context(), log)
	require.ErrorContains(t, err, "not to node a2")
	require.True(t, strings.HasPrefix(j.bundle.Token(), "timonel1."))
}

func TestOneAgentPerFolder(t *testing.T) {
	dir := t.TempDir()
	unlock, err := lock(dir)
	require.NoError(t, err)
	_, err = lock(dir)
	require.ErrorContains(t, err, "in use by another agent")
	unlock()
	unlock, err = lock(dir)
	require.NoError(t, err)
	unlock()
}

// On a disk that is not the node's alone no image goes for want of room, unless a
// flag says so.
func TestSharedDisk(t *testing.T) {
	parse := func(args ...string) *options {
		o := &options{}
		f := pflag.NewFlagSet("agent", pflag.ContinueOnError)
		o.flags(f)
		require.NoError(t, f.Parse(args))
		return o
	}
	t.Setenv("TIMONEL_SHARED_DISK", "")
	require.Equal(t, imagegc.Default(), parse().imageGC)
	require.Equal(t, eviction.DefaultHard, parse().evictionHard)
	t.Setenv("TIMONEL_SHARED_DISK", "1")
	require.Equal(t, 100, parse().imageGC.High)
	require.Equal(t, "memory.available<100Mi,pid.available<10%", parse().evictionHard)
	require.Equal(t, "nodefs.available<1%", parse("--eviction-hard=nodefs.available<1%").evictionHard)
	require.Equal(t, 90, parse("--image-gc-high-threshold=90").imageGC.High)
}
