package storage

import (
	"context"
	"sync/atomic"
)

// Holding tells who serves a watch what the watch holds for its client: the events that
// wait to be taken, by the size of the values that they are of. Decoded and encoded they
// take up to four times that.
type Holding struct {
	// Kept is called when the watch has encoded an object itself, and not taken what another
	// had encoded, that is larger than all before: encoders keep buffers of that size for
	// as long as the watch lasts.
	Kept func(size int64)

	watch atomic.Pointer[watch]
	kept  atomic.Int64
}

type holdingKey struct{}

// WithHolding returns a context for Watch that has h tell of the watch.
func WithHolding(ctx context.Context, h *Holding) context.Context {
	return context.WithValue(ctx, holdingKey{}, h)
}

// Bytes is what the watch holds now, 0 before there is one.
func (h *Holding) Bytes() int64 {
	w := h.watch.Load()
	if w == nil {
		return 0
	}
	return w.holding.bytes(len(w.results)) + w.holding.batch.Load()
}

// End ends the watch, as its deadline does: the client goes on after the last event that
// it has.
func (h *Holding) End() {
	if w := h.watch.Load(); w != nil {
		w.cancel()
	}
}

// encoded notes the size of an object that the watch has encoded.
func (h *Holding) encoded(size int64) {
	if h == nil || h.Kept == nil || size <= h.kept.Load() {
		return
	}
	h.kept.Store(size) // a watch encodes one at a time
	h.Kept(size)
}

// tell has the Holding of ctx, if there is one, tell of the watch.
func (w *watch) tell(ctx context.Context) {
	if h, ok := ctx.Value(holdingKey{}).(*Holding); ok {
		w.holder = h
		h.watch.Store(w)
	}
}

// holdings are the sizes of the events that a watch has put into its buffer, and of those
// that it is about to.
type holdings struct {
	sizes [watchBuffer]atomic.Int64 // of the last ones, in a ring
	put   atomic.Uint64
	batch atomic.Int64
}

// add notes an event that was put into the buffer. One goroutine calls it.
func (h *holdings) add(size int64) {
	n := h.put.Load()
	h.sizes[n%watchBuffer].Store(size)
	h.put.Store(n + 1)
}

// bytes is the size of the last n events.
func (h *holdings) bytes(n int) (bytes int64) {
	put := h.put.Load()
	for i := uint64(0); i < min(uint64(n), put, watchBuffer); i++ {
		bytes += h.sizes[(put-1-i)%watchBuffer].Load()
	}
	return bytes
}
