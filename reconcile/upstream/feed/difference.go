package feed

import (
	"iter"

	"timonel/state/objects"
)

// difference yields the objects under a prefix that differ between two snapshots, as
// they were and as they are; nil for one that is not there. It is in order of key.
func difference(from, to *objects.Snapshot, prefix string) iter.Seq2[*objects.Meta, *objects.Meta] {
	return func(yield func(*objects.Meta, *objects.Meta) bool) {
		next, stop := iter.Pull(from.Metas().WithPrefix(prefix))
		defer stop()
		before, more := next()
		for after := range to.Metas().WithPrefix(prefix) {
			for more && before.Key < after.Key {
				if !yield(before, nil) {
					return
				}
				before, more = next()
			}
			switch {
			case !more || before.Key != after.Key:
				if !yield(nil, after) {
					return
				}
			default:
				if before.Revision != after.Revision && !yield(before, after) {
					return
				}
				before, more = next()
			}
		}
		for more {
			if !yield(before, nil) {
				return
			}
			before, more = next()
		}
	}
}
