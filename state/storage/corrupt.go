package storage

import (
	"context"
	"errors"
	"fmt"
	"net/http"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apiserver/pkg/storage"
	"k8s.io/apiserver/pkg/storage/value"
)

// corruptError says that stored bytes cannot be made an object. It is only made
// while the feature AllowUnsafeMalformedObjectDeletion is on, by the marking
// codec and transformer.
type corruptError struct {
	what string
	err  error
}

func (e *corruptError) Error() string { return fmt.Sprintf("%s: %v", e.what, e.err) }
func (e *corruptError) Unwrap() error { return e.err }

type corruptionMarkingCodec struct{ runtime.Codec }

func (c corruptionMarkingCodec) Decode(data []byte, defaults *schema.GroupVersionKind, into runtime.Object) (runtime.Object, *schema.GroupVersionKind, error) {
	obj, gvk, err := c.Codec.Decode(data, defaults, into)
	if err != nil {
		err = &corruptError{"object not decodable", err}
	}
	return obj, gvk, err
}

type corruptionMarkingTransformer struct{ value.Transformer }

func (t corruptionMarkingTransformer) TransformFromStorage(ctx context.Context, data []byte, dataCtx value.Context) ([]byte, bool, error) {
	out, stale, err := t.Transformer.TransformFromStorage(ctx, data, dataCtx)
	if err != nil {
		err = &corruptError{"data from the storage is not transformable", err}
	}
	return out, stale, err
}

// corruptGet tells the registry of a corrupt object, which it may then offer to
// delete unread.
func corruptGet(key string, err error) error {
	var corrupt *corruptError
	if errors.As(err, &corrupt) {
		return storage.NewCorruptObjError(key, corrupt)
	}
	return err
}

// result is nil if there was no error, the error that ended the list if no
// object was corrupt, else a status that names each corrupt one.
func (e *listErrors) result(resource schema.GroupResource) error {
	if len(e.corrupt) == 0 {
		return e.abort
	}
	var causes []metav1.StatusCause
	for _, err := range e.corrupt {
		var s *storage.StorageError
		errors.As(err, &s)
		causes = append(causes, metav1.StatusCause{Type: metav1.CauseTypeUnexpectedServerResponse, Field: s.Key, Message: err.Error()})
	}
	switch {
	case errors.Is(e.abort, errTooManyCorrupt):
		causes = append(causes, metav1.StatusCause{Type: metav1.CauseTypeTooMany, Message: errTooManyCorrupt.Error()})
	case e.abort != nil:
		causes = append(causes, metav1.StatusCause{Type: metav1.CauseTypeUnexpectedServerResponse, Message: e.abort.Error()})
	}
	message := fmt.Sprintf("failed to read one or more %s from the storage: %v", resource, e.corrupt[0])
	if n := len(e.corrupt) - 1; n > 0 {
		message += fmt.Sprintf(" (and %d more)", n)
	}
	return &apierrors.StatusError{ErrStatus: metav1.Status{
		Status:  metav1.StatusFailure,
		Code:    http.StatusInternalServerError,
		Reason:  metav1.StatusReasonStoreReadError,
		Message: message,
		Details: &metav1.StatusDetails{Group: resource.Group, Kind: resource.Resource, Name: "list", Causes: causes},
	}}
}
