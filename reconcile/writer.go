package reconcile

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/runtime/serializer/protobuf"
	"k8s.io/client-go/kubernetes/scheme"
	"k8s.io/client-go/rest"
)

// Writer makes changes. An error of the API is returned as it is, so that
// k8s.io/apimachinery/pkg/api/errors can tell what it was.
type Writer interface {
	Write(ctx context.Context, c Request) error
}

// Direct creates pods, bindings and events in the API's own process, as the API does.
type Direct interface {
	// Create returns false if obj has to be created through Client instead; then
	// Created is told of it. Errors are the API's.
	Create(ctx context.Context, obj runtime.Object) (done bool, err error)
	// Created learns from what was sent through Client, and was made of it.
	Created(sent, created runtime.Object)
}

// restWriter makes changes through the API.
type restWriter struct {
	client rest.Interface
	direct Direct // may be nil
	proto  runtime.Serializer
}

// newRESTWriter returns a writer for the API that config leads to. The number of
// requests at a time is the runner's to bound, so the client does not limit its rate.
func newRESTWriter(config *rest.Config, direct Direct) (*restWriter, error) {
	c := rest.CopyConfig(config)
	c.QPS = -1
	c.GroupVersion = &schema.GroupVersion{}
	c.NegotiatedSerializer = scheme.Codecs.WithoutConversion()
	c.ContentType = runtime.ContentTypeJSON
	c.AcceptContentTypes = runtime.ContentTypeProtobuf + "," + runtime.ContentTypeJSON
	client, err := rest.UnversionedRESTClientFor(c)
	if err != nil {
		return nil, fmt.Errorf("make the reconcilers' API client: %w", err)
	}
	return &restWriter{client: client, direct: direct, proto: protobuf.NewSerializer(scheme.Scheme, scheme.Scheme)}, nil
}

// path is the URL path of the change's object, or of the collection for a
// create and a deletecollection.
func (c Request) path() []string {
	segments := []string{"api", c.Resource.Version}
	if c.Resource.Group != "" {
		segments = []string{"apis", c.Resource.Group, c.Resource.Version}
	}
	if c.Namespace != "" && c.Resource != NamespacesResource {
		segments = append(segments, "namespaces", c.Namespace)
	}
	segments = append(segments, c.Resource.Resource)
	if (c.Verb != VerbCreate || c.Subresource != "") && c.Verb != VerbDeleteCollection {
		segments = append(segments, c.Name)
	}
	if c.Subresource != "" {
		segments = append(segments, c.Subresource)
	}
	return segments
}

// Write implements Writer.
func (w *restWriter) Write(ctx context.Context, c Request) error {
	direct := w.direct != nil && c.Verb == VerbCreate && (c.Resource == PodsResource || c.Resource == EventsResource)
	if direct {
		if done, err := w.direct.Create(ctx, c.Object); done {
			return err
		}
	}
	var verb string
	var body []byte
	contentType := runtime.ContentTypeJSON
	var err error
	switch c.Verb {
	case VerbCreate, VerbUpdate:
		verb = map[Verb]string{VerbCreate: "POST", VerbUpdate: "PUT"}[c.Verb]
		body, contentType, err = w.encode(c.Object)
	case VerbPatch:
		verb, body, contentType = "PATCH", c.Patch, string(c.PatchType)
	case VerbDelete, VerbDeleteCollection:
		verb = "DELETE"
		body, err = json.Marshal(metav1.DeleteOptions{
			TypeMeta:      metav1.TypeMeta{Kind: "DeleteOptions", APIVersion: "v1"},
			Preconditions: c.Preconditions, PropagationPolicy: c.Propagation, GracePeriodSeconds: c.GracePeriodSeconds,
		})
	default:
		err = errors.New("no such verb")
	}
	if err != nil {
		return fmt.Errorf("%s: %w", c, err)
	}
	// The runner retries by itself, from a newer snapshot.
	result := w.client.Verb(verb).AbsPath(c.path()...).MaxRetries(0).
		SetHeader("Content-Type", contentType).Body(body).Do(ctx)
	if direct && result.Error() == nil {
		if created, err := result.Get(); err == nil {
			w.direct.Created(c.Object, created)
		}
	}
	return result.Error()
}

// encode returns an object as protobuf if it is of a built-in type, else as JSON.
func (w *restWriter) encode(obj runtime.Object) ([]byte, string, error) {
	kinds, _, err := scheme.Scheme.ObjectKinds(obj)
	if err != nil {
		raw, err := json.Marshal(obj)
		return raw, runtime.ContentTypeJSON, err
	}
	raw, err := runtime.Encode(scheme.Codecs.EncoderForVersion(w.proto, kinds[0].GroupVersion()), obj)
	return raw, runtime.ContentTypeProtobuf, err
}
