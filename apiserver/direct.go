package apiserver

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"runtime/debug"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apiserver/pkg/admission"
	"k8s.io/apiserver/pkg/authentication/user"
	"k8s.io/apiserver/pkg/endpoints/handlers/fieldmanager"
	"k8s.io/apiserver/pkg/endpoints/handlers/responsewriters"
	"k8s.io/apiserver/pkg/endpoints/request"
	"k8s.io/apiserver/pkg/registry/rest"
	"k8s.io/kubernetes/pkg/api/legacyscheme"
	"k8s.io/kubernetes/pkg/apis/core"

	"timonel/state/storage"
)

// Direct creates pods and events, and binds pods, without HTTP: what the API's own
// handler does between the body that it reads and the answer that it writes, defaults,
// managed fields, admission, validation and storage, and none of the filters, encodings
// and goroutines around it, which cost as much as all of these. It is for a user of the
// group system:masters, whom authorization and flow control let pass, and is used by
// the reconcilers, who make many of these. Such requests are not in the API's metrics of
// requests; with auditing set up there are none.
//
// The managed fields of an object depend on which fields it has, and hardly on what is in
// them. Working them out costs as much as storing it, so they are taken from an earlier
// object that had the same fields ([shapes]), which was created by HTTP.
type Direct struct {
	parts  *directParts
	user   user.Info
	opened <-chan struct{}
	shapes shapes
}

// directParts is what is collected while the server is built.
type directParts struct {
	pods      rest.Creater
	events    rest.Creater
	bindings  rest.NamedCreater
	admission admission.Interface
	inTouch   func() (lost <-chan struct{}, err error)
	audited   bool
}

// Direct returns what creates pods, bindings and events as the given user.
func (s *Server) Direct(u user.Info) *Direct {
	return &Direct{parts: s.direct, user: authenticated(u), opened: s.transport.opened}
}

// object is one with metadata.
type object interface {
	runtime.Object
	metav1.Object
}

// errIndirect says that a request is one for HTTP.
var errIndirect = errors.New("not a request that can be made without HTTP")

// Create creates a pod or an event, or binds a pod if obj is a binding. It returns false
// if that is to be done by HTTP instead, and has done nothing then; what was created so
// is to be shown to Created. Errors are those of the API. obj is not changed.
func (d *Direct) Create(ctx context.Context, obj runtime.Object) (done bool, err error) {
	select {
	case <-d.opened:
	default:
		return false, nil
	}
	if d.parts.audited {
		return false, nil
	}
	if _, err := d.parts.inTouch(); err != nil {
		return true, storage.OutOfTouch(err, false)
	}
	defer func() {
		if p := recover(); p != nil {
			slog.Error("API panicked", "creating", fmt.Sprintf("%T", obj), "panic", p, "stack", string(debug.Stack()))
			done, err = true, apierrors.NewInternalError(fmt.Errorf("panic: %v", p))
		}
	}()
	switch o := obj.(type) {
	case *corev1.Pod:
		err = d.create(ctx, o, &core.Pod{}, "Pod", "pods", d.parts.pods)
	case *corev1.Event:
		err = d.create(ctx, o, &core.Event{}, "Event", "events", d.parts.events)
	case *corev1.Binding:
		err = d.bind(ctx, o)
	default:
		return false, nil
	}
	switch {
	case errors.Is(err, errIndirect), apierrors.IsRequestEntityTooLargeError(err): // the handler tries again with less
		return false, nil
	case err == nil, ctx.Err() != nil:
		return true, err
	}
	if status := apierrors.APIStatus(nil); !errors.As(err, &status) {
		err = &apierrors.StatusError{ErrStatus: *responsewriters.ErrorToAPIStatus(err)}
	}
	return true, err
}

// Created learns from an object that was created by HTTP.
func (d *Direct) Created(sent, created runtime.Object) { d.shapes.learn(sent, created) }

// create creates an object whose managed fields are known from another of its shape.
func (d *Direct) create(ctx context.Context, obj object, internal runtime.Object, kind, resource string, storage rest.Creater) error {
	if obj.GetName() == "" || storage == nil {
		return errIndirect
	}
	fields, ok := d.shapes.fields(obj)
	if !ok {
		return errIndirect
	}
	meta, err := convert(obj, internal)
	if err != nil {
		return err
	}
	rest.WipeObjectMetaSystemFields(meta)
	meta.SetManagedFields([]metav1.ManagedFieldsEntry{fields})
	attributes := d.attributes(internal, kind, obj.GetNamespace(), obj.GetName(), resource, "")
	ctx = d.context(ctx, attributes)
	validate, err := d.admit(ctx, attributes)
	if err != nil {
		return err
	}
	_, err = storage.Create(ctx, internal, validate, createOptions())
	return err
}

func (d *Direct) bind(ctx context.Context, binding *corev1.Binding) error {
	internal := &core.Binding{}
	if _, err := convert(binding, internal); err != nil {
		return err
	}
	attributes := d.attributes(internal, "Binding", binding.Namespace, binding.Name, "pods", "binding")
	ctx = d.context(ctx, attributes)
	validate, err := d.admit(ctx, attributes)
	if err != nil {
		return err
	}
	_, err = d.parts.bindings.Create(ctx, binding.Name, internal, validate, createOptions())
	return err
}

// convert makes the internal object of a versioned one with its defaults. It copies
// first, because the two share what they can.
func convert(versioned, internal runtime.Object) (metav1.Object, error) {
	versioned = versioned.DeepCopyObject()
	legacyscheme.Scheme.Default(versioned)
	if err := legacyscheme.Scheme.Convert(versioned, internal, nil); err != nil {
		return nil, apierrors.NewBadRequest(err.Error())
	}
	return meta.Accessor(internal)
}

func createOptions() *metav1.CreateOptions {
	return &metav1.CreateOptions{TypeMeta: metav1.TypeMeta{Kind: "CreateOptions", APIVersion: metav1.SchemeGroupVersion.String()}}
}

// objectInterfaces are the types as admission takes them.
var objectInterfaces = admission.NewObjectInterfacesFromScheme(legacyscheme.Scheme)

func (d *Direct) attributes(obj runtime.Object, kind, namespace, name, resource, subresource string) admission.Attributes {
	return admission.NewAttributesRecord(obj, nil, corev1.SchemeGroupVersion.WithKind(kind), namespace, name,
		corev1.SchemeGroupVersion.WithResource(resource), subresource, admission.Create, createOptions(), false, d.user)
}

// context is what storage and admission look up of a request.
func (d *Direct) context(ctx context.Context, a admission.Attributes) context.Context {
	info := &request.RequestInfo{
		IsResourceRequest: true, Verb: "create", APIPrefix: "api", APIVersion: "v1", Namespace: a.GetNamespace(),
		Resource: a.GetResource().Resource, Subresource: a.GetSubresource(), Path: "/api/v1/namespaces/" + a.GetNamespace() + "/" + a.GetResource().Resource,
	}
	info.Parts = []string{info.Resource}
	if info.Subresource != "" {
		info.Name, info.Path, info.Parts = a.GetName(), info.Path+"/"+a.GetName()+"/"+info.Subresource, []string{info.Resource, a.GetName(), info.Subresource}
	}
	return request.WithUser(request.WithNamespace(request.WithRequestInfo(ctx, info), a.GetNamespace()), d.user)
}

// admit has the object changed by admission, and returns what validates it.
func (d *Direct) admit(ctx context.Context, a admission.Attributes) (rest.ValidateObjectFunc, error) {
	control := fieldmanager.NewManagedFieldsValidatingAdmissionController(d.parts.admission)
	if mutating, ok := control.(admission.MutationInterface); ok && mutating.Handles(admission.Create) {
		if err := mutating.Admit(ctx, a, objectInterfaces); err != nil {
			return nil, err
		}
	}
	return rest.AdmissionToValidateObjectFunc(control, a, objectInterfaces), nil
}
