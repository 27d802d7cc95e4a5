package objects

import "timonel/state"

// Deleting says whether a stored value is an object that was marked for deletion.
func Deleting(value []byte) bool {
	m, err := decode(&state.KV{Value: value}, kind{})
	return err == nil && m.DeletionTimestamp != nil
}
