package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"

	"timonel/pki"
	timonelv1 "timonel/proto/timonel/v1"
)

// side is a control plane that runs.
type side struct {
	name      string
	apis      []*rest.Config
	processes []*process
	// leader is the process that leads the log, nil if none does; a killed leader
	// must not stop the writes. nil for a side that cannot lose one.
	leader func(context.Context) (*process, error)
}

func (s *side) stop() {
	for i := len(s.processes) - 1; i >= 0; i-- {
		s.processes[i].stop()
	}
}

// starters are the sides there are.
var starters = map[string]func(ctx context.Context, dir, bin string) (*side, error){
	"timonel": func(ctx context.Context, dir, bin string) (*side, error) {
		return startTimonel(ctx, dir, bin, 3, "boltdb")
	},
	"before": func(ctx context.Context, dir, bin string) (*side, error) {
		s, err := startTimonel(ctx, dir, bin, 3, "boltdb")
		if err == nil {
			s.name += ", before"
		}
		return s, err
	},
	"timonel-wal": func(ctx context.Context, dir, bin string) (*side, error) {
		return startTimonel(ctx, dir, bin, 3, "wal")
	},
	"timonel1": func(ctx context.Context, dir, bin string) (*side, error) {
		return startTimonel(ctx, dir, bin, 1, "boltdb")
	},
	"kubernetes1": func(ctx context.Context, dir, bin string) (*side, error) { return startKubernetes(ctx, dir, bin, 1) },
	"kubernetes3": func(ctx context.Context, dir, bin string) (*side, error) { return startKubernetes(ctx, dir, bin, 3) },
}

// ready waits until every API of a side takes requests and the default namespace
// is there.
func (s *side) ready(ctx context.Context) error {
	for _, api := range s.apis {
		client, err := kubernetes.NewForConfig(api)
		if err != nil {
			return err
		}
		if err := until(ctx, s.name+" to be ready", s.processes, func(ctx context.Context) error {
			if _, err := client.Discovery().RESTClient().Get().AbsPath("/readyz").DoRaw(ctx); err != nil {
				return err
			}
			_, err := client.CoreV1().Namespaces().Get(ctx, "default", getOptions)
			return err
		}); err != nil {
			return err
		}
	}
	return nil
}

// api is the configuration of a protobuf client with a connection of its own
// and no limit on its rate.
func api(server string, ca []byte, client pki.KeyPair) *rest.Config {
	return &rest.Config{
		Host: server, QPS: -1,
		ContentConfig:   rest.ContentConfig{ContentType: "application/vnd.kubernetes.protobuf", AcceptContentTypes: "application/vnd.kubernetes.protobuf"},
		TLSClientConfig: rest.TLSClientConfig{CAData: ca, CertData: client.Cert, KeyData: client.Key},
	}
}

// startTimonel starts n controllers.
func startTimonel(ctx context.Context, dir, bin string, n int, logStore string) (*side, error) {
	s := &side{name: fmt.Sprintf("Timonel, %d", n)}
	if logStore != "boltdb" {
		s.name += ", " + logStore
	}
	bundleDir := filepath.Join(dir, "bundle")
	bundle, err := pki.CreateBundle(bundleDir)
	if err != nil {
		return nil, err
	}
	admin, err := bundle.ClientCert("bench", []string{pki.AdminGroup})
	if err != nil {
		return nil, err
	}
	identity, err := bundle.Controller("bench", []net.IP{net.IPv4(127, 0, 0, 1)}, nil)
	if err != nil {
		return nil, err
	}
	p, err := ports(4 * n)
	if err != nil {
		return nil, err
	}
	var join []string
	for i := range n {
		join = append(join, "127.0.0.1:"+p[4*i+3])
	}
	byName := map[string]*process{}
	for i := range n {
		name := fmt.Sprint("c", i+1)
		process, err := start(dir, name, filepath.Join(bin, "controller"), "--name", name, "--data-dir", filepath.Join(dir, name),
			"--bundle", bundleDir, "--bind-ip", "127.0.0.1", "--bootstrap-expect", fmt.Sprint(n), "--cluster-cidr", "10.0.0.0/10", "--log-store", logStore, "--join", strings.Join(join, ","),
			"--api-port", p[4*i], "--cluster-port", p[4*i+1], "--raft-port", p[4*i+2], "--gossip-port", p[4*i+3])
		if err != nil {
			s.stop()
			return nil, err
		}
		byName[name] = process
		s.processes = append(s.processes, process)
		s.apis = append(s.apis, api("https://127.0.0.1:"+p[4*i], bundle.CA(), admin))
	}
	if n > 1 {
		s.leader = func(ctx context.Context) (*process, error) {
			conn, err := grpc.NewClient("passthrough:///127.0.0.1:"+p[1], grpc.WithTransportCredentials(credentials.NewTLS(identity.ClusterClientTLS())))
			if err != nil {
				return nil, err
			}
			defer conn.Close()
			status, err := timonelv1.NewPeersClient(conn).Status(ctx, &timonelv1.StatusRequest{})
			if err != nil {
				return nil, err
			}
			return byName[status.GetLeader()], nil
		}
	}
	return s, nil
}

// startKubernetes starts n etcd members and one each of Kubernetes' three
// programs on them.
func startKubernetes(ctx context.Context, dir, bin string, n int) (*side, error) {
	s := &side{name: fmt.Sprintf("Kubernetes, %d etcd", n)}
	bundle, err := pki.CreateBundle(filepath.Join(dir, "bundle"))
	if err != nil {
		return nil, err
	}
	identity, err := bundle.Controller("bench", []net.IP{net.IPv4(127, 0, 0, 1), net.IPv4(10, 96, 0, 1)}, []string{"kubernetes"})
	if err != nil {
		return nil, err
	}
	files, err := identity.WriteFiles(filepath.Join(dir, "pki"))
	if err != nil {
		return nil, err
	}
	admin, err := bundle.ClientCert("bench", []string{pki.AdminGroup})
	if err != nil {
		return nil, err
	}
	public, err := bundle.ServiceAccountPublic()
	if err != nil {
		return nil, err
	}
	certificate, key, accounts := filepath.Join(dir, "client.crt"), filepath.Join(dir, "client.key"), filepath.Join(dir, "sa.pub")
	if err := errors.Join(os.WriteFile(certificate, admin.Cert, 0o600), os.WriteFile(key, admin.Key, 0o600), os.WriteFile(accounts, public, 0o600)); err != nil {
		return nil, err
	}
	p, err := ports(3)
	if err != nil {
		return nil, err
	}
	server := "https://127.0.0.1:" + p[0]
	kubeconfig := filepath.Join(dir, "kubeconfig")
	if err := pki.WriteKubeconfig(kubeconfig, pki.KubeconfigSpec{CA: bundle.CA(), User: "bench", Client: admin,
		Contexts: []pki.KubeContext{{Name: "bench", Server: server}}}); err != nil {
		return nil, err
	}
	run := func(name string, args ...string) {
		if err != nil {
			return
		}
		program := name
		if strings.HasPrefix(name, "etcd") {
			program = "etcd"
		}
		var started *process
		if started, err = start(dir, name, filepath.Join(bin, "bench", program), args...); err == nil {
			s.processes = append(s.processes, started)
		}
	}
	endpoints, members, err := etcdMembers(n)
	if err != nil {
		return nil, err
	}
	for i, endpoint := range endpoints {
		run(fmt.Sprint("etcd", i+1), etcdFlags(dir, i, endpoint, members, files)...)
	}
	run("kube-apiserver", "--etcd-servers", strings.Join(endpoints, ","), "--etcd-cafile", files.CA, "--etcd-certfile", certificate, "--etcd-keyfile", key,
		"--bind-address", "127.0.0.1", "--advertise-address", "127.0.0.1", "--endpoint-reconciler-type", "none", "--secure-port", p[0],
		"--tls-cert-file", files.APIServingCert, "--tls-private-key-file", files.APIServingKey, "--client-ca-file", files.CA,
		"--authorization-mode", "Node,RBAC", "--service-cluster-ip-range", "10.96.0.0/16",
		"--service-account-issuer", "https://kubernetes.default.svc", "--service-account-key-file", accounts,
		"--service-account-signing-key-file", files.ServiceAccountKey,
		// What Timonel lets in too: the load must not be what is limited.
		"--max-requests-inflight", "3000", "--max-mutating-requests-inflight", "1000")
	// Nor must the rate of its own clients: 50 and 20 requests a second by default.
	run("kube-scheduler", "--kube-api-qps", "5000", "--kube-api-burst", "10000", "--kubeconfig", kubeconfig, "--bind-address", "127.0.0.1", "--secure-port", p[1], "--cert-dir", filepath.Join(dir, "scheduler"))
	run("kube-controller-manager", "--kube-api-qps", "5000", "--kube-api-burst", "10000", "--kubeconfig", kubeconfig, "--bind-address", "127.0.0.1", "--secure-port", p[2], "--cert-dir", filepath.Join(dir, "manager"),
		"--service-account-private-key-file", files.ServiceAccountKey, "--root-ca-file", files.CA, "--use-service-account-credentials")
	if err != nil {
		s.stop()
		return nil, err
	}
	s.apis = []*rest.Config{api(server, bundle.CA(), admin)}
	if n > 1 {
		s.leader = func(ctx context.Context) (*process, error) {
			for i, endpoint := range endpoints {
				leads, err := etcdLeads(ctx, endpoint, bundle.CA(), admin)
				if err != nil {
					return nil, err
				}
				if leads {
					return s.processes[i], nil
				}
			}
			return nil, nil
		}
	}
	return s, nil
}

// etcdLeads asks an etcd member whether it is the leader.
func etcdLeads(ctx context.Context, endpoint string, ca []byte, client pki.KeyPair) (bool, error) {
	certificate, err := client.TLS()
	if err != nil {
		return false, err
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(ca)
	transport := &http.Transport{TLSClientConfig: &tls.Config{RootCAs: roots, Certificates: []tls.Certificate{certificate}}}
	defer transport.CloseIdleConnections()
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, endpoint+"/metrics", nil)
	if err != nil {
		return false, err
	}
	response, err := transport.RoundTrip(request)
	if err != nil {
		return false, err
	}
	defer response.Body.Close()
	body, err := io.ReadAll(response.Body)
	if err != nil {
		return false, err
	}
	return strings.Contains(string(body), "\netcd_server_is_leader 1\n"), nil
}

// etcdMembers chooses addresses for n members: those for clients, and each member's
// name and address for the others.
func etcdMembers(n int) (endpoints, members []string, err error) {
	p, err := ports(2 * n)
	if err != nil {
		return nil, nil, err
	}
	for i := range n {
		endpoints = append(endpoints, "https://127.0.0.1:"+p[2*i])
		members = append(members, fmt.Sprintf("etcd%d=https://127.0.0.1:%s", i+1, p[2*i+1]))
	}
	return endpoints, members, nil
}

// etcdFlags are the flags of member i.
func etcdFlags(dir string, i int, endpoint string, members []string, files pki.Files) []string {
	name, peer, _ := strings.Cut(members[i], "=")
	return []string{"--name", name, "--data-dir", filepath.Join(dir, name), "--log-level", "warn",
		"--listen-client-urls", endpoint, "--advertise-client-urls", endpoint,
		"--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer, "--initial-cluster", strings.Join(members, ","),
		"--cert-file", files.APIServingCert, "--key-file", files.APIServingKey, "--trusted-ca-file", files.CA, "--client-cert-auth",
		"--peer-auto-tls"}
}
