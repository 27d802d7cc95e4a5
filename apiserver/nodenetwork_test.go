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

// whosePodAddress is the common server's Config.PodAddress: any but other's.
func whosePodAddress(_ string, hostNetwork bool, ip netip.Addr) error {
	if ip == netip.MustParseAddr("10.244.77.7") || hostNetwork && ip == netip.MustParseAddr("192.0.2.77") {
		return fmt.Errorf("%s is not of the node", ip)
	}
	return nil
}

// TestNodesCannotGivePodsOthersAddresses is what makes a pod of one node the endpoint of a
// Service, or a policy's peer, at another's address.
func TestNodesCannotGivePodsOthersAddresses(t *testing.T) {
	f := shareServer(t)
	ctx := within(t, 30*time.Second)
	admin := client(t, f.admin()).CoreV1()
	const name = "housed"
	node, err := admin.Nodes().Create(ctx, &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name}}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = admin.Nodes().Delete(within(t, 5*time.Second), name, metav1.DeleteOptions{}) })
	if _, err := admin.Namespaces().Create(ctx, &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: name}}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	if _, err := admin.ServiceAccounts(name).Create(ctx, &corev1.ServiceAccount{ObjectMeta: metav1.ObjectMeta{Name: "default"}}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	pods := client(t, f.network(t, "system:node:"+name, "system:nodes")).CoreV1().Pods(name)
	mirror := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{
			Name: "mirror-" + name, Annotations: map[string]string{corev1.MirrorPodAnnotationKey: "x"}, Labels: map[string]string{"app": "db"},
			OwnerReferences: []metav1.OwnerReference{{APIVersion: "v1", Kind: "Node", Name: name, UID: node.UID, Controller: new(true)}},
		},
		Spec: corev1.PodSpec{NodeName: name, Containers: []corev1.Container{{Name: "c", Image: "example.com/none"}}},
	}
	if _, err := pods.Create(ctx, mirror, metav1.CreateOptions{}); !apierrors.IsForbidden(err) || !strings.Contains(err.Error(), "agents have no static pods") {
		t.Errorf("a mirror pod: %v", err)
	}
	for _, hostNetwork := range []bool{false, true} {
		pod := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{GenerateName: "housed-"}, Spec: corev1.PodSpec{
			NodeName: name, HostNetwork: hostNetwork, Containers: []corev1.Container{{Name: "c", Image: "example.com/none"}}}}
		pod, err := admin.Pods(name).Create(ctx, pod, metav1.CreateOptions{})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			_ = admin.Pods(name).Delete(within(t, 5*time.Second), pod.Name, metav1.DeleteOptions{GracePeriodSeconds: new(int64)})
		})
		refused := func(what string, err error, why string) {
			t.Helper()
			if !apierrors.IsForbidden(err) || !strings.Contains(err.Error(), why) {
				t.Errorf("host network %t, %s: %v, want Forbidden that says %q", hostNetwork, what, err, why)
			}
		}
		with := func(host string, ips ...string) *corev1.Pod {
			changed := pod.DeepCopy()
			changed.Status.HostIP, changed.Status.HostIPs = host, []corev1.HostIP{{IP: host}}
			changed.Status.PodIP, changed.Status.PodIPs = ips[0], nil
			for _, ip := range ips {
				changed.Status.PodIPs = append(changed.Status.PodIPs, corev1.PodIP{IP: ip})
			}
			return changed
		}
		others := "10.244.77.7"
		if hostNetwork {
			others = "192.0.2.77"
		}
		// The node authorizer hears of the pod a moment later.
		for deadline := time.Now().Add(10 * time.Second); ; {
			_, err = pods.UpdateStatus(ctx, with("192.0.2.50", others), metav1.UpdateOptions{})
			if err == nil || strings.Contains(err.Error(), "cannot have") || time.Now().After(deadline) {
				break
			}
		}
		refused("update", err, "status.podIPs[0]: pod "+name+"/"+pod.Name)
		_, err = pods.UpdateStatus(ctx, with("192.0.2.50", "fd00::1", others), metav1.UpdateOptions{})
		refused("a second address", err, "status.podIPs[")
		_, err = pods.UpdateStatus(ctx, with("192.0.2.77", "10.244.1.1"), metav1.UpdateOptions{})
		refused("the host's", err, "status.hostIPs[0]")
		for _, kind := range []types.PatchType{types.MergePatchType, types.StrategicMergePatchType} {
			_, err = pods.Patch(ctx, pod.Name, kind, fmt.Appendf(nil, `{"status":{"podIP":%q,"podIPs":[{"ip":%q}]}}`, others, others), metav1.PatchOptions{}, "status")
			refused(string(kind), err, "status.podIPs[0]")
		}
		if _, err = pods.UpdateStatus(ctx, with("192.0.2.50", "10.244.1.1"), metav1.UpdateOptions{}); err != nil {
			t.Fatalf("host network %t: an address of its own: %v", hostNetwork, err)
		}
		// What somebody else has said stays: the node may have had that range once.
		if pod, err = admin.Pods(name).Get(ctx, pod.Name, metav1.GetOptions{}); err != nil {
			t.Fatal(err)
		}
		if pod, err = admin.Pods(name).UpdateStatus(ctx, with("192.0.2.50", others), metav1.UpdateOptions{}); err != nil {
			t.Fatal(err)
		}
		changed := pod.DeepCopy()
		changed.Status.Message = "goes on"
		if _, err = pods.UpdateStatus(ctx, changed, metav1.UpdateOptions{}); err != nil {
			t.Errorf("host network %t: a status with an address of before: %v", hostNetwork, err)
		}
	}
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
