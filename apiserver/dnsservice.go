package apiserver

import (
	"context"
	"log/slog"
	"net/netip"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
	"k8s.io/client-go/kubernetes"
	corelisters "k8s.io/client-go/listers/core/v1"
	"k8s.io/utils/ptr"
)

const (
	dnsServiceName = "kube-dns"
	// dnsServiceRecheck is how often it is looked, in memory, whether the Service is
	// still there.
	dnsServiceRecheck = 5 * time.Second
)

// dnsService makes the Service kube-system/kube-dns. It has no selector and no
// endpoints: each node's agent answers at its address itself. One that is there is
// somebody's, and stays as it is.
type dnsService struct {
	client    kubernetes.Interface
	lister    corelisters.ServiceLister
	addresses []netip.Addr
}

// keep makes the Service when there is none, until ctx ends.
func (d *dnsService) keep(ctx context.Context) {
	said := ""
	for {
		err := d.ensure(ctx)
		again := dnsServiceRecheck
		if err != nil && ctx.Err() == nil {
			again = hookRetry
			if text := err.Error(); text != said {
				said = text
				slog.Warn("the Service of the cluster's DNS cannot be made; trying again. If another Service has its address, delete that one: pods look up names there",
					"service", metav1.NamespaceSystem+"/"+dnsServiceName, "addresses", d.addresses, "error", err)
			}
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(again):
		}
	}
}

func (d *dnsService) ensure(ctx context.Context) error {
	if _, err := d.lister.Services(metav1.NamespaceSystem).Get(dnsServiceName); !apierrors.IsNotFound(err) {
		return err
	}
	// The lister may not have heard of it yet, and one with its own address taken is not
	// refused as one that is there.
	services := d.client.CoreV1().Services(metav1.NamespaceSystem)
	if _, err := services.Get(ctx, dnsServiceName, metav1.GetOptions{}); !apierrors.IsNotFound(err) {
		return err
	}
	_, err := services.Create(ctx, d.service(), metav1.CreateOptions{})
	if apierrors.IsAlreadyExists(err) {
		return nil
	}
	return err
}

// service is as kubeadm makes it, but for its selector.
func (d *dnsService) service() *corev1.Service {
	var ips []string
	var families []corev1.IPFamily
	for _, ip := range d.addresses {
		ips = append(ips, ip.String())
		family := corev1.IPv4Protocol
		if ip.Is6() {
			family = corev1.IPv6Protocol
		}
		families = append(families, family)
	}
	port := func(name string, protocol corev1.Protocol) corev1.ServicePort {
		return corev1.ServicePort{Name: name, Port: 53, TargetPort: intstr.FromInt32(53), Protocol: protocol}
	}
	s := &corev1.Service{
		ObjectMeta: metav1.ObjectMeta{
			Namespace: metav1.NamespaceSystem, Name: dnsServiceName,
			Labels: map[string]string{"k8s-app": dnsServiceName, "kubernetes.io/cluster-service": "true", "kubernetes.io/name": "CoreDNS"},
			Annotations: map[string]string{
				"timonel.io/served-by": "the agent of each node, on that node",
			},
		},
		Spec: corev1.ServiceSpec{
			Type: corev1.ServiceTypeClusterIP, ClusterIP: ips[0], ClusterIPs: ips, IPFamilies: families,
			Ports: []corev1.ServicePort{port("dns", corev1.ProtocolUDP), port("dns-tcp", corev1.ProtocolTCP)},
		},
	}
	if len(ips) > 1 {
		s.Spec.IPFamilyPolicy = ptr.To(corev1.IPFamilyPolicyRequireDualStack)
	}
	return s
}
