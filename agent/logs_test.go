package agent_test

import (
	"bufio"
	"io"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"
)

// logFiles lists the files of a container's logs and what they are together.
func logFiles(t *testing.T, n *testNode, p *corev1.Pod, container string) (names []string, sum int64) {
	t.Helper()
	dir := filepath.Join(n.cfg.DataDir, "logs", p.Namespace+"_"+p.Name+"_"+string(p.UID), container)
	list, err := os.ReadDir(dir)
	if err != nil {
		return nil, 0
	}
	for _, e := range list {
		if info, err := e.Info(); err == nil {
			names = append(names, e.Name())
			sum += info.Size()
		}
	}
	return names, sum
}

// exec runs a command in a container.
func (c *controller) exec(p *corev1.Pod, container string, command ...string) (int, string) {
	c.t.Helper()
	u := "http://kubelet/run/" + p.Namespace + "/" + p.Name + "/" + container + "?" + url.Values{"command": command}.Encode()
	resp, err := c.http().Post(u, "", nil)
	require.NoError(c.t, err)
	defer resp.Body.Close()
	raw, err := io.ReadAll(resp.Body)
	require.NoError(c.t, err)
	return resp.StatusCode, string(raw)
}

// eventually waits for a condition of the node's disk.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(2 * time.Minute); !ok(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("timed out waiting for %s", what)
		}
	}
}

// TestLogsAreRotated has containers write more than their logs may be, with and
// without an agent, and with lines that do not end.
func TestLogsAreRotated(t *testing.T) {
	n, cs := cluster(t, "c1")
	c := cs[0]
	n.start()
	const limit = 5 * 10 << 20
	p := newPod("loud",
		shell("lines", "until [ -e /tmp/go ]; do sleep 0.1; done; seq 1000001 2300000; touch /tmp/done; sleep 3600"),
		shell("noise", "until [ -e /tmp/go ]; do sleep 0.1; done; head -c 150000000 /dev/zero | tr '\\0' x; touch /tmp/done; sleep 3600"))
	c.set(p)
	c.ready(p)
	for _, name := range []string{"lines", "noise"} {
		code, text := c.exec(p, name, "touch", "/tmp/go")
		require.Equal(t, 200, code, text)
	}
	most := map[string]int64{}
	done := map[string]bool{}
	eventually(t, "all to be written", func() bool {
		for _, name := range []string{"lines", "noise"} {
			_, sum := logFiles(t, n, p, name)
			most[name] = max(most[name], sum)
			if !done[name] {
				_, text := c.exec(p, name, "sh", "-c", "ls /tmp")
				done[name] = strings.Contains(text, "done")
			}
		}
		return done["lines"] && done["noise"]
	})
	t.Logf("most on the disk: %v", most)
	for name, got := range most {
		require.LessOrEqual(t, got, int64(limit+2*(10<<20)), "%s", name)
		eventually(t, name+" to be compressed", func() bool {
			names, _ := logFiles(t, n, p, name)
			// One fewer when each was a little longer than it should be.
			return len(names) >= 4 && strings.Count(strings.Join(names, " "), ".gz") == len(names)-2
		})
	}

	// Without an agent nobody rotates; the next one makes up for it.
	n.stop()
	n.start()
	c.wait("the agent to be back", time.Minute, func() bool { return c.stream != nil })
	_, _ = c.exec(p, "lines", "sh", "-c", "seq 1000001 1300000 >/proc/1/fd/1")
	eventually(t, "a rotation by the next agent", func() bool {
		names, sum := logFiles(t, n, p, "lines")
		st, err := os.Stat(filepath.Join(n.cfg.DataDir, "logs", "default_loud_"+string(p.UID), "lines", "0.log"))
		return err == nil && st.Size() < 10<<20 && len(names) >= 4 && sum < limit
	})

	// What is gone leaves nothing.
	c.delete(p, 1)
	names, _ := logFiles(t, n, p, "lines")
	require.Empty(t, names)
}

// TestLogsOfEarlierContainersGo has a container end again and again.
func TestLogsOfEarlierContainersGo(t *testing.T) {
	n, cs := cluster(t, "c1")
	c := cs[0]
	n.cfg.ContainerLogMaxSize = 64 << 10
	n.start()
	p := newPod("again", shell("c", "seq 1000001 1010000; exit 1"))
	c.set(p)
	c.until(p, "started three times", 2*time.Minute, func(st *corev1.PodStatus) bool {
		return len(st.ContainerStatuses) == 1 && st.ContainerStatuses[0].RestartCount >= 3
	})
	eventually(t, "the logs of the first to be gone", func() bool {
		names, _ := logFiles(t, n, p, "c")
		for _, name := range names {
			if strings.HasPrefix(name, "0.log") {
				return false
			}
		}
		return true
	})
	_, sum := logFiles(t, n, p, "c")
	require.LessOrEqual(t, sum, int64(3*(5*(64<<10)+1<<20)))
}

// TestFollowingALogAcrossRotations has kubectl logs -f see each of 70 MB of lines
// once, and end with the container; the log of a container that was started
// again is there by --previous.
func TestFollowingALogAcrossRotations(t *testing.T) {
	n, cs := cluster(t, "c1")
	c := cs[0]
	n.start()
	const first, each, rounds = 1000000, 60000, 22
	p := newPod("follow", shell("c", `[ -e /tmp/x/again ] && exec sleep 3600
		until [ -e /tmp/x/go ]; do sleep 0.1; done
		i=1000000; while [ $i -lt 2320000 ]; do
			until [ -e /tmp/x/$((i-180000)) ] || [ $i -lt 1180000 ]; do sleep 0.1; done
			seq $i $((i+59999)); i=$((i+60000)); sleep 0.2
		done
		touch /tmp/x/again; printf unfinished`))
	p.Spec.Volumes = []corev1.Volume{{Name: "x", VolumeSource: corev1.VolumeSource{EmptyDir: &corev1.EmptyDirVolumeSource{}}}}
	p.Spec.Containers[0].VolumeMounts = []corev1.VolumeMount{{Name: "x", MountPath: "/tmp/x"}}
	c.set(p)
	c.ready(p)
	resp, err := c.http().Get("http://kubelet/containerLogs/default/follow/c?follow=true")
	require.NoError(t, err)
	defer resp.Body.Close()
	code, text := c.exec(p, "c", "touch", "/tmp/x/go")
	require.Equal(t, 200, code, text)
	r := bufio.NewReader(resp.Body)
	for i := first; i < first+each*rounds; i++ {
		if i%each == first%each && i < first+each*(rounds-3) { // who reads is never so far behind that a file is gone
			code, text := c.exec(p, "c", "touch", "/tmp/x/"+strconv.Itoa(i))
			require.Equal(t, 200, code, text)
		}
		line, err := r.ReadString('\n')
		require.NoError(t, err)
		if want := strconv.Itoa(i) + "\n"; line != want {
			t.Fatalf("read %q instead of %q", line, want)
		}
	}
	rest, err := io.ReadAll(r)
	require.NoError(t, err)
	require.Equal(t, "unfinished", string(rest))
	names, _ := logFiles(t, n, p, "c")
	require.GreaterOrEqual(t, len(names), 4, "%v", names)

	c.until(p, "started again", time.Minute, func(st *corev1.PodStatus) bool {
		return st.ContainerStatuses[0].RestartCount == 1 && st.ContainerStatuses[0].State.Running != nil
	})
	code, text = c.get("/containerLogs/default/follow/c?previous=true&tailLines=2&timestamps=true")
	require.Equal(t, 200, code, text)
	got := strings.Split(text, "\n")
	require.Len(t, got, 2)
	require.True(t, strings.HasSuffix(got[0], " 2319999"), text)
	require.True(t, strings.HasSuffix(got[1], " unfinished"), text)
	// As upstream, what was rotated is not read.
	code, text = c.get("/containerLogs/default/follow/c?previous=true")
	require.Equal(t, 200, code)
	require.NotContains(t, text, "1000000\n")
	require.Less(t, len(text), 11<<20)
	code, text = c.get("/containerLogs/default/follow/c")
	require.Equal(t, 200, code)
	require.Empty(t, text)
}

// TestLogsOfGonePodsGo finds folders of logs of pods that nobody knows any more,
// and what is no pod's.
func TestLogsOfGonePodsGo(t *testing.T) {
	n, cs := cluster(t, "c1")
	c := cs[0]
	root := filepath.Join(n.cfg.DataDir, "logs")
	p := newPod("stays", shell("c", "sleep 3600"))
	gone := "default_gone_" + string(newPod("x").UID)
	others := []string{"a_b_..", "..._b_c", "a_b_C", "a_b", "a_b_c_d", "lost+found"}
	for _, name := range append(others, gone) {
		require.NoError(t, os.MkdirAll(filepath.Join(root, name, "c"), 0o755))
		require.NoError(t, os.WriteFile(filepath.Join(root, name, "c", "0.log"), []byte("x"), 0o600))
	}
	c.set(p)
	n.start()
	c.ready(p)
	eventually(t, "the logs of the pod that is gone to be removed", func() bool {
		_, err := os.Stat(filepath.Join(root, gone))
		return os.IsNotExist(err)
	})
	for _, name := range others {
		require.DirExists(t, filepath.Join(root, name))
	}
	names, _ := logFiles(t, n, p, "c")
	require.Equal(t, []string{"0.log"}, names)
	require.DirExists(t, filepath.Join(n.cfg.DataDir, "pods", string(p.UID)))

	// containerd's own has a bound too.
	log := filepath.Join(n.cfg.DataDir, "containerd", "containerd.log")
	f, err := os.OpenFile(log, os.O_WRONLY|os.O_APPEND, 0)
	require.NoError(t, err)
	_, err = f.Write(make([]byte, 11<<20))
	require.NoError(t, err)
	require.NoError(t, f.Close())
	eventually(t, "containerd's log to be begun anew", func() bool {
		st, err := os.Stat(log)
		old, oldErr := os.Stat(log + ".1")
		return err == nil && oldErr == nil && st.Size() < 1<<20 && old.Size() == 10<<20
	})
}
