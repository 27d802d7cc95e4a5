package cluster

import (
	"context"
	"fmt"
	"net/netip"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
)

// Addresses of the machines' network that no machine has: the last of it.
const firstOfPool, lastOfPool = 241, 254

// PoolAddresses are those that Services of type LoadBalancer get.
func (s *Spec) PoolAddresses() (first, last netip.Addr) {
	at := func(n byte) netip.Addr {
		ip := s.Subnet.Masked().Addr().As4()
		ip[3] += n
		return netip.AddrFrom4(ip)
	}
	return at(firstOfPool), at(lastOfPool)
}

// pool gives Services of type LoadBalancer addresses, unless there are pools.
func (u *up) pool(ctx context.Context) error {
	first, last := u.PoolAddresses()
	pools := &corev1.ConfigMap{
		ObjectMeta: metav1.ObjectMeta{Name: "load-balancer-pools", Namespace: metav1.NamespaceSystem},
		Data:       map[string]string{"default": fmt.Sprintf("addresses: [%s-%s]", first, last)},
	}
	err := u.client.any(func(set *kubernetes.Clientset) error {
		_, err := set.CoreV1().ConfigMaps(pools.Namespace).Create(ctx, pools, metav1.CreateOptions{})
		return err
	})
	if err != nil && !apierrors.IsAlreadyExists(err) {
		return fmt.Errorf("make the pool of addresses for Services of type LoadBalancer: %w", err)
	}
	return nil
}
