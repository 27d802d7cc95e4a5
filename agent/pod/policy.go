package pod

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"
	runtimev1 "k8s.io/cri-api/pkg/apis/runtime/v1"

	"timonel/network/policy"
)

// Policies is network/policy.
type Policies interface {
	SetPod(policy.Pod)
	RemovePod(uid string)
	Ready(uid string, policies int64) error
}

// guard tells of the pod's addresses, and asks whether all that holds for them is in the
// kernel: until then no container starts. When it is, workers are woken.
func (w *worker) guard(pod *corev1.Pod, s *seen, box *sandbox) {
	if w.m.cfg.Policies == nil {
		s.policed, s.guarded = box.id, true
		return
	}
	if s.policed != box.id {
		ctx, cancel := context.WithTimeout(w.ctx, callTimeout)
		defer cancel()
		p, err := linked(ctx, w.m.cfg.Runtime, box.id)
		if err != nil {
			w.putOff(waitPolicies, reasonCreating, "the pod's link to the network is not known: "+rpcText(err))
			return
		}
		w.waits.done(waitPolicies)
		p.UID, p.Namespace, p.Name, p.Ports = string(w.uid), pod.Namespace, pod.Name, portsOf(pod)
		w.m.cfg.Policies.SetPod(p)
		s.policed = box.id
	}
	s.guarded = true
	if err := w.m.cfg.Policies.Ready(string(w.uid), w.m.cfg.PolicyOf(w.uid)); err != nil {
		s.guarded, s.unguarded = false, err.Error()
	}
}

// unpolice tells that the addresses of a sandbox are nobody's any more.
func (w *worker) unpolice(s *seen, id string) {
	if w.m.cfg.Policies == nil || s.policed != "" && s.policed != id {
		return
	}
	w.m.cfg.Policies.RemovePod(string(w.uid))
	s.policed = ""
}

// Policed tells of the pods that run, so that a new agent's rules have them from the
// beginning. specs are the pods that the node is to have.
func Policed(ctx context.Context, runtime Runtime, specs []*corev1.Pod, to Policies) error {
	ports := map[types.UID][]corev1.ContainerPort{}
	for _, p := range specs {
		ports[p.UID] = portsOf(p)
	}
	boxes, err := runtime.ListPodSandbox(ctx, &runtimev1.ListPodSandboxRequest{Filter: &runtimev1.PodSandboxFilter{
		State: &runtimev1.PodSandboxStateValue{State: runtimev1.PodSandboxState_SANDBOX_READY},
	}})
	if err != nil {
		return fmt.Errorf("list sandboxes: %w", err)
	}
	slices.SortFunc(boxes.Items, func(a, b *runtimev1.PodSandbox) int {
		return int(a.Metadata.GetAttempt()) - int(b.Metadata.GetAttempt())
	})
	for _, box := range boxes.Items {
		uid := box.Labels[labelPodUID]
		p, err := linked(ctx, runtime, box.Id)
		if notFound(err) {
			continue
		}
		if err != nil {
			return err
		}
		if uid == "" || len(p.Addresses) == 0 {
			continue // not a pod's, or on the node's network
		}
		p.UID, p.Namespace, p.Name, p.Ports = uid, box.Labels[labelPodNamespace], box.Labels[labelPodName], ports[types.UID(uid)]
		to.SetPod(p)
	}
	return nil
}

// linked is how a sandbox is linked to the network, as containerd tells: the node's end of
// its link is the one device of the plugins' that is in no sandbox and has no addresses.
func linked(ctx context.Context, runtime Runtime, id string) (policy.Pod, error) {
	var out policy.Pod
	st, err := runtime.PodSandboxStatus(ctx, &runtimev1.PodSandboxStatusRequest{PodSandboxId: id, Verbose: true})
	if err != nil {
		return out, err
	}
	if onNodeNetwork(st.Status) {
		return out, nil
	}
	for _, text := range addressesOf(st.Status) {
		if ip, err := netip.ParseAddr(text); err == nil {
			out.Addresses = append(out.Addresses, ip.Unmap())
		}
	}
	text := st.Info["info"]
	if text == "" {
		return out, nil // of a runtime that tells nothing
	}
	var info struct {
		CNIResult struct {
			Interfaces map[string]*struct {
				Mac, Sandbox string
			}
		} `json:"cniResult"`
	}
	if err := json.Unmarshal([]byte(text), &info); err != nil {
		return out, fmt.Errorf("what containerd tells of sandbox %s: %w", id, err)
	}
	for name, link := range info.CNIResult.Interfaces {
		switch {
		case link == nil:
		case link.Sandbox != "" && name != "lo":
			if out.MAC, err = net.ParseMAC(link.Mac); err != nil {
				return out, fmt.Errorf("what containerd tells of sandbox %s: %s: %w", id, name, err)
			}
		case link.Sandbox == "" && isPort(name):
			out.Device = name
		}
	}
	return out, nil
}

// isPort says whether a device is one that hangs on a bridge, which the bridge itself is not.
func isPort(name string) bool {
	link, err := netlink.LinkByName(name)
	return err == nil && link.Attrs().MasterIndex != 0
}

// portsOf are the ports of all containers of a pod; those of init containers that end are
// none of the node's.
func portsOf(pod *corev1.Pod) (out []corev1.ContainerPort) {
	for i := range pod.Spec.Containers {
		out = append(out, pod.Spec.Containers[i].Ports...)
	}
	for i := range pod.Spec.InitContainers {
		c := &pod.Spec.InitContainers[i]
		for _, p := range c.Ports {
			if !sidecar(c) {
				p.HostPort = 0
			}
			out = append(out, p)
		}
	}
	return out
}
