package agent_test

import (
	"bufio"
	"bytes"
	"context"
	"io"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/portforward"
	"k8s.io/client-go/tools/remotecommand"
	"k8s.io/client-go/transport/spdy"
)

// bridge makes tunnels reachable by TCP, for clients that insist on dialing.
func bridge(t *testing.T, c *controller) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer conn.Close()
				tunnel, err := c.dial(context.Background())
				if err != nil {
					return
				}
				defer tunnel.Close()
				go func() {
					_, _ = io.Copy(tunnel, conn)
					tunnel.Close()
				}()
				_, _ = io.Copy(conn, tunnel)
			}()
		}
	}()
	return "http://" + l.Addr().String()
}

func TestExecAttachPortForwardAndLogs(t *testing.T) {
	n, cs := cluster(t, "c1")
	c := cs[0]
	n.start()
	p := newPod("talk",
		corev1.Container{Name: "app", Image: "timonel/sample"},
		shell("sh", "i=0; while true; do i=$((i+1)); echo line $i; echo err $i >&2; sleep 0.2; done"))
	c.set(p)
	st := c.ready(p)
	base := bridge(t, c)
	config := &rest.Config{Host: base}

	t.Run("exec", func(t *testing.T) {
		exec := func(in io.Reader, tty bool, command ...string) (string, string, error) {
			u, err := url.Parse(base + "/exec/default/talk/sh?output=1")
			require.NoError(t, err)
			q := u.Query()
			for _, s := range command {
				q.Add("command", s)
			}
			if in != nil {
				q.Set("input", "1")
			}
			if tty {
				q.Set("tty", "1")
			} else {
				q.Set("error", "1")
			}
			u.RawQuery = q.Encode()
			e, err := remotecommand.NewSPDYExecutor(config, http.MethodPost, u)
			require.NoError(t, err)
			var out, errOut bytes.Buffer
			ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
			defer cancel()
			o := remotecommand.StreamOptions{Stdin: in, Stdout: &out, Tty: tty}
			if !tty {
				o.Stderr = &errOut
			}
			err = e.StreamWithContext(ctx, o)
			return out.String(), errOut.String(), err
		}
		out, errOut, err := exec(nil, false, "sh", "-c", "echo hello; echo oops >&2; exit 4")
		require.ErrorContains(t, err, "exit code 4")
		require.Equal(t, "hello\n", out)
		require.Equal(t, "oops\n", errOut)
		// A person's terminal stays open.
		keys, typing := io.Pipe()
		go func() { _, _ = typing.Write([]byte("echo from $0; exit\n")) }()
		out, _, err = exec(keys, true, "sh")
		typing.Close()
		require.NoError(t, err)
		require.Contains(t, out, "from sh")
		big := strings.Repeat("0123456789abcdef", 1<<16)
		out, _, err = exec(strings.NewReader(big), false, "cat")
		require.NoError(t, err)
		require.Len(t, out, len(big))
	})

	t.Run("attach", func(t *testing.T) {
		u, err := url.Parse(base + "/attach/default/talk/sh?output=1")
		require.NoError(t, err)
		e, err := remotecommand.NewSPDYExecutor(config, http.MethodPost, u)
		require.NoError(t, err)
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		r, w := io.Pipe()
		done := make(chan struct{})
		go func() {
			defer close(done)
			_ = e.StreamWithContext(ctx, remotecommand.StreamOptions{Stdout: w})
		}()
		line, err := bufio.NewReader(r).ReadString('\n')
		require.NoError(t, err)
		require.Contains(t, line, "line")
		cancel()
		r.Close()
		<-done
	})

	t.Run("port-forward", func(t *testing.T) {
		u, err := url.Parse(base + "/portForward/default/talk")
		require.NoError(t, err)
		transport, upgrader, err := spdy.RoundTripperFor(config)
		require.NoError(t, err)
		stop, ready := make(chan struct{}), make(chan struct{})
		f, err := portforward.NewOnAddresses(spdy.NewDialer(upgrader, &http.Client{Transport: transport}, http.MethodPost, u),
			[]string{"127.0.0.1"}, []string{"0:8080"}, stop, ready, io.Discard, io.Discard)
		require.NoError(t, err)
		done := make(chan error, 1)
		go func() { done <- f.ForwardPorts() }()
		select {
		case <-ready:
		case err := <-done:
			t.Fatal(err)
		}
		ports, err := f.GetPorts()
		require.NoError(t, err)
		u2 := url.URL{Scheme: "http", Host: net.JoinHostPort("127.0.0.1", strconv.Itoa(int(ports[0].Local))), Path: "/healthz"}
		resp, err := http.Get(u2.String())
		require.NoError(t, err)
		resp.Body.Close()
		require.Equal(t, http.StatusOK, resp.StatusCode)
		close(stop)
		require.NoError(t, <-done)
	})

	t.Run("logs", func(t *testing.T) {
		code, text := c.get("/containerLogs/default/talk/sh?tailLines=2&stream=Stdout")
		require.Equal(t, http.StatusOK, code)
		require.NotContains(t, text, "err")
		code, text = c.get("/containerLogs/default/talk/sh?limitBytes=7")
		require.Equal(t, http.StatusOK, code)
		require.Len(t, text, 7)
		code, text = c.get("/containerLogs/default/talk/sh?timestamps=true&tailLines=1")
		require.Equal(t, http.StatusOK, code)
		_, err := time.Parse(time.RFC3339Nano, strings.Fields(text)[0])
		require.NoError(t, err)
		for path, want := range map[string]string{
			"/containerLogs/default/talk/sh?tailLines=-1":    "tailLines",
			"/containerLogs/default/talk/nobody":             "is not available",
			"/containerLogs/default/talk/sh?previous=true":   "previous terminated container",
			"/containerLogs/default/talk/sh?stream=Sideways": "stream",
		} {
			code, text := c.get(path)
			require.Equal(t, http.StatusBadRequest, code, path)
			require.Contains(t, text, want)
		}
		code, _ = c.get("/containerLogs/default/absent/sh")
		require.Equal(t, http.StatusNotFound, code)
	})

	t.Run("stats", func(t *testing.T) {
		code, text := c.get("/stats/summary")
		require.Equal(t, http.StatusOK, code)
		require.Contains(t, text, `"name":"talk"`)
		require.Contains(t, text, "workingSetBytes")
		code, text = c.get("/metrics/resource")
		require.Equal(t, http.StatusOK, code)
		require.Contains(t, text, `container_memory_working_set_bytes{container="sh",namespace="default",pod="talk"}`)
		_, text = c.get("/pods")
		require.Contains(t, text, st.PodIP)
		_, text = c.get("/healthz")
		require.Equal(t, "ok", text)
	})

	t.Run("follow ends with the container", func(t *testing.T) {
		resp, err := c.http().Get("http://kubelet/containerLogs/default/talk/sh?follow=true&tailLines=1")
		require.NoError(t, err)
		defer resp.Body.Close()
		r := bufio.NewReader(resp.Body)
		for range 3 {
			_, err := r.ReadString('\n')
			require.NoError(t, err)
		}
		c.delete(p, 1)
		done := make(chan struct{})
		go func() {
			defer close(done)
			_, _ = io.Copy(io.Discard, r)
		}()
		select {
		case <-done:
		case <-time.After(10 * time.Second):
			t.Fatal("the log does not end")
		}
	})
}
