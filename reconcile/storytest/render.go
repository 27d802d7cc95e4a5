package storytest

import (
	"fmt"
	"slices"
	"strings"

	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/yaml"

	"timonel/reconcile"
	"timonel/reconcile/workload"
)

// describe renders a change with what it changes.
func (s *Story) describe(c reconcile.Request) string {
	out := c.String()
	key, _ := s.keyOf(c.Resource, c.Namespace, c.Name)
	var lines []string
	switch c.Verb {
	case reconcile.VerbCreate:
		flatten("", toMap(c.Object), &lines)
	case reconcile.VerbUpdate:
		old, next := map[string]string{}, map[string]string{}
		s.mu.Lock()
		var was, is []string
		flatten("", s.live[key], &was)
		s.mu.Unlock()
		flatten("", toMap(c.Object), &is)
		for _, l := range was {
			k, v, _ := strings.Cut(l, "=")
			old[k] = v
		}
		for _, l := range is {
			k, v, _ := strings.Cut(l, "=")
			next[k] = v
			if old[k] != v {
				lines = append(lines, l)
			}
		}
		for _, l := range was {
			if k, _, _ := strings.Cut(l, "="); !strings.HasPrefix(k, "metadata.managedFields") {
				if _, ok := next[k]; !ok {
					lines = append(lines, "-"+k)
				}
			}
		}
	case reconcile.VerbPatch:
		flatten("", mapOf(c.Patch), &lines)
	case reconcile.VerbDelete:
		if c.Propagation != nil {
			lines = append(lines, string(*c.Propagation))
		}
		if c.GracePeriodSeconds != nil {
			lines = append(lines, fmt.Sprintf("grace=%d", *c.GracePeriodSeconds))
		}
	}
	for _, l := range lines {
		out += "\n    " + l
	}
	return out
}

func mapOf(raw []byte) map[string]any {
	m, _ := MergeJSON(nil, nil).(map[string]any)
	if err := yaml.Unmarshal(raw, &m); err != nil {
		panic(err)
	}
	return m
}

// flatten lists the leaves of an object, without what says nothing in a story.
func flatten(path string, v any, out *[]string) {
	if strings.Contains(path, "ownerReferences[") && strings.Contains(path, "].") && !strings.HasSuffix(path, "].name") ||
		strings.HasSuffix(path, "].type") || strings.HasSuffix(path, ".lastProbeTime") {
		return
	}
	switch path {
	case "metadata.uid", "metadata.resourceVersion", "metadata.creationTimestamp", "metadata.generateName", "metadata.name", "metadata.namespace",
		"apiVersion", "kind", "spec.template", "spec.containers", "metadata.managedFields", "metadata.annotations.kubernetes.io/description":
		return
	}
	switch v := v.(type) {
	case map[string]any:
		keys := make([]string, 0, len(v))
		for k := range v {
			keys = append(keys, k)
		}
		slices.Sort(keys)
		for _, k := range keys {
			sub := k
			if path != "" {
				sub = path + "." + k
			}
			flatten(sub, v[k], out)
		}
	case []any:
		if path == "spec.tolerations" {
			*out = append(*out, path+"="+briefly(v))
			return
		}
		for i, e := range v {
			sub := fmt.Sprintf("%s[%d]", path, i)
			if m, ok := e.(map[string]any); ok {
				if t, ok := m["type"].(string); ok {
					sub = fmt.Sprintf("%s[%s]", path, t)
				}
			}
			flatten(sub, e, out)
		}
	default:
		value := fmt.Sprint(v)
		if len(value) > longest {
			value = value[:longest] + "…"
		}
		*out = append(*out, path+"="+value)
	}
}

func (s *Story) Show(prefix string) string {
	var out strings.Builder
	for _, key := range s.List(prefix) {
		s.mu.Lock()
		u := unstructured.Unstructured{Object: s.live[key]}
		fmt.Fprintf(&out, "%s %s", strings.ToLower(u.GetKind()), types.NamespacedName{Namespace: u.GetNamespace(), Name: u.GetName()})
		for _, f := range [][]string{{"spec", "replicas"}, {"spec", "nodeName"}, {"spec", "podCIDR"}, {"status", "phase"}, {"status", "active"}, {"status", "succeeded"}, {"status", "failed"}} {
			if v, ok, _ := unstructured.NestedFieldNoCopy(u.Object, f...); ok {
				fmt.Fprintf(&out, " %s=%v", f[1], v)
			}
		}
		conditions, _, _ := unstructured.NestedSlice(u.Object, "status", "conditions")
		for _, c := range conditions {
			if m, ok := c.(map[string]any); ok && (u.GetKind() == "Node" || u.GetKind() == "Pod" || u.GetKind() == "Job") {
				fmt.Fprintf(&out, " %v=%v", m["type"], m["status"])
			}
		}
		taints, _, _ := unstructured.NestedSlice(u.Object, "spec", "taints")
		for _, taint := range taints {
			if m, ok := taint.(map[string]any); ok {
				fmt.Fprintf(&out, " %v:%v", m["key"], m["effect"])
			}
		}
		if u.GetDeletionTimestamp() != nil {
			out.WriteString(" deleting")
		}
		for _, f := range u.GetFinalizers() {
			fmt.Fprintf(&out, " finalizer=%s", f)
		}
		for _, o := range u.GetOwnerReferences() {
			fmt.Fprintf(&out, " owner=%s", o.Name)
		}
		for k, v := range u.GetAnnotations() {
			if k == workload.RevisionAnnotation {
				fmt.Fprintf(&out, " revision=%s", v)
			}
		}
		out.WriteString("\n")
		s.mu.Unlock()
	}
	return out.String()
}
