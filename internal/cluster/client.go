package cluster

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"

	"timonel/pki"
)

// serverName is in every controller's certificate, wherever it is reached.
const serverName = "kubernetes"

// adminUser is the user of the kubeconfig.
const adminUser = "timonel-admin"

// writeKubeconfig writes the kubeconfig: the context named after the cluster
// goes through the load balancer, one per controller is pinned to it. One that is
// there stays, unless its certificate ends soon.
func (s *Spec) writeKubeconfig(bundle *pki.Bundle) error {
	if _, err := clientcmd.LoadFromFile(s.Kubeconfig()); err == nil {
		e, ok := kubeconfigExpiry(s.Kubeconfig())
		if !ok || time.Until(e.At) > warnings[e.Kind].before {
			return nil
		}
	}
	admin, err := bundle.ClientCert(adminUser, []string{pki.AdminGroup})
	if err != nil {
		return err
	}
	spec := pki.KubeconfigSpec{CA: bundle.CA(), User: adminUser, Client: admin,
		Contexts: []pki.KubeContext{{Name: s.Name, Server: "https://" + s.ProxyAddress()}}}
	for _, name := range s.ControllerNames() {
		spec.Contexts = append(spec.Contexts, pki.KubeContext{Name: name, Server: "https://" + s.APIAddress(name)})
	}
	content, err := pki.Kubeconfig(spec)
	if err != nil {
		return err
	}
	config, err := clientcmd.Load(content)
	if err != nil {
		return fmt.Errorf("write kubeconfig: %w", err)
	}
	// The certificates of controllers hold the load balancer's address, but for those
	// of older programs.
	config.Clusters[s.Name].TLSServerName = serverName
	if err := clientcmd.WriteToFile(*config, s.Kubeconfig()); err != nil {
		return fmt.Errorf("write kubeconfig: %w", err)
	}
	return nil
}

// RESTConfig is how to reach the API through a context of the kubeconfig:
// the cluster's name, or a controller's.
func (s *Spec) RESTConfig(contextName string) (*rest.Config, error) {
	config, err := clientcmd.NewNonInteractiveDeferredLoadingClientConfig(
		&clientcmd.ClientConfigLoadingRules{ExplicitPath: s.Kubeconfig()},
		&clientcmd.ConfigOverrides{CurrentContext: contextName}).ClientConfig()
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", s.Kubeconfig(), err)
	}
	config.QPS, config.Burst = -1, -1
	return config, nil
}

// client reaches the API of the cluster's controllers.
type client struct {
	spec *Spec
	http *http.Client            // with the CA and the admin's certificate
	each []*kubernetes.Clientset // pinned to each controller
}

// attempt bounds one request; whoever asks tries again.
const attempt = 2 * time.Second

func newClient(s *Spec) (*client, error) {
	c := &client{spec: s}
	for _, name := range s.ControllerNames() {
		config, err := s.RESTConfig(name)
		if err != nil {
			return nil, err
		}
		config.Timeout = attempt
		config.ServerName = serverName
		if c.http == nil {
			if c.http, err = rest.HTTPClientFor(config); err != nil {
				return nil, err
			}
		}
		set, err := kubernetes.NewForConfigAndClient(config, c.http)
		if err != nil {
			return nil, err
		}
		c.each = append(c.each, set)
	}
	return c, nil
}

// ready asks a controller's /readyz.
func (c *client) ready(ctx context.Context, name string) error {
	return c.readyAt(ctx, c.spec.APIAddress(name))
}

func (c *client) readyAt(ctx context.Context, address string) error {
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, "https://"+address+"/readyz", nil)
	if err != nil {
		return err
	}
	response, err := c.http.Do(request)
	if err != nil {
		return err
	}
	response.Body.Close()
	if response.StatusCode != http.StatusOK {
		return fmt.Errorf("/readyz answers %s", response.Status)
	}
	return nil
}

// recordUp writes a ConfigMap that says what this cluster is, again and again
// until a controller has taken it: the first write that the cluster serves.
func (c *client) recordUp(ctx context.Context, s *Spec) error {
	record := &corev1.ConfigMap{
		ObjectMeta: metav1.ObjectMeta{Name: "timonel-up", Namespace: metav1.NamespaceSystem},
		Data: map[string]string{"cluster": s.Name, "run": s.Run, "subnet": s.Subnet.String(),
			"podNetwork": s.ClusterCIDR.String(), "created": s.Created.Format(time.RFC3339)},
	}
	// All at once: one that takes the request and waits must not hold up the rest.
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	results := make(chan error, len(c.each))
	for _, set := range c.each {
		go func() { results <- createOrUpdate(ctx, set, record) }()
	}
	var err error
	for range c.each {
		if err = <-results; err == nil {
			return nil
		}
	}
	return fmt.Errorf("no controller serves writes: %w", err)
}

// createOrUpdate writes a ConfigMap, again and again until it is taken or ctx
// ends; then it returns why it was not.
func createOrUpdate(ctx context.Context, set *kubernetes.Clientset, record *corev1.ConfigMap) error {
	last := errors.New("no answer")
	err := poll(ctx, 10*time.Millisecond, func() (bool, error) {
		maps := set.CoreV1().ConfigMaps(record.Namespace)
		_, err := maps.Create(ctx, record, metav1.CreateOptions{})
		if apierrors.IsAlreadyExists(err) {
			_, err = maps.Update(ctx, record, metav1.UpdateOptions{})
		}
		if err != nil && ctx.Err() == nil {
			last = err
		}
		return err == nil, nil
	})
	if err != nil {
		return last
	}
	return nil
}

// any calls f with each controller's client until one does it.
func (c *client) any(f func(*kubernetes.Clientset) error) error {
	var err error
	for _, set := range c.each {
		if err = f(set); err == nil || apierrors.IsNotFound(err) || apierrors.IsAlreadyExists(err) || apierrors.IsInvalid(err) || apierrors.IsForbidden(err) {
			return err
		}
	}
	return err
}

func (c *client) node(ctx context.Context, name string) (node *corev1.Node, err error) {
	err = c.any(func(set *kubernetes.Clientset) (err error) {
		node, err = set.CoreV1().Nodes().Get(ctx, name, metav1.GetOptions{})
		return err
	})
	return node, err
}

// nodeReady returns whether a node is Ready and, when not, why.
func nodeReady(node *corev1.Node) (bool, string) {
	for _, condition := range node.Status.Conditions {
		if condition.Type == corev1.NodeReady {
			return condition.Status == corev1.ConditionTrue, condition.Reason + ": " + condition.Message
		}
	}
	return false, "it has no Ready condition"
}

// route lets the host reach a node's pods.
func (s *Spec) route(node *corev1.Node) error {
	for _, cidr := range node.Spec.PodCIDRs {
		prefix, err := netip.ParsePrefix(cidr)
		if err != nil {
			return fmt.Errorf("node %s: pod network: %w", node.Name, err)
		}
		if !prefix.Addr().Is4() {
			continue // machines have addresses of IPv4 alone
		}
		if err := s.Network().Route(prefix, s.Address(node.Name)); err != nil {
			return err
		}
	}
	return nil
}
