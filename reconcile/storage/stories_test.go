package storage_test

import (
	"testing"

	"timonel/reconcile/storytest"
)

func TestStories(t *testing.T) {
	t.Parallel()
	storytest.Stories(t, "testdata")
}
