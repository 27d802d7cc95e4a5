package pod

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"strconv"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	runtimev1 "k8s.io/cri-api/pkg/apis/runtime/v1"
	"k8s.io/kubernetes/pkg/probe"
	httpprobe "k8s.io/kubernetes/pkg/probe/http"
)

// maxExecOutput bounds what is kept of what a command prints, as upstream.
const maxExecOutput = 10 << 10

// hook is a container's postStart: done, or still running.
type hook struct {
	done   bool
	err    error
	cancel context.CancelFunc // nil until it runs
}

// beginHook marks a container as not started until its postStart has ended.
func (w *worker) beginHook(id string, spec *corev1.Container) {
	if spec.Lifecycle == nil || spec.Lifecycle.PostStart == nil {
		return
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.aroundOf(id).hook = &hook{}
}

func (w *worker) endHook(id string, err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if a := w.around[id]; a != nil && a.hook != nil {
		a.hook.done, a.hook.err = true, err
	}
}

// runPostStart runs a container's postStart hook in the background. A hook that
// fails has its container killed.
func (w *worker) runPostStart(pod *corev1.Pod, spec *corev1.Container, id string, ips []string) {
	if spec.Lifecycle == nil || spec.Lifecycle.PostStart == nil {
		return
	}
	ctx, cancel := context.WithCancel(w.ctx)
	w.mu.Lock()
	if a := w.around[id]; a != nil && a.hook != nil {
		a.hook.cancel = cancel
	}
	w.mu.Unlock()
	w.wg.Add(1)
	go func() {
		defer w.wg.Done()
		defer cancel()
		err := w.runHandlerAt(ctx, pod, spec, spec.Lifecycle.PostStart, id, ips)
		if ctx.Err() != nil {
			return
		}
		if err != nil {
			// What it printed stays here, as upstream's: it may be secret.
			w.log.Warn("postStart hook", "container", spec.Name, "id", id, "error", err)
			w.event(pod, corev1.EventTypeWarning, "FailedPostStartHook", "PostStartHook failed", spec.Name)
		}
		w.endHook(id, err)
		w.wakeUp()
	}()
}

// stopHook ends the postStart of a container that has ended, which may wait for
// somebody who never answers.
func (w *worker) stopHook(id string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if a := w.around[id]; a != nil && a.hook != nil && a.hook.cancel != nil {
		a.hook.cancel()
	}
}

func (w *worker) runHandler(ctx context.Context, pod *corev1.Pod, spec *corev1.Container, h *corev1.LifecycleHandler, id string) error {
	var ips []string
	if s := w.snapshot(); s != nil && s.Status.PodIP != "" {
		ips = []string{s.Status.PodIP}
	}
	return w.runHandlerAt(ctx, pod, spec, h, id, ips)
}

func (w *worker) runHandlerAt(ctx context.Context, pod *corev1.Pod, spec *corev1.Container, h *corev1.LifecycleHandler, id string, ips []string) error {
	switch {
	case h.Exec != nil:
		out, code, err := w.exec(ctx, id, h.Exec.Command, 0)
		if err != nil {
			return err
		}
		if code != 0 {
			return fmt.Errorf("command %q exited with %d: %s", strings.Join(h.Exec.Command, " "), code, out)
		}
	case h.HTTPGet != nil:
		return httpHook(ctx, spec, h.HTTPGet, first(ips))
	case h.Sleep != nil:
		select {
		case <-ctx.Done():
		case <-time.After(time.Duration(h.Sleep.Seconds) * time.Second):
		}
	case h.TCPSocket != nil:
		port, err := probe.ResolveContainerPort(h.TCPSocket.Port, spec)
		if err != nil {
			return err
		}
		host := h.TCPSocket.Host
		if host == "" {
			host = first(ips)
		}
		var d net.Dialer
		conn, err := d.DialContext(ctx, "tcp", net.JoinHostPort(host, strconv.Itoa(port)))
		if err != nil {
			return err
		}
		return conn.Close()
	}
	return nil
}

// httpHook calls a hook's URL; anything but an error status is success. As upstream's,
// it does not follow who answers to another host: that would be a call of the node,
// from the node's own network, to where the pod's author has no access.
func httpHook(ctx context.Context, spec *corev1.Container, get *corev1.HTTPGetAction, ip string) error {
	req, err := httpprobe.NewRequestForHTTPGetAction(get, spec, ip, "lifecycle")
	if err != nil {
		return err
	}
	client := &http.Client{Transport: insecureTransport(), CheckRedirect: httpprobe.RedirectChecker(false)}
	defer client.CloseIdleConnections()
	resp, err := client.Do(req.WithContext(ctx))
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	_, _ = io.Copy(io.Discard, io.LimitReader(resp.Body, 10<<10))
	if resp.StatusCode >= http.StatusBadRequest {
		return fmt.Errorf("%s answered %s", req.URL, resp.Status)
	}
	return nil
}

// exec runs a command in a container and returns what it printed.
func (w *worker) exec(ctx context.Context, id string, command []string, timeout time.Duration) (string, int32, error) {
	resp, err := w.m.cfg.Runtime.ExecSync(ctx, &runtimev1.ExecSyncRequest{
		ContainerId: id, Cmd: command, Timeout: int64((timeout + time.Second - 1) / time.Second),
	})
	if err != nil {
		return "", 0, fmt.Errorf("command %q: %w", strings.Join(command, " "), err)
	}
	stdout := resp.Stdout[:min(len(resp.Stdout), maxExecOutput)]
	stderr := resp.Stderr[:min(len(resp.Stderr), maxExecOutput)]
	return begin(string(stdout)+string(stderr), maxExecOutput), resp.ExitCode, nil
}
