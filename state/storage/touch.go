package storage

import (
	"context"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
)

// ownKey is the context key of WithOwn.
type ownKey struct{}

// WithOwn marks a context as that of the replica's own caches, such as the
// authorizer's. They follow this replica's state whatever it is worth: once it is in
// touch again they have to be as new as it is, so their watches do not end. Nobody else
// is answered from them meanwhile.
func WithOwn(ctx context.Context) context.Context { return context.WithValue(ctx, ownKey{}, true) }

// IsOwn says whether WithOwn marked the context.
func IsOwn(ctx context.Context) bool { return ctx.Value(ownKey{}) != nil }

// inTouch refuses what would be answered from a state that may be old, and returns what
// ends an answer that goes on; nil for never.
func (s *Store) inTouch(ctx context.Context) (lost <-chan struct{}, err error) {
	if IsOwn(ctx) {
		return nil, nil
	}
	if lost, err = s.backend.InTouch(); err != nil {
		return nil, OutOfTouch(err, false)
	}
	return lost, nil
}

// OutOfTouch is the answer of a replica that is out of touch with the cluster. A watch
// is told 429, as a server that stops does it: clients then go on with it from where they
// were, elsewhere, and do not list all again.
func OutOfTouch(err error, watch bool) *apierrors.StatusError {
	if watch {
		return apierrors.NewTooManyRequests(err.Error()+"; watch on another one", 1)
	}
	answer := Answer(&CommitError{Outcome: NotDone, Err: err}, "request", "")
	answer.ErrStatus.Message = err.Error() + "; ask another one"
	return answer
}
