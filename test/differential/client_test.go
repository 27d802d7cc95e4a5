package differential

import (
	"context"
	"encoding/json"
	"fmt"
	"strings"
	"sync"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/kubernetes/fake"
	"k8s.io/client-go/kubernetes/scheme"
	"k8s.io/client-go/testing"

	"timonel/reconcile"
)

// api makes upstream's requests in a side's world.
type api struct {
	*side
	mu     sync.Mutex
	events map[string]string // how an event reads, by its name
}

// client returns a client of a side's world.
func (s *side) client() kubernetes.Interface {
	c, a := &fake.Clientset{}, &api{side: s, events: map[string]string{}}
	c.AddReactor("*", "*", a.react)
	return c
}

// react implements testing.ReactionFunc.
func (a *api) react(action testing.Action) (bool, runtime.Object, error) {
	o, err := a.answer(action)
	return true, o, err
}

func (a *api) answer(action testing.Action) (runtime.Object, error) {
	a.tick()
	r := action.GetResource()
	request := reconcile.Request{Verb: reconcile.Verb(action.GetVerb()), Resource: r, Namespace: action.GetNamespace(), Subresource: action.GetSubresource()}
	switch action.GetVerb() {
	case "create":
		request.Object = action.(testing.CreateAction).GetObject()
		if e, ok := request.Object.(*corev1.Event); ok {
			what := a.told(e.InvolvedObject, e.Type, e.Reason)
			a.mu.Lock()
			defer a.mu.Unlock()
			e = e.DeepCopy()
			e.Name = fmt.Sprintf("%s.%d", e.Name, len(a.events)) // it says the time, which stands still here
			a.events[e.Name], a.events[similar(action.(testing.CreateAction).GetObject().(*corev1.Event).Name, e.Message)] = what, what
			return e, nil
		}
		m := reconcile.Accessor(request.Object)
		if m.GetName() == "" {
			m.SetName(a.unused(m.GetGenerateName()))
		}
		m.SetCreationTimestamp(metav1.Time{}) // that is the API's to say
		if m.GetNamespace() == "" {
			m.SetNamespace(action.GetNamespace())
		}
		request.Name = m.GetName()
	case "update":
		request.Object = action.(testing.UpdateAction).GetObject()
		request.Name = reconcile.Accessor(request.Object).GetName()
	case "patch":
		patch := action.(testing.PatchAction)
		if r.Resource == "events" { // it was told before
			a.again(patch.GetName(), patch.GetPatch())
			return &corev1.Event{}, nil
		}
		request.Name, request.PatchType, request.Patch = patch.GetName(), patch.GetPatchType(), patch.GetPatch()
	case "delete":
		o := action.(testing.DeleteAction).GetDeleteOptions()
		request.Name = action.(testing.DeleteAction).GetName()
		request.Preconditions, request.Propagation, request.GracePeriodSeconds = o.Preconditions, o.PropagationPolicy, o.GracePeriodSeconds
	case "get":
		return a.find(r, request.Namespace, action.(testing.GetAction).GetName())
	case "list":
		return a.list(action.(testing.ListActionImpl))
	default:
		return nil, fmt.Errorf("the client of this test cannot %s %s", action.GetVerb(), r.Resource)
	}
	if err := a.Write(context.Background(), request); err != nil {
		return nil, err
	}
	if request.Verb == reconcile.VerbDelete {
		return nil, nil
	}
	return a.find(r, request.Namespace, request.Name)
}

// similar is what events are known by that client-go has made one of, because many were
// alike: it calls that one by the name that it gave it, which others of the same time have.
func similar(name, message string) string {
	message = strings.TrimPrefix(message, "(combined from similar events): ")
	verb, _, _ := strings.Cut(message, " ")
	return fmt.Sprint(name, " ", verb, strings.Contains(message, " fail"))
}

// again notes that an event was told once more.
func (a *api) again(event string, patch []byte) {
	var changed struct{ Message string }
	if err := json.Unmarshal(patch, &changed); err != nil {
		a.t.Errorf("patch of event %s: %v", event, err)
	}
	a.mu.Lock()
	what, ok := a.events[event]
	if !ok {
		what, ok = a.events[similar(event, changed.Message)]
	}
	a.mu.Unlock()
	if !ok {
		return // told to the client of controllers that are gone
	}
	a.side.mu.Lock()
	defer a.side.mu.Unlock()
	a.side.events[what] = true
	who, _, _ := strings.Cut(what, ":")
	a.tally[who]++
}

// unused returns a name that none had.
func (s *side) unused(prefix string) string {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.names++
	return fmt.Sprintf("%s%05d", prefix, s.names)
}

func (a *api) find(r schema.GroupVersionResource, namespace, name string) (runtime.Object, error) {
	obj := a.Find(r, namespace, name)
	if obj == nil {
		return nil, apierrors.NewNotFound(r.GroupResource(), name)
	}
	return typed(obj)
}

func typed(obj map[string]any) (runtime.Object, error) {
	o, err := scheme.Scheme.New((&unstructured.Unstructured{Object: obj}).GroupVersionKind())
	if err != nil {
		return nil, err
	}
	decode(obj, o)
	return o, nil
}

func (a *api) list(action testing.ListActionImpl) (runtime.Object, error) {
	kind := action.GetKind()
	list, err := scheme.Scheme.New(kind.GroupVersion().WithKind(kind.Kind + "List"))
	if err != nil {
		return nil, err
	}
	var items []runtime.Object
	for _, obj := range a.All(action.GetResource(), action.GetNamespace()) {
		o, err := typed(obj)
		if err != nil {
			return nil, err
		}
		if action.GetListRestrictions().Labels.Matches(labels.Set(reconcile.Accessor(o).GetLabels())) {
			items = append(items, o)
		}
	}
	return list, meta.SetList(list, items)
}
