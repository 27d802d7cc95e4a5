package stream

import (
	"slices"
	"testing"
)

// An agent tries every controller once before it tries one again, those that it was
// given at the start as well: a controller that was cut off tells of itself alone.
func TestEveryControllerIsTriedInARound(t *testing.T) {
	t.Parallel()
	c := New(Config{Controllers: []string{"a:1", "b:1", "c:1"}})
	c.setControllers([]string{"a:1"})
	c.tried = map[string]bool{"a:1": true} // its stream ended
	first := []string{c.pick(), c.pick()}
	slices.Sort(first)
	if !slices.Equal(first, []string{"b:1", "c:1"}) {
		t.Errorf("tried %v", first)
	}
	if again := c.pick(); again != "a:1" {
		t.Errorf("then %s, want what was last heard of", again)
	}
	if n := c.known(); n != 3 || c.delay(2) > c.delay(9) {
		t.Errorf("%d known, delays %v and %v", n, c.delay(2), c.delay(9))
	}
	c.setControllers([]string{"d:1", "e:1"})
	round := []string{c.pick(), c.pick()}
	slices.Sort(round)
	if !slices.Equal(round, []string{"d:1", "e:1"}) {
		t.Errorf("tried %v before those last heard of", round)
	}
}
