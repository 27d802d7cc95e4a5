package consensus

import (
	"context"
	"errors"
	"fmt"
	"testing"
)

func TestOutcomes(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		err  error
		want WriteOutcome
	}{
		"no leader in time":      {fmt.Errorf("%w: %w", ErrNoLeader, context.DeadlineExceeded), WriteNotDone},
		"no turn in time":        {fmt.Errorf("%w: %w", ErrBusy, context.DeadlineExceeded), WriteNotDone},
		"closed before":          {ErrClosed, WriteNotDone},
		"closed after":           {fmt.Errorf("%w: %w", ErrUnknownOutcome, ErrClosed), WriteUnknown},
		"a deadline after":       {fmt.Errorf("%w: %w", ErrUnknownOutcome, context.DeadlineExceeded), WriteUnknown},
		"too large":              {fmt.Errorf("%w: 4 MiB", ErrTooLarge), WriteTooLarge},
		"too large for a leader": {fmt.Errorf("%w: the leader: %w", ErrTooLarge, errors.New("code")), WriteTooLarge},
		"another term":           {ErrTermChanged, WriteFenced},
		"anything else":          {errors.New("else"), WriteUnknown},
	} {
		t.Run(name, func(t *testing.T) {
			if got := OutcomeOf(test.err); got != test.want {
				t.Errorf("%d, want %d", got, test.want)
			}
		})
	}
}
