package consensus

import "errors"

// Errors that callers tell apart with errors.Is.
var (
	// ErrUnknownOutcome: the command may have been applied or may still be. The
	// caller has to read before it decides; conditions make a retry safe.
	ErrUnknownOutcome = errors.New("outcome of the write is unknown")
	// ErrNoLeader: no leader was known in time. Nothing was written.
	ErrNoLeader = errors.New("no leader")
	// ErrBusy: too much was on its way for too long. Nothing was written.
	ErrBusy = errors.New("too many bytes of writes are under way")
	// ErrTermChanged: the term the command was fenced to is over. Nothing was
	// written.
	ErrTermChanged = errors.New("the term this write is bound to is over")
	// ErrNotLeader: the operation has to be asked of the leader.
	ErrNotLeader = errors.New("this replica is not the leader")
	// ErrClosed: the replica was closed. Nothing was written.
	ErrClosed = errors.New("the replica is closed")
	// ErrTooLarge: the command is longer than Config.MaxCommandBytes.
	ErrTooLarge = errors.New("the command is too large")
	// ErrRefused: the leader's Config.Admit did not let the command pass. Nothing was
	// written.
	ErrRefused = errors.New("the leader refused the write")
)
