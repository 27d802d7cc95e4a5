package differential

import (
	"encoding/json"
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strings"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"

	"timonel/reconcile"
	"timonel/reconcile/workload/job"
)

// resources are what is compared, and what can own, by kind.
var resources = map[string]schema.GroupVersionResource{
	"Pod":                   reconcile.PodsResource,
	"ReplicaSet":            reconcile.ReplicaSetsResource,
	"ReplicationController": reconcile.ReplicationControllersResource,
	"Deployment":            reconcile.DeploymentsResource,
	"StatefulSet":           reconcile.StatefulSetsResource,
	"DaemonSet":             reconcile.DaemonSetsResource,
	"ControllerRevision":    reconcile.ControllerRevisionsResource,
	"PersistentVolumeClaim": reconcile.PVCsResource,
	"Job":                   job.JobsResource,
	"CronJob":               job.CronJobsResource,
}

// identity names an object by what it is: what a controller names at random is called by
// its owner.
func (s *side) identity(obj map[string]any) string {
	u := unstructured.Unstructured{Object: obj}
	owner := ""
	for _, ref := range u.GetOwnerReferences() {
		if ref.Controller != nil && *ref.Controller {
			owner = ref.Name
			if r, ok := resources[ref.Kind]; ok {
				if o := s.Find(r, u.GetNamespace(), ref.Name); o != nil {
					owner = s.identity(o)
				}
			}
		}
	}
	switch prefix := u.GetGenerateName(); {
	case aimOf(obj) != "": // a DaemonSet's
		return prefix + aimOf(obj) + "-*"
	case prefix == "" || u.GetLabels()[appsv1.PodIndexLabel] != "": // a StatefulSet's pods have names of their own
		return u.GetName()
	case owner == "": // it had one
		return prefix + "*"
	case u.GetLabels()["batch.kubernetes.io/job-completion-index"] != "":
		return owner + "-" + u.GetLabels()["batch.kubernetes.io/job-completion-index"] + "-*"
	default:
		return owner + "-*"
	}
}

// spam is how many events client-go tells of an object before it begins to leave some out.
const spam = 25

// seen is a side as it is compared.
type seen map[string][]string // what of each kind of thing, in order

// look returns what is compared of a side, and forgets what was done.
func (s *side) look() seen {
	out := seen{}
	for kind, r := range resources {
		for _, obj := range s.All(r, ns) {
			out[kind] = append(out[kind], s.render(obj))
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for what, n := range s.done {
		out["requests"] = append(out["requests"], fmt.Sprintf("%s: %d times", what, n))
	}
	out["events"] = slices.Collect(maps.Keys(s.events))
	for who, n := range s.tally {
		if n >= spam && s.upstream != nil {
			out["spammed"] = append(out["spammed"], who)
		}
	}
	out["failures"] = s.failed
	clear(s.done)
	clear(s.events)
	for _, list := range out {
		slices.Sort(list)
	}
	return out
}

// podName is what a Job's conditions call a pod by.
var podName = regexp.MustCompile(`(pod \w+/|Pod \w+/)\S+`)

// render returns an object without what may differ, as JSON behind its identity.
func (s *side) render(obj map[string]any) string {
	who := s.identity(obj)
	obj = runtime.DeepCopyJSON(obj)
	if conditions, ok, _ := unstructured.NestedSlice(obj, "status", "conditions"); ok && obj["kind"] == "Job" {
		for _, c := range conditions { // that name a pod
			if m, ok := c.(map[string]any)["message"].(string); ok {
				c.(map[string]any)["message"] = podName.ReplaceAllString(m, "$1*")
			}
		}
		_ = unstructured.SetNestedSlice(obj, conditions, "status", "conditions")
	}
	metadata := obj["metadata"].(map[string]any)
	for _, field := range []string{"uid", "resourceVersion", "managedFields", "name", "generateName", "namespace"} {
		delete(metadata, field)
	}
	if notes, ok := metadata["annotations"].(map[string]any); ok { // where ours counts what upstream remembers
		if delete(notes, "timonel.io/daemon-failures"); len(notes) == 0 {
			delete(metadata, "annotations")
		}
	}
	if l, ok := metadata["labels"].(map[string]any); ok {
		delete(l, nudged)
	}
	if volumes, ok, _ := unstructured.NestedSlice(obj, "spec", "volumes"); ok { // in the order of upstream's map
		slices.SortFunc(volumes, func(a, b any) int {
			return strings.Compare(fmt.Sprint(a.(map[string]any)["name"]), fmt.Sprint(b.(map[string]any)["name"]))
		})
		_ = unstructured.SetNestedSlice(obj, volumes, "spec", "volumes")
	}
	if refs, ok := metadata["ownerReferences"].([]any); ok {
		for _, ref := range refs {
			delete(ref.(map[string]any), "uid")
		}
	}
	status, _ := obj["status"].(map[string]any)
	if seen, ok := status["observedGeneration"]; ok && fmt.Sprint(seen) == fmt.Sprint(metadata["generation"]) {
		status["observedGeneration"] = "current"
	}
	if active, ok := status["active"].([]any); ok { // a CronJob's
		for _, ref := range active {
			delete(ref.(map[string]any), "uid")
			delete(ref.(map[string]any), "resourceVersion")
		}
	}
	delete(obj, "apiVersion")
	delete(obj, "kind")
	raw, err := json.Marshal(obj)
	if err != nil {
		s.t.Fatalf("render %s: %v", who, err)
	}
	return who + " " + string(raw)
}

// compare returns what differs between two sides, a line for each field. Times may differ by slack.
func compare(ours, theirs seen, slack time.Duration) []string {
	var out []string
	for _, who := range theirs["spammed"] {
		ours["events"] = slices.DeleteFunc(ours["events"], func(e string) bool { return strings.HasPrefix(e, who+":") && !slices.Contains(theirs["events"], e) })
	}
	delete(theirs, "spammed")
	kinds := map[string]bool{}
	for kind := range ours {
		kinds[kind] = true
	}
	for kind := range theirs {
		kinds[kind] = true
	}
	for _, kind := range slices.Sorted(maps.Keys(kinds)) {
		a, b := without(ours[kind], theirs[kind]), without(theirs[kind], ours[kind])
		for i := range max(len(a), len(b)) {
			switch {
			case i >= len(a):
				out = append(out, kind+" of upstream alone: "+b[i])
			case i >= len(b):
				out = append(out, kind+" of ours alone: "+a[i])
			default:
				out = append(out, fields(kind, a[i], b[i], slack)...)
			}
		}
	}
	return out
}

// without returns what is in the sorted list a and not in b, one for one.
func without(a, b []string) []string {
	left := map[string]int{}
	for _, s := range b {
		left[s]++
	}
	var out []string
	for _, s := range a {
		if left[s]--; left[s] < 0 {
			out = append(out, s)
		}
	}
	return out
}

// fields returns what differs between two rendered objects, field by field.
func fields(kind, a, b string, slack time.Duration) []string {
	whoA, rawA, okA := strings.Cut(a, " {")
	whoB, rawB, okB := strings.Cut(b, " {")
	if whoA != whoB || !okA || !okB {
		return []string{kind + " of ours alone: " + a, kind + " of upstream alone: " + b}
	}
	was, is := leaves("{"+rawA), leaves("{"+rawB)
	paths := map[string]bool{}
	for p := range was {
		paths[p] = true
	}
	for p := range is {
		paths[p] = true
	}
	var out []string
	for _, p := range slices.Sorted(maps.Keys(paths)) {
		x, okX := was[p]
		y, okY := is[p]
		if !okX {
			x = "nothing"
		}
		if !okY {
			y = "nothing"
		}
		if x != y && !near(x, y, slack) {
			out = append(out, fmt.Sprintf("%s %s: %s is %s here, and %s upstream", kind, whoA, p, x, y))
		}
	}
	return out
}

// nodeName is a node's name as it is in what is compared.
var nodeName = regexp.MustCompile(`(-|")n\d(-|")`)

// alike returns a side as it is when nobody looks at which node is which.
func alike(s seen) seen {
	out := seen{}
	for kind, list := range s {
		for _, e := range list {
			out[kind] = append(out[kind], nodeName.ReplaceAllString(e, "${1}n*$2"))
		}
		slices.Sort(out[kind])
	}
	return out
}

// near says whether two values are times that differ by slack at most.
func near(a, b string, slack time.Duration) bool {
	x, errX := time.Parse(`"`+time.RFC3339+`"`, a)
	y, errY := time.Parse(`"`+time.RFC3339+`"`, b)
	return errX == nil && errY == nil && x.Sub(y).Abs() <= slack
}

func leaves(raw string) map[string]string {
	var v any
	if err := json.Unmarshal([]byte(raw), &v); err != nil {
		return map[string]string{"": raw}
	}
	out := map[string]string{}
	flatten("", v, out)
	return out
}

func flatten(path string, v any, out map[string]string) {
	switch v := v.(type) {
	case map[string]any:
		for k, e := range v {
			flatten(strings.TrimPrefix(path+"."+k, "."), e, out)
		}
	case []any:
		for i, e := range v {
			at := fmt.Sprint(i)
			if m, ok := e.(map[string]any); ok && m["type"] != nil { // conditions are in any order
				at = fmt.Sprint(m["type"])
			}
			flatten(path+"["+at+"]", e, out)
		}
	default:
		raw, _ := json.Marshal(v) // came from JSON
		out[path] = string(raw)
	}
}

// since renders how much later than the begin of a bubble something is.
func since(t time.Time) string { return t.Sub(begin).String() }

// begin is the time at which every bubble of testing/synctest begins.
var begin = time.Date(2000, 1, 1, 0, 0, 0, 0, time.UTC)
