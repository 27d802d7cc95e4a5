package consensus

import "errors"

// WriteOutcome is what became of a write whose Apply failed.
type WriteOutcome int

const (
	// WriteUnknown: it may have been applied or may still be.
	WriteUnknown WriteOutcome = iota
	// WriteNotDone: it was not applied and never will be; another try may succeed.
	WriteNotDone
	// WriteFenced: not applied, as its term is over.
	WriteFenced
	// WriteTooLarge: not applied, and never will be as it is.
	WriteTooLarge
)

// OutcomeOf says what became of a write that failed with err. What is not known to be
// anything else is unknown.
func OutcomeOf(err error) WriteOutcome {
	for _, o := range []struct {
		err  error
		what WriteOutcome
	}{
		{ErrUnknownOutcome, WriteUnknown}, // whatever else it wraps
		{ErrTooLarge, WriteTooLarge},
		{ErrTermChanged, WriteFenced},
		{ErrBusy, WriteNotDone},
		{ErrNoLeader, WriteNotDone},
		{ErrNotLeader, WriteNotDone},
		{ErrClosed, WriteNotDone},
		{ErrOutOfTouch, WriteNotDone},
	} {
		if errors.Is(err, o.err) {
			return o.what
		}
	}
	return WriteUnknown
}
