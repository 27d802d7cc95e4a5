package pod

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/kubernetes/pkg/api/v1/resource"
	"k8s.io/kubernetes/pkg/fieldpath"
	"k8s.io/kubernetes/pkg/kubelet/envvars"
	"k8s.io/kubernetes/third_party/forked/golang/expansion"
)

// variable is one environment variable; later ones of a name have replaced
// earlier ones.
type variable struct{ name, value string }

type environment []variable

func (e environment) values() map[string]string {
	out := make(map[string]string, len(e))
	for _, v := range e {
		out[v.name] = v.value
	}
	return out
}

// maxText is how long a process' variables may be together, and its arguments: what
// Linux takes of both. What is longer could not be started, but a few bytes of a pod
// can ask for any number: the same ConfigMap under many prefixes, $(VAR)s of $(VAR)s.
const maxText = 6 << 20

// perString is what Linux takes of that for each string beside its bytes.
const perString = 10

// room is how much may still be made of what a pod says.
type room struct{ left int }

var errTooLong = fmt.Errorf("they are longer than %d MiB, and no process could be started with them", maxText>>20)

func (r *room) take(n int) error {
	if n > r.left {
		return errTooLong
	}
	r.left -= n
	return nil
}

// expand replaces $(VAR)s while there is room.
func (r *room) expand(text string, lookup func(string) string) (string, error) {
	if err := r.take(perString + len(text)); err != nil {
		return "", err
	}
	var err error
	out := expansion.Expand(text, func(name string) string {
		value := lookup(name)
		if err == nil {
			err = r.take(len(value))
		}
		if err != nil {
			return ""
		}
		return value
	})
	return out, err
}

// environment is a container's: envFrom, then env with $(VAR) expanded, then what
// Services' variables neither of them has set, as the kubelet orders them.
func (m *Manager) environment(pod *corev1.Pod, c *corev1.Container, podIPs []string) (environment, error) {
	var env environment
	left, at := room{maxText}, map[string]int{}
	set := func(name, value string) error {
		if err := left.take(len(name) + len(value) + perString); err != nil {
			return fmt.Errorf("environment variables: %w", err)
		}
		if i, ok := at[name]; ok {
			env[i].value = value
			return nil
		}
		at[name] = len(env)
		env = append(env, variable{name, value})
		return nil
	}
	for _, from := range c.EnvFrom {
		data, err := m.envFrom(pod, &from)
		if err != nil {
			return nil, err
		}
		for _, k := range slices.Sorted(maps.Keys(data)) {
			name := from.Prefix + k
			if strings.ContainsAny(name, "=") || name == "" {
				continue
			}
			if err := set(name, data[k]); err != nil {
				return nil, err
			}
		}
	}
	services, err := m.serviceEnvironment(pod)
	if err != nil {
		return nil, err
	}
	seen := env.values()
	for _, e := range c.Env {
		value, found, err := m.envValue(pod, c, &e, podIPs, left, expansion.MappingFuncFor(seen, services))
		if err != nil {
			return nil, err
		}
		if !found {
			continue
		}
		if err := set(e.Name, value); err != nil {
			return nil, err
		}
		seen[e.Name] = value
	}
	for _, k := range slices.Sorted(maps.Keys(services)) {
		if _, taken := seen[k]; taken {
			continue
		}
		if err := set(k, services[k]); err != nil {
			return nil, fmt.Errorf("%w: spec.enableServiceLinks: false leaves out those of Services", err)
		}
	}
	return env, nil
}

func (m *Manager) envFrom(pod *corev1.Pod, from *corev1.EnvFromSource) (map[string]string, error) {
	out := map[string]string{}
	switch {
	case from.ConfigMapRef != nil:
		ref := from.ConfigMapRef
		cm, ok := m.cfg.Objects.ConfigMap(pod.Namespace, ref.Name)
		if !ok && !isTrue(ref.Optional) {
			return nil, fmt.Errorf("configmap %q not found", ref.Name)
		}
		if ok {
			for k, v := range cm.Data {
				out[k] = v
			}
		}
	case from.SecretRef != nil:
		ref := from.SecretRef
		s, ok := m.cfg.Objects.Secret(pod.Namespace, ref.Name)
		if !ok && !isTrue(ref.Optional) {
			return nil, fmt.Errorf("secret %q not found", ref.Name)
		}
		if ok {
			for k, v := range s.Data {
				out[k] = string(v)
			}
		}
	}
	return out, nil
}

func isTrue(b *bool) bool { return b != nil && *b }

// envValue resolves one variable; found is false for an optional reference to
// what is not there.
func (m *Manager) envValue(pod *corev1.Pod, c *corev1.Container, e *corev1.EnvVar, podIPs []string, left room, lookup func(string) string) (value string, found bool, err error) {
	src := e.ValueFrom
	if src == nil {
		if value, err = left.expand(e.Value, lookup); err != nil {
			return "", false, fmt.Errorf("environment variables: %w", err)
		}
		return value, true, nil
	}
	switch {
	case src.FieldRef != nil:
		value, err = m.field(pod, src.FieldRef.FieldPath, podIPs)
	case src.ResourceFieldRef != nil:
		ref, name := src.ResourceFieldRef, src.ResourceFieldRef.ContainerName
		if name == "" {
			name = c.Name
		}
		value, err = resource.ExtractResourceValueByContainerNameAndNodeAllocatable(ref, pod, name, m.cfg.Capacity())
	case src.ConfigMapKeyRef != nil:
		ref := src.ConfigMapKeyRef
		cm, ok := m.cfg.Objects.ConfigMap(pod.Namespace, ref.Name)
		if !ok {
			return missing(ref.Optional, fmt.Errorf("configmap %q not found", ref.Name))
		}
		if value, ok = cm.Data[ref.Key]; !ok {
			return missing(ref.Optional, fmt.Errorf("couldn't find key %v in ConfigMap %v/%v", ref.Key, pod.Namespace, ref.Name))
		}
	case src.SecretKeyRef != nil:
		ref := src.SecretKeyRef
		s, ok := m.cfg.Objects.Secret(pod.Namespace, ref.Name)
		if !ok {
			return missing(ref.Optional, fmt.Errorf("secret %q not found", ref.Name))
		}
		raw, ok := s.Data[ref.Key]
		if !ok {
			return missing(ref.Optional, fmt.Errorf("couldn't find key %v in Secret %v/%v", ref.Key, pod.Namespace, ref.Name))
		}
		value = string(raw)
	default:
		err = errors.New("valueFrom of this kind is not supported by this node")
	}
	if err != nil {
		return "", false, fmt.Errorf("environment variable %s: %w", e.Name, err)
	}
	return value, true, nil
}

func missing(optional *bool, err error) (string, bool, error) {
	if isTrue(optional) {
		return "", false, nil
	}
	return "", false, err
}

// field reads a fieldRef, those that only the node knows included.
func (m *Manager) field(pod *corev1.Pod, path string, podIPs []string) (string, error) {
	switch path {
	case "spec.nodeName":
		return pod.Spec.NodeName, nil
	case "spec.serviceAccountName":
		return pod.Spec.ServiceAccountName, nil
	case "status.hostIP":
		return first(m.cfg.HostIPs()), nil
	case "status.hostIPs":
		return strings.Join(m.cfg.HostIPs(), ","), nil
	case "status.podIP":
		return first(podIPs), nil
	case "status.podIPs":
		return strings.Join(podIPs, ","), nil
	}
	return fieldpath.ExtractFieldPathAsString(pod, path)
}

func first(list []string) string {
	if len(list) == 0 {
		return ""
	}
	return list[0]
}

// serviceEnvironment points at the API, which in-cluster clients read, and unless the
// pod does not want that at the Services of its namespace.
func (m *Manager) serviceEnvironment(pod *corev1.Pod) (map[string]string, error) {
	var services []*corev1.Service
	if links := pod.Spec.EnableServiceLinks; m.cfg.Services != nil && (links == nil || *links) {
		all, err := m.cfg.Services(pod.Namespace)
		if err != nil {
			return nil, err
		}
		for _, s := range all {
			if len(s.Spec.Ports) > 0 { // all that have an address do
				services = append(services, s)
			}
		}
	}
	if ip := m.cfg.KubernetesServiceIP; ip != "" { // last: none of the pod's namespace hides it
		services = append(services, &corev1.Service{
			ObjectMeta: metav1.ObjectMeta{Namespace: metav1.NamespaceDefault, Name: "kubernetes"},
			Spec:       corev1.ServiceSpec{ClusterIP: ip, Ports: []corev1.ServicePort{{Name: "https", Port: 443, Protocol: corev1.ProtocolTCP}}},
		})
	}
	out := map[string]string{}
	for _, v := range envvars.FromServices(services) {
		out[v.Name] = v.Value
	}
	return out, nil
}
