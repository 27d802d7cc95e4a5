package apiserver

import (
	"fmt"
	"net/netip"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	corelisters "k8s.io/client-go/listers/core/v1"
	"k8s.io/client-go/tools/cache"
)

// TestDNSService: it is made, made again, and left to who changes it.
func TestDNSService(t *testing.T) {
	c := client(t, shareServer(t).admin()).CoreV1().Services("kube-system")
	var made *corev1.Service
	there := func(not string) {
		t.Helper()
		eventually(t, time.Minute, func() error {
			s, err := c.Get(within(t, 10*time.Second), dnsServiceName, metav1.GetOptions{})
			if err == nil && string(s.UID) == not {
				err = fmt.Errorf("it is not gone yet")
			}
			made = s
			return err
		})
	}
	there("")
	require.Equal(t, "10.96.0.10", made.Spec.ClusterIP)
	require.Empty(t, made.Spec.Selector)
	require.Equal(t, "kube-dns", made.Labels["k8s-app"])
	require.Len(t, made.Spec.Ports, 2)

	require.NoError(t, c.Delete(within(t, 10*time.Second), dnsServiceName, metav1.DeleteOptions{}))
	there(string(made.UID))

	// Somebody installs CoreDNS.
	made.Spec.Selector = map[string]string{"k8s-app": "kube-dns"}
	made, err := c.Update(within(t, 10*time.Second), made, metav1.UpdateOptions{})
	require.NoError(t, err)
	nothing := corelisters.NewServiceLister(cache.NewIndexer(cache.MetaNamespaceKeyFunc, cache.Indexers{})) // has not heard of it
	d := &dnsService{client: client(t, shareServer(t).admin()), lister: nothing, addresses: []netip.Addr{netip.MustParseAddr("10.96.0.10")}}
	require.NoError(t, d.ensure(within(t, 10*time.Second)))
	after, err := c.Get(within(t, 10*time.Second), dnsServiceName, metav1.GetOptions{})
	require.NoError(t, err)
	require.Equal(t, made.ResourceVersion, after.ResourceVersion)
}
