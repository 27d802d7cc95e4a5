package state

import "sync/atomic"

// Memo is a place beside a stored value where a reader may leave one thing that it
// made of the value, such as the object decoded, for the next. All copies of a
// [KV] share it; it is in no hash and no snapshot, and may be emptied or replaced
// at any time. The thing has to say whose it is: readers do not know of each other.
type Memo struct{ atomic.Pointer[any] }

// Memo returns the memo of the KV's value. It is nil if the KV does not come from
// a [Store].
func (kv *KV) Memo() *Memo { return kv.memo }

// stored is a KV with its memo: one allocation for each version of a key.
type stored struct {
	KV
	room Memo
}

// newKV returns a KV that has a memo.
func newKV(key string, value []byte) *KV {
	s := &stored{KV: KV{Key: key, Value: value}}
	s.memo = &s.room
	return &s.KV
}
