package main

import (
	"context"
	_ "embed"
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/clientcmd"

	"timonel/internal/cluster"
	"timonel/internal/proxy"
	"timonel/pki"
)

type options struct {
	bin, out, name, source string
	failing, what          string
	keep                   bool
	timeout                time.Duration
}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, os.Interrupt)
	defer stop()
	var o options
	flag.StringVar(&o.bin, "bin", "bin", "folder of Timonel's programs, kubectl and kubectl-convert in kubectl-tests below it")
	flag.StringVar(&o.out, "out", "run/kubectl-tests", "folder of the cluster, of what the tests read and write, and of their output")
	flag.StringVar(&o.name, "name", "ktests", "name of the cluster")
	flag.StringVar(&o.source, "source", "", "folder of Kubernetes' source (required)")
	flag.StringVar(&o.failing, "failing", "test/kubectl/failing.txt", "list of the tests that fail, with the reason")
	flag.StringVar(&o.what, "what", "", "names of the tests to run, without run_ and _tests (default: all)")
	flag.BoolVar(&o.keep, "keep", false, "leave the cluster up")
	flag.DurationVar(&o.timeout, "timeout", time.Hour, "how long the tests may take")
	flag.Parse()
	if err := run(ctx, o, os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "kubectl-tests:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, o options, w io.Writer) (err error) {
	if o.source == "" {
		return errors.New("-source is required: the folder of k8s.io/kubernetes, as `go list -m -f '{{.Dir}}' k8s.io/kubernetes` says")
	}
	for _, path := range []*string{&o.bin, &o.out, &o.failing} {
		if *path, err = filepath.Abs(*path); err != nil {
			return err
		}
	}
	known, err := readFailing(o.failing)
	if err != nil {
		return err
	}
	if !o.keep {
		defer func() { err = errors.Join(err, o.timonel(context.Background(), w, "down")) }()
	}
	up := []string{"up", "--agents", "0", "--sample=false",
		"--controller-flag=--service-cidr=10.0.0.0/24",
		"--controller-flag=--cluster-cidr=10.244.0.0/24", // of one node: that a second gets no range, as upstream's here
		"--controller-flag=--disable-admission-plugins=ServiceAccount,DefaultStorageClass,DefaultTolerationSeconds,MutatingAdmissionWebhook,ValidatingAdmissionWebhook,StorageObjectInUseProtection"}
	if err := o.timonel(ctx, w, up...); err != nil {
		return err
	}
	spec, err := cluster.Load(filepath.Join(o.out, "cluster"))
	if err != nil {
		return err
	}
	token, ca, err := prepare(ctx, spec)
	if err != nil {
		return err
	}
	files, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	defer files.Close()
	if err := o.tree(token, ca, files.Addr()); err != nil {
		return fmt.Errorf("lay out what the tests read: %w", err)
	}
	go func() { _ = http.Serve(files, http.FileServerFS(os.DirFS(filepath.Join(o.out, "tree")))) }() // until files is closed
	port, err := forward(ctx, spec)
	if err != nil {
		return err
	}
	t, err := o.suite(ctx, w, port, token)
	if err != nil {
		return err
	}
	return t.judge(w, known, o.what == "")
}

func (o options) timonel(ctx context.Context, w io.Writer, args ...string) error {
	args = append(args, "--run", filepath.Join(o.out, "cluster"), "--name", o.name)
	cmd := exec.CommandContext(ctx, filepath.Join(o.bin, "timonel"), args...)
	cmd.Stdout, cmd.Stderr = w, w
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("timonel %s: %w", args[0], err)
	}
	return nil
}

// prepare makes a service account, lets everybody who is known do all, and returns a
// token of the account and the CA of the API. The class of local volumes goes: the tests expect to find none.
func prepare(ctx context.Context, spec *cluster.Spec) (token string, ca []byte, err error) {
	config, err := clientcmd.BuildConfigFromFlags("", spec.Kubeconfig())
	if err != nil {
		return "", nil, err
	}
	client, err := kubernetes.NewForConfig(config)
	if err != nil {
		return "", nil, err
	}
	if err := client.StorageV1().StorageClasses().Delete(ctx, "local", metav1.DeleteOptions{}); err != nil {
		return "", nil, fmt.Errorf("delete the default StorageClass: %w", err)
	}
	const name, namespace = "kubectl-tests", metav1.NamespaceSystem
	account := &corev1.ServiceAccount{ObjectMeta: metav1.ObjectMeta{Name: name}}
	if _, err := client.CoreV1().ServiceAccounts(namespace).Create(ctx, account, metav1.CreateOptions{}); err != nil {
		return "", nil, fmt.Errorf("make the tests' service account: %w", err)
	}
	binding := &rbacv1.ClusterRoleBinding{
		ObjectMeta: metav1.ObjectMeta{Name: name},
		RoleRef:    rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "ClusterRole", Name: "cluster-admin"},
		// Upstream's API server lets everybody do all in these tests.
		Subjects: []rbacv1.Subject{{Kind: rbacv1.GroupKind, APIGroup: rbacv1.GroupName, Name: "system:authenticated"}},
	}
	if _, err := client.RbacV1().ClusterRoleBindings().Create(ctx, binding, metav1.CreateOptions{}); err != nil {
		return "", nil, fmt.Errorf("let all users do all: %w", err)
	}
	seconds := int64((24 * time.Hour).Seconds())
	request, err := client.CoreV1().ServiceAccounts(namespace).CreateToken(ctx, name,
		&authenticationv1.TokenRequest{Spec: authenticationv1.TokenRequestSpec{ExpirationSeconds: &seconds}}, metav1.CreateOptions{})
	if err != nil {
		return "", nil, fmt.Errorf("get a token for the tests: %w", err)
	}
	ca = config.CAData
	if len(ca) == 0 {
		ca, err = os.ReadFile(config.CAFile)
	}
	return request.Status.Token, ca, err
}

// forward has the controllers' APIs answer on loopback, until ctx ends.
func forward(ctx context.Context, spec *cluster.Spec) (port int, err error) {
	free, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return 0, err
	}
	address := free.Addr().(*net.TCPAddr)
	if err := free.Close(); err != nil {
		return 0, err
	}
	c := proxy.Config{Listen: address.String(), CAFile: filepath.Join(spec.BundleDir(), pki.CAFile), ServerName: "kubernetes", Log: slog.New(slog.DiscardHandler)}
	for _, name := range spec.ControllerNames() {
		c.Backends = append(c.Backends, spec.APIAddress(name))
	}
	ended := make(chan error, 1)
	go func() { ended <- proxy.Run(ctx, c) }() // with ctx
	for {
		conn, err := net.Dial("tcp", address.String())
		if err == nil {
			return address.Port, conn.Close()
		}
		select {
		case err := <-ended:
			return 0, fmt.Errorf("forward %s to the controllers: %w", address, err)
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// tree copies what the tests need of Kubernetes' source to where they may write, with
// the token in place of upstream's, and with the files that they load from GitHub here.
func (o options) tree(token string, ca []byte, files net.Addr) error {
	tree := filepath.Join(o.out, "tree")
	if err := os.RemoveAll(tree); err != nil {
		return err
	}
	for _, dir := range []string{"hack", "test/cmd", "test/fixtures", "test/e2e/testing-manifests", "third_party/forked/shell2junit"} {
		if err := os.CopyFS(filepath.Join(tree, dir), os.DirFS(filepath.Join(o.source, dir))); err != nil {
			return err
		}
	}
	here := strings.NewReplacer("admin-token", token, "https://raw.githubusercontent.com/kubernetes/kubernetes/master", "http://"+files.String(),
		"CN=127.0.0.1", "CN=timonel-ca", "CN = 127.0.0.1", "CN = timonel-ca") // whose certificates are accepted
	scripts, err := filepath.Glob(filepath.Join(tree, "test/cmd/*.sh"))
	if err != nil {
		return err
	}
	for _, path := range append(scripts, filepath.Join(tree, "hack/lib/util.sh")) {
		text, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		if err := os.WriteFile(path, []byte(here.Replace(string(text))), 0o700); err != nil {
			return err
		}
	}
	// A module's files are not executable.
	err = filepath.WalkDir(filepath.Join(tree, "test/fixtures/pkg/kubectl/plugins"), func(path string, _ fs.DirEntry, err error) error {
		return errors.Join(err, os.Chmod(path, 0o755))
	})
	if err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(tree, "upstream.sh"), script, 0o700); err != nil {
		return err
	}
	// Its Go files are not this module's.
	if err := os.WriteFile(filepath.Join(tree, "go.mod"), []byte("module tree\n"), 0o600); err != nil {
		return err
	}
	// Upstream's API server writes its certificate to the folder of temporary files.
	if err := os.MkdirAll(filepath.Join(tree, "tmp"), 0o700); err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(tree, "tmp/apiserver.crt"), ca, 0o600)
}

//go:embed upstream.sh
var script []byte

// suite runs the tests, and returns what they said.
func (o options) suite(ctx context.Context, w io.Writer, port int, token string) (*tally, error) {
	ctx, cancel := context.WithTimeout(ctx, o.timeout)
	defer cancel()
	path := filepath.Join(o.out, "output.txt")
	out, err := os.Create(path)
	if err != nil {
		return nil, err
	}
	defer out.Close()
	fmt.Fprintf(w, "upstream's kubectl tests; their output is in %s\n", path)
	t := &tally{}
	tree := filepath.Join(o.out, "tree")
	cmd := exec.CommandContext(ctx, "bash", filepath.Join(tree, "upstream.sh"))
	cmd.Dir = tree
	cmd.Env = append(os.Environ(), "TREE="+tree, "BIN="+filepath.Join(o.bin, "kubectl-tests"), fmt.Sprintf("PORT=%d", port), "TOKEN="+token,
		"WHAT="+o.what, "TMPDIR="+filepath.Join(tree, "tmp"), "KUBECONFIG=")
	cmd.Stdout = io.MultiWriter(out, t)
	cmd.Stderr = cmd.Stdout
	cmd.WaitDelay = 10 * time.Second // what it left in the background holds its output
	began := time.Now()
	err = cmd.Run()
	t.took = time.Since(began)
	if ctx.Err() != nil {
		return nil, fmt.Errorf("the tests did not end in %s, the last was %s: %w", o.timeout, t.last(), ctx.Err())
	}
	t.exited(err)
	return t, nil
}
