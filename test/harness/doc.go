// Package harness brings real clusters up for tests that need one, with the
// programs in bin/ (`make build images`), and watches what clients see while
// they are broken: [Writer] writes all the while, [Containers] remembers what
// must not be touched.
//
//	c := harness.Up(t, harness.Options{Controllers: 3, Agents: 2})
//	w := c.Write(t, "")
//	c.Kill(t, c.Leader(t), true)
//	gap := w.Stop(t).LongestGap
package harness
