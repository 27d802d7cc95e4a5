package storytest

import (
	"context"
	"fmt"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/cockroachdb/datadriven"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"

	"timonel/reconcile"
)

// Stories tells the stories in the .txt files of a folder, each in a world of its own
// with every reconciler that needs nothing but the state. Folders in it are others'.
func Stories(t *testing.T, folder string) {
	paths, err := filepath.Glob(filepath.Join(folder, "*.txt"))
	if err != nil || len(paths) == 0 {
		t.Fatalf("no stories in %s: %v", folder, err)
	}
	for _, path := range paths {
		t.Run(strings.TrimSuffix(filepath.Base(path), ".txt"), func(t *testing.T) {
			w := NewWorld(t)
			s := New(w, All(t)...)
			datadriven.RunTest(t, path, func(t *testing.T, d *datadriven.TestData) string {
				w.t = t
				return s.command(t, d)
			})
		})
	}
}

// command does what one command of a story file says:
//
//	reconcilers NAME...        run these only
//	objects                    create the objects given in YAML
//	run                        reconcile until there is nothing to do; quiet: say only that it ends
//	start                      queue every key, as a new leader does
//	edit RESOURCE NS/NAME      merge YAML into an object, as a user does
//	status RESOURCE NS/NAME    merge YAML into its status
//	run-pods / end-pods        the agents run what is bound, or end what is terminating
//	finish-pods PHASE          pods that have not ended do so: [exit=CODE] [prefix=NAME] [first=N]
//	delete RESOURCE NS/NAME    delete, propagation=Foreground|Orphan|Background
//	refuse VERB RESOURCE       the API forbids such changes; without arguments no more
//	advance DURATION           let time pass
//	health                     NODE stream|gone|goodbye [suspect|dead|alive] [probes=N] [ago=DURATION], or since ago=DURATION
//	show PREFIX                list what there is
func (s *Story) command(t *testing.T, d *datadriven.TestData) string {
	arg := func(i int) string {
		if i >= len(d.CmdArgs) {
			return ""
		}
		return d.CmdArgs[i].Key
	}
	target := func() (schema.GroupVersionResource, string, string) {
		var r schema.GroupVersionResource
		for gvk := range worldKinds {
			if resourceName(gvk) == arg(0) {
				r = gvk.GroupVersion().WithResource(arg(0))
			}
		}
		ns, name, ok := strings.Cut(arg(1), "/")
		if !ok {
			return r, "", ns
		}
		return r, ns, name
	}
	switch d.Cmd {
	case "reconcilers":
		var keep []reconcile.Reconciler
		for _, r := range s.reconcilers {
			if slices.ContainsFunc(d.CmdArgs, func(a datadriven.CmdArg) bool { return strings.HasPrefix(r.Name(), a.Key) }) {
				keep = append(keep, r)
			}
		}
		s.reconcilers = keep
	case "objects":
		for _, doc := range strings.Split(d.Input, "\n---\n") {
			for _, obj := range expand(t, mapOf([]byte(doc))) {
				s.addMap(obj)
			}
		}
	case "run":
		out := s.Run(400)
		if arg(0) == "quiet" && !strings.HasSuffix(out, Unending) {
			return ""
		}
		return out
	case "start":
		s.Start()
	case "edit":
		r, ns, name := target()
		s.Edit(r, ns, name, func(obj map[string]any) { MergeJSON(obj, mapOf([]byte(d.Input))) })
	case "status":
		r, ns, name := target()
		s.SetStatus(r, ns, name, mapOf([]byte(d.Input)))
	case "run-pods", "end-pods":
		for pod := range s.Snapshot().Pods().All() {
			switch {
			case d.Cmd == "run-pods" && pod.Spec.NodeName != "" && pod.Status.Phase == corev1.PodPending && pod.DeletionTimestamp == nil:
				s.RunPod(pod.Namespace, pod.Name)
			case d.Cmd == "end-pods" && pod.DeletionTimestamp != nil:
				s.EndPod(pod.Namespace, pod.Name)
			}
		}
	case "finish-pods":
		s.finishPods(t, d)
	case "delete":
		r, ns, name := target()
		c := reconcile.Request{Verb: reconcile.VerbDelete, Resource: r, Namespace: ns, Name: name}
		if arg(2) != "" {
			p := metav1.DeletionPropagation(arg(2))
			c.Propagation = &p
		}
		if err := s.Write(context.Background(), c); err != nil {
			return err.Error() + "\n"
		}
	case "refuse":
		s.Refuse = nil
		if verb, resource := arg(0), arg(1); verb != "" {
			s.Refuse = func(c reconcile.Request) error {
				if string(c.Verb) == verb && c.Resource.Resource == resource {
					return apierrors.NewForbidden(c.Resource.GroupResource(), "x", fmt.Errorf("exceeded quota"))
				}
				return nil
			}
		}
	case "advance":
		by, err := time.ParseDuration(arg(0))
		if err != nil {
			t.Fatal(err)
		}
		s.Now = s.Now.Add(by)
	case "health":
		s.SetHealth(s.parseHealth(t, d.Input))
	case "show":
		return s.Show(arg(0))
	default:
		t.Fatalf("%s: no such command", d.Cmd)
	}
	return ""
}

// expand makes copies of an object that says "copies: n"; %d in its name counts them.
func expand(t *testing.T, obj map[string]any) []map[string]any {
	n, ok := obj["copies"].(float64)
	if !ok {
		return []map[string]any{obj}
	}
	delete(obj, "copies")
	var out []map[string]any
	for i := range int(n) {
		raw := strings.ReplaceAll(mustString(obj), "%d", strconv.Itoa(i+1))
		out = append(out, mapOf([]byte(raw)))
	}
	return out
}

func (s *Story) parseHealth(t *testing.T, input string) reconcile.Health {
	h := reconcile.Health{Since: s.Health.Since, Nodes: map[string]reconcile.NodeHealth{}}
	for k, v := range s.Health.Nodes {
		h.Nodes[k] = v
	}
	for _, line := range strings.Split(strings.TrimSpace(input), "\n") {
		fields := strings.Fields(line)
		at := s.Now
		var n reconcile.NodeHealth
		for _, f := range fields[1:] {
			name, value, _ := strings.Cut(f, "=")
			switch name {
			case "ago":
				d, err := time.ParseDuration(value)
				if err != nil {
					t.Fatal(err)
				}
				at = s.Now.Add(-d)
			case "stream":
				n.Stream = true
			case "goodbye":
				n.Goodbye = true
			case "suspect":
				n.Gossip = reconcile.GossipSuspect
			case "dead":
				n.Gossip = reconcile.GossipDead
			case "alive":
				n.Gossip = reconcile.GossipAlive
			case "probes":
				n.ProbesFailed, _ = strconv.Atoi(value)
			case "gone":
			default:
				t.Fatalf("health: %s means nothing", f)
			}
		}
		if fields[0] == "since" {
			h.Since = at
			continue
		}
		n.StreamSince, n.GossipSince, n.ProbesSince = at, at, at
		h.Nodes[fields[0]] = n
	}
	return h
}
