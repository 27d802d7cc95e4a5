//go:build e2e

package e2e

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"timonel/test/harness"
)

// olderPrograms is the folder of a release before: TIMONEL_OLDER, or controllers of
// this one that run under the first cluster version alone (make older).
func olderPrograms(t *testing.T) string {
	if dir := os.Getenv("TIMONEL_OLDER"); dir != "" {
		return dir
	}
	dir := filepath.Join(filepath.Dir(harness.Program(t, "controller")), "older")
	require.FileExists(t, filepath.Join(dir, "controller"), "run `make older` first")
	return dir
}

// TestUpgrade runs two builds of the program in one cluster: upgraded one by one, and
// back before the last one is, without a lost write; once all know the newer cluster
// version the older program refuses to start, says why, and loses nothing.
func TestUpgrade(t *testing.T) {
	t.Parallel()
	older := olderPrograms(t)
	newer := filepath.Dir(harness.Program(t, "controller"))
	c := harness.Up(t, harness.Options{Controllers: 3, Agents: 1, Bin: older})

	var written []string
	write := func() {
		t.Helper()
		for _, on := range c.Spec.ControllerNames() {
			name := fmt.Sprintf("w%d", len(written))
			harness.Eventually(t, 30*time.Second, "a write on "+on, func() error {
				_, err := c.Client(t, on).CoreV1().ConfigMaps("default").Create(t.Context(),
					&corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: name}}, metav1.CreateOptions{})
				return err
			})
			written = append(written, name)
		}
	}
	allThere := func() {
		t.Helper()
		for _, on := range c.Spec.ControllerNames() {
			list, err := c.Client(t, on).CoreV1().ConfigMaps("default").List(t.Context(), metav1.ListOptions{})
			require.NoError(t, err)
			there := map[string]bool{}
			for _, m := range list.Items {
				there[m.Name] = true
			}
			for _, name := range written {
				require.True(t, there[name], "%s was acknowledged and is not on %s", name, on)
			}
		}
	}
	run := func(name, bin string) {
		t.Helper()
		require.NoError(t, c.Spec.Stop(t.Context(), name))
		c.Spec.Bin = bin
		c.Start(t, name)
	}
	version := func() uint32 { return c.Status(t).Version }

	write()
	require.LessOrEqual(t, version(), uint32(1))

	// Two of three, and one of them back.
	run("c1", newer)
	write()
	run("c2", newer)
	write()
	harness.Eventually(t, 30*time.Second, "who holds the version is named", func() error {
		if leader := c.Leader(t); leader == "c3" { // the older one does not know of versions
			c.Run(t, "members", "transfer-leader", "c1")
		}
		status := c.Status(t)
		if problems := strings.Join(status.Problems, "\n"); !strings.Contains(problems, "until all members' programs know 3: c3 ") {
			return fmt.Errorf("problems: %s", problems)
		}
		return nil
	})
	require.Equal(t, uint32(1), version(), "raised while c3's program cannot read it")
	run("c1", older)
	write()
	allThere()

	// All: the gate closes.
	run("c1", newer)
	write()
	run("c3", newer)
	harness.Eventually(t, 30*time.Second, "the cluster version rises", func() error {
		if v := version(); v != 3 {
			return fmt.Errorf("it is %d", v)
		}
		return nil
	})
	write()
	allThere()

	// Too late to go back: the older program ends, and says what to do.
	require.NoError(t, c.Spec.Stop(t.Context(), "c2"))
	c.Spec.Bin = older
	require.NoError(t, c.Spec.Start(t.Context(), "c2"))
	said := regexp.MustCompile(`(?m)^controller: .*run (that|a newer) one`)
	harness.Eventually(t, time.Minute, "the older program ends and says why", func() error {
		log, err := os.ReadFile(c.Spec.LogFile("c2"))
		require.NoError(t, err)
		if !said.Match(log) {
			return errors.New("it has not said")
		}
		state, err := c.Spec.Machine("c2").State(t.Context())
		if err != nil || state.Up() || state.Exited == "" { // the last: init has seen it
			return fmt.Errorf("it runs (%v)", err)
		}
		return nil
	})
	c.Spec.Bin = newer
	c.Start(t, "c2")
	write()
	allThere()
}
