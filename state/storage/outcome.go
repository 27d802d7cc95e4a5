package storage

import (
	"context"
	"errors"
	"fmt"
	"net/http"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"timonel/state"
)

// Outcome is what became of a write that did not succeed.
type Outcome int

const (
	// Unknown: it was done, or not, or will be. It is the zero value: what is not known
	// to be anything else is this.
	Unknown Outcome = iota
	// NotDone: it was not done and will not be. Another try may succeed.
	NotDone
	// Fenced: not done, as it was bound to a term that is over. Who led it has to stop.
	Fenced
	// TooLarge: not done, and never will be as it is.
	TooLarge
	// NoSpace: not done, as the state has reached its limit. Deletes pass.
	NoSpace
)

// CommitError is an error of a write whose outcome the backend knows.
type CommitError struct {
	Outcome Outcome
	Err     error
}

func (e *CommitError) Error() string { return e.Err.Error() }
func (e *CommitError) Unwrap() error { return e.Err }

// OutcomeOf is what an error of Backend.Commit or ReadBarrier says of the outcome.
func OutcomeOf(err error) Outcome {
	if e := (*CommitError)(nil); errors.As(err, &e) {
		return e.Outcome
	}
	if errors.Is(err, state.ErrNoSpace) { // the state machine's own answer
		return NoSpace
	}
	return Unknown
}

// answers is how each outcome is told to clients. Clients repeat a request by
// themselves when they are told after how long, whatever it is; so only what was not
// done says so.
var answers = map[Outcome]struct {
	code       int
	reason     metav1.StatusReason
	retryAfter int32 // seconds; 0: it is not to be repeated
	text       string
}{
	Unknown:  {http.StatusGatewayTimeout, metav1.StatusReasonTimeout, 0, "Timeout: the outcome of %s is unknown, it may have been done: read before you decide"},
	NotDone:  {http.StatusServiceUnavailable, metav1.StatusReasonServiceUnavailable, 1, "%s was not done, please try again"},
	Fenced:   {http.StatusServiceUnavailable, metav1.StatusReasonServiceUnavailable, 0, "%s was not done"},
	TooLarge: {http.StatusRequestEntityTooLarge, metav1.StatusReasonRequestEntityTooLarge, 0, "Request entity too large: %s was refused"},
	NoSpace:  {http.StatusInsufficientStorage, "InsufficientStorage", 0, "%s was refused"},
}

// Answer is what a client is told of an error of the backend.
func Answer(err error, verb, key string) *apierrors.StatusError {
	a := answers[OutcomeOf(err)]
	what := verb
	if key != "" {
		what += " " + key
	}
	return &apierrors.StatusError{ErrStatus: metav1.Status{
		Status: metav1.StatusFailure, Code: int32(a.code), Reason: a.reason,
		Message: fmt.Sprintf(a.text, what) + ": " + err.Error(),
		Details: &metav1.StatusDetails{Name: key, RetryAfterSeconds: a.retryAfter},
	}}
}

// notRead marks an error of a read, which has done nothing.
func notRead(ctx context.Context, err error) error {
	if ctx.Err() != nil || OutcomeOf(err) != Unknown {
		return err
	}
	return &CommitError{Outcome: NotDone, Err: err}
}
