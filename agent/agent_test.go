package agent_test

import (
	"fmt"
	"io"
	"net/http"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"
)

func TestRunPodServeLogsAndEnd(t *testing.T) {
	n, cs := cluster(t, "c1")
	c := cs[0]
	n.start()
	p := newPod("web", corev1.Container{Name: "app", Image: "timonel/sample"})
	c.set(p)
	st := c.ready(p)
	require.Equal(t, corev1.PodRunning, st.Phase)
	require.NotEmpty(t, st.PodIP)

	resp, err := http.Get(fmt.Sprintf("http://%s:8080/", st.PodIP))
	require.NoError(t, err)
	body, err := io.ReadAll(resp.Body)
	require.NoError(t, err)
	resp.Body.Close()
	require.Contains(t, string(body), "pod web")

	code, text := c.get("/containerLogs/default/web/app")
	require.Equal(t, http.StatusOK, code, text)
	require.Contains(t, text, "sample: pod web listens on :8080")

	began := time.Now()
	c.delete(p, 5)
	require.Less(t, time.Since(began), 4*time.Second, "the sample ends on SIGTERM")
}
