//go:build chaos

package chaos

import (
	"encoding/json"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"timonel/test/harness"
)

// The limits that clients may count on when a leader is killed.
const (
	longestGap    = 1500 * time.Millisecond // without an acknowledged write
	afterElection = 3 * time.Second         // until a Deployment scaled meanwhile is complete
)

// TestContainers breaks controllers while two agents run containers.
func TestContainers(t *testing.T) {
	c := harness.Up(t, harness.Options{Controllers: 3, Agents: 2})
	c.Deploy(t, "web", 4)
	before := c.Containers(t, "web")
	require.Len(t, before, 4)

	t.Run("a cluster at rest appends nothing to its log", func(t *testing.T) {
		requireRest(t, c, 15*time.Second)
		printMemory(t, c)
	})

	t.Run("leader killed five times", func(t *testing.T) {
		replicas := int32(4)
		for round := range 5 {
			replicas++
			killLeaderAndScale(t, c, round+1, replicas)
			c.RequireUntouched(t, "web", before)
		}
	})

	t.Run("leader paused for ten seconds", func(t *testing.T) {
		leader := c.Leader(t)
		require.NoError(t, c.Spec.Pause(t.Context(), leader, false))
		waitOtherLeader(t, c, leader)
		harness.For(t, 10*time.Second, "containers while the old leader is paused", func() error { return sameContainers(t, c, before) })
		require.NoError(t, c.Spec.Resume(t.Context(), leader))
		c.WaitServing(t, leader, time.Minute)
		c.RequireUntouched(t, "web", before)
	})

	t.Run("all controllers killed and started", func(t *testing.T) {
		killAll(t, c)
		for _, name := range c.Spec.AgentNames() {
			c.WaitNode(t, name, true, 20*time.Second)
		}
		c.RequireUntouched(t, "web", before)
		c.Scale(t, "web", 4)
		c.WaitAvailable(t, "web", 4, time.Minute)
	})
}

// TestWrites breaks controllers while clients write.
func TestWrites(t *testing.T) {
	// Snapshots are due soon and few entries are kept behind them, so that a
	// replica that was away cannot catch up from the log.
	c := harness.Up(t, harness.Options{Controllers: 3, ControllerFlags: []string{"--snapshot-threshold=100", "--trailing-logs=10"}})

	t.Run("a cluster at rest appends nothing to its log", func(t *testing.T) {
		requireRest(t, c, 15*time.Second)
		printMemory(t, c)
	})

	t.Run("leader killed five times", func(t *testing.T) {
		for range 5 {
			gap := underLoad(t, c, "killed", func(leader string) {
				c.Kill(t, leader, true)
				waitOtherLeader(t, c, leader)
				require.NoError(t, c.Spec.Start(t.Context(), leader))
			})
			require.LessOrEqual(t, gap, longestGap)
		}
	})

	t.Run("power of the leader cut", func(t *testing.T) {
		underLoad(t, c, "without power", func(leader string) {
			c.Kill(t, leader, false)
			waitOtherLeader(t, c, leader)
			require.NoError(t, c.Spec.Start(t.Context(), leader))
		})
	})

	t.Run("leader paused", func(t *testing.T) {
		underLoad(t, c, "paused", func(leader string) {
			require.NoError(t, c.Spec.Pause(t.Context(), leader, false))
			waitOtherLeader(t, c, leader)
			require.NoError(t, c.Spec.Resume(t.Context(), leader))
		})
	})

	t.Run("leader stopped in order", func(t *testing.T) {
		underLoad(t, c, "stopped", func(leader string) {
			require.NoError(t, c.Spec.Stop(t.Context(), leader))
			waitOtherLeader(t, c, leader)
			require.NoError(t, c.Spec.Start(t.Context(), leader))
		})
	})

	for _, direction := range []string{"in", "out", "both"} {
		t.Run("leader cut off from the other controllers: "+direction, func(t *testing.T) {
			underLoad(t, c, "cut off ("+direction+")", func(leader string) {
				c.Run(t, "partition", leader, "--from", others(c, leader), "--direction", direction)
				waitOtherLeader(t, c, leader)
				c.Run(t, "partition", leader, "--heal")
			})
		})
	}

	t.Run("all controllers killed and started", func(t *testing.T) { killAll(t, c) })

	t.Run("a wiped controller catches up from a snapshot", func(t *testing.T) {
		w := c.Write(t, "")
		waitSnapshots(t, c)
		w.Stop(t)
		victim := follower(t, c)
		require.NoError(t, c.Spec.Kill(t.Context(), victim, false))
		require.NoError(t, c.Spec.Wipe(t.Context(), victim))
		c.Run(t, "kubectl", "create", "configmap", "while-away")
		begin := time.Now()
		c.Start(t, victim)
		t.Logf("%s, wiped, serves %s after its start", victim, ms(time.Since(begin)))
		require.NotEmpty(t, snapshots(t, c, victim), "it was sent a snapshot")
		requireSameEverywhere(t, c)
	})
}

// snapshots lists a controller's snapshot files.
func snapshots(t *testing.T, c *harness.Cluster, name string) []string {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(c.Spec.DataDir(name), "*", "snapshots", "*", "state.bin"))
	require.NoError(t, err)
	return files
}

// waitSnapshots waits until every controller has a snapshot; one is due every
// minute or two.
func waitSnapshots(t *testing.T, c *harness.Cluster) {
	t.Helper()
	harness.Eventually(t, 4*time.Minute, "each controller has a snapshot", func() error {
		for _, name := range c.Spec.ControllerNames() {
			if len(snapshots(t, c, name)) == 0 {
				return errors.New(name + " has none")
			}
		}
		return nil
	})
}

// underLoad does something to the leader while a client writes, waits until all
// controllers serve, checks that no acknowledged write is lost, and returns the
// longest time without one.
func underLoad(t *testing.T, c *harness.Cluster, what string, do func(leader string)) time.Duration {
	t.Helper()
	leader := c.Leader(t)
	w := c.Write(t, "")
	do(leader)
	for _, name := range c.Spec.ControllerNames() {
		c.WaitServing(t, name, time.Minute)
	}
	written := w.Stop(t)
	t.Logf("leader %s %s: %d writes acknowledged, none lost, %d failed; longest time without one %s",
		leader, what, len(written.Acknowledged), written.Failures, ms(written.LongestGap))
	return written.LongestGap
}

// killAll kills -9 all controllers at once, starts them and checks that each
// serves what was there before.
func killAll(t *testing.T, c *harness.Cluster) {
	t.Helper()
	before := listAll(t, c, c.Leader(t))
	for _, name := range c.Spec.ControllerNames() {
		c.Kill(t, name, true)
	}
	begin := time.Now()
	for _, name := range c.Spec.ControllerNames() {
		require.NoError(t, c.Spec.Start(t.Context(), name))
	}
	for _, name := range c.Spec.ControllerNames() {
		c.WaitServing(t, name, time.Minute)
	}
	t.Logf("all controllers serve again %s after their start", ms(time.Since(begin)))
	for _, name := range c.Spec.ControllerNames() {
		require.Equal(t, before.names, listAll(t, c, name).names, "on %s", name)
	}
}

// killLeaderAndScale kills -9 the leader under load, scales the Deployment while nobody
// leads, starts the controller again, and checks the promises.
func killLeaderAndScale(t *testing.T, c *harness.Cluster, round int, replicas int32) {
	t.Helper()
	w := c.Write(t, "")
	leader := c.Leader(t)
	c.Kill(t, leader, true)
	c.Scale(t, "web", replicas) // answered by the new leader only
	scaled := c.WaitAvailable(t, "web", replicas, time.Minute)
	waitOtherLeader(t, c, leader)
	c.Start(t, leader)
	written := w.Stop(t)
	t.Logf("round %d, %s killed: %d writes acknowledged, none lost; longest time without one %s; scaled up %s after the election",
		round, leader, len(written.Acknowledged), ms(written.LongestGap), ms(scaled))
	require.LessOrEqual(t, written.LongestGap, longestGap, "round %d", round)
	require.LessOrEqual(t, scaled, afterElection, "round %d", round)
}

func ms(d time.Duration) string { return d.Round(time.Millisecond).String() }

func waitOtherLeader(t *testing.T, c *harness.Cluster, old string) {
	t.Helper()
	harness.Eventually(t, 20*time.Second, "a leader other than "+old, func() error {
		if now := c.Status(t).Leader; now == "" || now == old {
			return fmt.Errorf("%q leads", now)
		}
		return nil
	})
}

func others(c *harness.Cluster, name string) string {
	list := ""
	for _, other := range c.Spec.ControllerNames() {
		if other == name {
			continue
		}
		if list != "" {
			list += ","
		}
		list += other
	}
	return list
}

func follower(t *testing.T, c *harness.Cluster) string {
	t.Helper()
	leader := c.Leader(t)
	names := c.Spec.ControllerNames()
	return names[(slices.Index(names, leader)+1)%len(names)]
}

func sameContainers(t *testing.T, c *harness.Cluster, before map[string]string) error {
	after := c.Containers(t, "web")
	for name, was := range before {
		if after[name] != was {
			return fmt.Errorf("container %s was %q and is %q", name, was, after[name])
		}
	}
	return nil
}

// requireRest checks that no controller's log grows for a while, once it has
// come to rest.
func requireRest(t *testing.T, c *harness.Cluster, duration time.Duration) {
	t.Helper()
	last := lastIndexes(t, c)
	quiet := time.Now()
	harness.Eventually(t, time.Minute, "the log comes to rest", func() error {
		if now := lastIndexes(t, c); !slices.Equal(now, last) {
			last, quiet = now, time.Now()
		}
		if time.Since(quiet) < 3*time.Second {
			return errors.New("it still grows")
		}
		return nil
	})
	harness.For(t, duration, "a cluster at rest", func() error {
		if now := lastIndexes(t, c); !slices.Equal(now, last) {
			return fmt.Errorf("last indexes were %v and are %v", last, now)
		}
		return nil
	})
	t.Logf("last index %v for %s", last, duration)
}

func lastIndexes(t *testing.T, c *harness.Cluster) []uint64 {
	t.Helper()
	var indexes []uint64
	for _, controller := range c.Status(t).Controllers {
		if !controller.Answers {
			t.Fatalf("%s does not answer: %v", controller.Name, controller.Problems)
		}
		indexes = append(indexes, controller.LastIndex)
	}
	return indexes
}

func printMemory(t *testing.T, c *harness.Cluster) {
	t.Helper()
	for _, controller := range c.Status(t).Controllers {
		m := controller.Memory
		t.Logf("%s (%s): %d MB resident, %d MB of it anonymous, %d MB file-backed",
			controller.Name, controller.Role, m.Resident>>20, m.Anonymous>>20, m.File>>20)
	}
}

// lists is what a controller serves.
type lists struct {
	names    map[string][]string // resource to namespace/name
	versions map[string][]string // resource to namespace/name/resourceVersion
	revision map[string]string   // resource to the list's resourceVersion
}

var listed = []string{
	"/api/v1/namespaces", "/api/v1/configmaps", "/api/v1/pods", "/api/v1/nodes", "/api/v1/secrets", "/api/v1/serviceaccounts",
	"/apis/apps/v1/deployments", "/apis/apps/v1/replicasets",
	"/apis/rbac.authorization.k8s.io/v1/clusterroles", "/apis/rbac.authorization.k8s.io/v1/clusterrolebindings",
}

// listAll reads every kind of listed object from one controller.
func listAll(t *testing.T, c *harness.Cluster, controller string) lists {
	t.Helper()
	client := c.Client(t, controller)
	l := lists{map[string][]string{}, map[string][]string{}, map[string]string{}}
	for _, path := range listed {
		body, err := client.Discovery().RESTClient().Get().AbsPath(path).
			SetHeader("Accept", "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1").Do(t.Context()).Raw()
		require.NoError(t, err, "%s on %s", path, controller)
		var list metav1.PartialObjectMetadataList
		require.NoError(t, json.Unmarshal(body, &list))
		l.revision[path] = list.ResourceVersion
		for _, item := range list.Items {
			name := item.Namespace + "/" + item.Name
			l.names[path] = append(l.names[path], name)
			l.versions[path] = append(l.versions[path], name+"/"+item.ResourceVersion)
		}
	}
	return l
}

// requireSameEverywhere checks that all controllers serve the same objects at
// the same revision.
func requireSameEverywhere(t *testing.T, c *harness.Cluster) {
	t.Helper()
	harness.Eventually(t, 30*time.Second, "all controllers serve the same at the same revision", func() error {
		var first lists
		for i, name := range c.Spec.ControllerNames() {
			l := listAll(t, c, name)
			if i == 0 {
				first = l
				continue
			}
			for _, path := range listed {
				if first.revision[path] != l.revision[path] {
					return fmt.Errorf("%s: revision %s on %s, %s on %s", path, first.revision[path], c.Spec.ControllerNames()[0], l.revision[path], name)
				}
				if !slices.Equal(first.versions[path], l.versions[path]) {
					return fmt.Errorf("%s differs on %s", path, name)
				}
			}
		}
		return nil
	})
}

// TestColdStart measures how soon an empty cluster serves, three times.
func TestColdStart(t *testing.T) {
	for range 3 {
		t.Run("up", func(t *testing.T) {
			c := harness.Up(t, harness.Options{Controllers: 3, Agents: 0})
			printMemory(t, c)
		})
	}
}
