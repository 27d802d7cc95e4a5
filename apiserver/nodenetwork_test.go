package apiserver

import (
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
)

// whoseAddress is the common server's Config.NodeAddress.
func whoseAddress(_ string, ip netip.Addr) error {
	if ip == netip.MustParseAddr("192.0.2.77") {
		return errors.New("192.0.2.77 is the address of node other")
	}
	return nil
}

// TestNodesCannotSayWhatOthersRoute is what somebody with a stolen node certificate
// may try by the API.
func TestNodesCannotSayWhatOthersRoute(t *testing.T) {
	f := shareServer(t)
	ctx := within(t, 30*time.Second)
	admin := client(t, f.admin()).CoreV1().Nodes()
	const name = "routed"
	nodes := client(t, f.network(t, "system:node:"+name, "system:nodes")).CoreV1().Nodes()
	refused := func(t *testing.T, err error, why string) {
		t.Helper()
		if !apierrors.IsForbidden(err) || !strings.Contains(err.Error(), why) {
			t.Errorf("%v, want Forbidden that says %q", err, why)
		}
	}
	status := func(kind corev1.NodeAddressType, address string) corev1.NodeStatus {
		return corev1.NodeStatus{Addresses: []corev1.NodeAddress{{Type: kind, Address: address}, {Type: corev1.NodeHostName, Address: name}}}
	}
	for _, cidr := range []string{"10.244.0.0/24", "0.0.0.0/0", "0.0.0.0/1", "192.0.2.0/24", "fd00::/64", "::/0"} {
		_, err := nodes.Create(ctx, &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name}, Spec: corev1.NodeSpec{PodCIDR: cidr, PodCIDRs: []string{cidr}}}, metav1.CreateOptions{})
		refused(t, err, "the cluster gives each node its range")
		_, err = nodes.Create(ctx, &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name}, Spec: corev1.NodeSpec{PodCIDR: cidr}}, metav1.CreateOptions{})
		refused(t, err, "the cluster gives each node its range")
	}
	for _, address := range []string{"127.0.0.1", "0.0.0.0", "169.254.169.254", "224.0.0.1", "255.255.255.255", "::1", "fe80::1", "ff02::1", "::ffff:10.0.0.1", "10.96.0.1", "192.0.2.77", "name"} {
		for _, kind := range []corev1.NodeAddressType{corev1.NodeInternalIP, corev1.NodeExternalIP} {
			_, err := nodes.Create(ctx, &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name}, Status: status(kind, address)}, metav1.CreateOptions{})
			refused(t, err, "cannot have the "+string(kind))
		}
	}
	// By server-side apply it would be created too.
	apply := fmt.Sprintf(`{"apiVersion":"v1","kind":"Node","metadata":{"name":%q},"spec":{"podCIDR":"0.0.0.0/1","podCIDRs":["0.0.0.0/1"]}}`, name)
	_, err := nodes.Patch(ctx, name, types.ApplyPatchType, []byte(apply), metav1.PatchOptions{FieldManager: "x"})
	if err == nil {
		t.Error("server-side apply created a node with a pod range")
	}

	if _, err := nodes.Create(ctx, &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name}, Status: status(corev1.NodeInternalIP, "192.0.2.50")}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = admin.Delete(within(t, 5*time.Second), name, metav1.DeleteOptions{}) })
	for _, sub := range [][]string{nil, {"status"}} {
		for _, patch := range []struct {
			kind types.PatchType
			body string
		}{
			{types.MergePatchType, `{"spec":{"podCIDR":"10.0.0.0/8","podCIDRs":["10.0.0.0/8"]}}`},
			{types.StrategicMergePatchType, `{"spec":{"podCIDR":"10.0.0.0/8","podCIDRs":["10.0.0.0/8"]}}`},
			{types.JSONPatchType, `[{"op":"add","path":"/spec/podCIDRs","value":["10.0.0.0/8"]}]`},
		} {
			_, err := nodes.Patch(ctx, name, patch.kind, []byte(patch.body), metav1.PatchOptions{}, sub...)
			if live, getErr := admin.Get(ctx, name, metav1.GetOptions{}); getErr != nil || len(live.Spec.PodCIDRs) > 0 {
				t.Errorf("%s of %v: %v, then %v, %v", patch.kind, sub, err, live.Spec, getErr)
			}
			if sub == nil {
				refused(t, err, "the cluster gives each node its range")
			}
		}
	}
	live, err := nodes.Get(ctx, name, metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	for _, address := range []string{"192.0.2.77", "127.0.0.1", "10.96.0.1"} {
		changed := live.DeepCopy()
		changed.Status = status(corev1.NodeInternalIP, address)
		_, err = nodes.UpdateStatus(ctx, changed, metav1.UpdateOptions{})
		refused(t, err, "status.addresses[0]")
		_, err = nodes.Patch(ctx, name, types.MergePatchType, fmt.Appendf(nil, `{"status":{"addresses":[{"type":"InternalIP","address":%q}]}}`, address), metav1.PatchOptions{}, "status")
		refused(t, err, "status.addresses[0]")
	}
	// What the cluster gives stays, and what is the node's own goes on.
	if _, err := admin.Patch(ctx, name, types.MergePatchType, []byte(`{"spec":{"podCIDR":"10.244.9.0/24","podCIDRs":["10.244.9.0/24"]}}`), metav1.PatchOptions{}); err != nil {
		t.Fatal(err)
	}
	if live, err = nodes.Get(ctx, name, metav1.GetOptions{}); err != nil {
		t.Fatal(err)
	}
	live.Labels = map[string]string{"example.com/a": "b"}
	if live, err = nodes.Update(ctx, live, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	live.Status = status(corev1.NodeInternalIP, "192.0.2.51")
	if _, err = nodes.UpdateStatus(ctx, live, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	_, err = nodes.Patch(ctx, name, types.MergePatchType, []byte(`{"spec":{"podCIDR":"","podCIDRs":null}}`), metav1.PatchOptions{})
	if err == nil {
		t.Error("a node gave its range up")
	}
}
