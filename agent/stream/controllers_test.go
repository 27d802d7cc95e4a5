package stream

import (
	"fmt"
	"testing"

	"github.com/stretchr/testify/require"
)

// TestControllersThatWereGivenStay is what stranded an agent: ghosts in gossip had
// pushed all controllers off its list.
func TestControllersThatWereGivenStay(t *testing.T) {
	t.Parallel()
	c := New(Config{Controllers: []string{"10.0.0.11:7443", "10.0.0.12:7443"}})
	var ghosts []string
	for i := range 2000 {
		ghosts = append(ghosts, fmt.Sprintf("10.9.%d.%d:7443", i/250, i%250))
	}
	c.setControllers(ghosts)
	require.LessOrEqual(t, c.known(), maxTold+2)
	var tried []string
	for range c.known() { // one round
		tried = append(tried, c.pick())
	}
	require.Subset(t, tried, []string{"10.0.0.11:7443", "10.0.0.12:7443"})
	c.setControllers([]string{"10.0.0.13:7443", "10.0.0.11:7443", "nonsense", "10.0.0.13:7443"})
	require.Equal(t, []string{"10.0.0.13:7443", "10.0.0.11:7443"}, c.controllers)
	c.setControllers(nil)
	require.Equal(t, []string{"10.0.0.13:7443", "10.0.0.11:7443"}, c.controllers)
}
