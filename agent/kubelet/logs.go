package kubelet

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"path/filepath"
	"strconv"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	internalapi "k8s.io/cri-api/pkg/apis"
	runtimev1 "k8s.io/cri-api/pkg/apis/runtime/v1"
	crilogs "k8s.io/cri-client/pkg/logs"

	"timonel/agent/hostile"
)

// logOptions reads the query of a log request and names the parameter that is
// wrong.
func logOptions(q url.Values) (*corev1.PodLogOptions, error) {
	o := &corev1.PodLogOptions{Follow: boolParam(q, "follow"), Previous: boolParam(q, "previous"), Timestamps: boolParam(q, "timestamps")}
	number := func(name string, least int64) (*int64, error) {
		text := q.Get(name)
		if text == "" || name == "tailLines" && text == "all" {
			return nil, nil
		}
		n, err := strconv.ParseInt(text, 10, 64)
		if err != nil || n < least {
			return nil, &apiError{http.StatusBadRequest, fmt.Sprintf("parameter %s: %q must be a number of at least %d", name, text, least)}
		}
		return &n, nil
	}
	var err error
	if o.TailLines, err = number("tailLines", 0); err != nil {
		return nil, err
	}
	if o.LimitBytes, err = number("limitBytes", 1); err != nil {
		return nil, err
	}
	if o.SinceSeconds, err = number("sinceSeconds", 1); err != nil {
		return nil, err
	}
	if text := q.Get("sinceTime"); text != "" {
		t, err := time.Parse(time.RFC3339Nano, text)
		if err != nil {
			return nil, &apiError{http.StatusBadRequest, fmt.Sprintf("parameter sinceTime: %v", err)}
		}
		o.SinceTime = &metav1.Time{Time: t}
	}
	stream := q.Get("stream")
	switch stream {
	case "", corev1.LogStreamAll, corev1.LogStreamStdout, corev1.LogStreamStderr:
		o.Stream = &stream
	default:
		return nil, &apiError{http.StatusBadRequest, fmt.Sprintf("parameter stream: %q must be All, Stdout or Stderr", stream)}
	}
	return o, nil
}

func (s *Server) logs(w http.ResponseWriter, r *http.Request) {
	opts, err := logOptions(r.URL.Query())
	if err != nil {
		fail(w, err)
		return
	}
	pod, err := s.pod(r)
	if err != nil {
		fail(w, err)
		return
	}
	id, path, err := s.logFile(r.Context(), pod, r.PathValue("container"), opts.Previous)
	if err != nil {
		fail(w, err)
		return
	}
	out := &flusher{w: w}
	if f, ok := w.(http.Flusher); ok {
		out.flush = f.Flush
		w.Header().Set("Content-Type", "text/plain")
		f.Flush()
	}
	var stdout, stderr io.Writer = out, out
	switch *opts.Stream {
	case corev1.LogStreamStdout:
		stderr = io.Discard
	case corev1.LogStreamStderr:
		stdout = io.Discard
	}
	ctx, cancel := context.WithCancel(r.Context())
	defer cancel()
	err = crilogs.ReadLogs(ctx, path, id, readOptions(opts, time.Now()), statusOnly{runtime: s.cfg.Runtime}, stdout, stderr)
	if err != nil && ctx.Err() == nil {
		fmt.Fprintf(w, "%s\n", err)
	}
}

// readOptions are the reader's own form of a request's options.
func readOptions(o *corev1.PodLogOptions, now time.Time) *crilogs.LogOptions {
	out := &crilogs.LogOptions{TailLines: o.TailLines, LimitBytes: o.LimitBytes, Follow: o.Follow, Timestamp: o.Timestamps}
	switch {
	case o.SinceSeconds != nil:
		out.Since = now.Add(-time.Duration(*o.SinceSeconds) * time.Second)
	case o.SinceTime != nil:
		out.Since = o.SinceTime.Time
	}
	return out
}

// logFile finds the log of a container: of the newest that has run, or of the
// one before it.
func (s *Server) logFile(ctx context.Context, pod *corev1.Pod, name string, previous bool) (id, path string, err error) {
	known := false
	for _, list := range [][]corev1.Container{pod.Spec.InitContainers, pod.Spec.Containers} {
		for i := range list {
			known = known || list[i].Name == name
		}
	}
	if !known {
		return "", "", &apiError{http.StatusBadRequest, fmt.Sprintf("container %q in pod %q is not available", name, pod.Name)}
	}
	list, err := s.containers(ctx, pod, name)
	if err != nil {
		return "", "", err
	}
	// One that was made but has not run has no log.
	for len(list) > 0 && list[0].State == runtimev1.ContainerState_CONTAINER_CREATED {
		list = list[1:]
	}
	if previous {
		// While the container waits to be started again, the newest is the
		// previous one.
		if !waiting(pod, name) && len(list) > 0 {
			list = list[1:]
		}
		if len(list) == 0 {
			return "", "", &apiError{http.StatusBadRequest, fmt.Sprintf("previous terminated container %q in pod %q not found", name, pod.Name)}
		}
	}
	if len(list) == 0 {
		reason := "ContainerCreating"
		for _, cs := range append(pod.Status.InitContainerStatuses, pod.Status.ContainerStatuses...) {
			if cs.Name == name && cs.State.Waiting != nil {
				reason = cs.State.Waiting.Reason
				if cs.State.Waiting.Message != "" {
					reason += ": " + cs.State.Waiting.Message
				}
			}
		}
		return "", "", &apiError{http.StatusBadRequest, fmt.Sprintf("container %q in pod %q is waiting to start: %s", name, pod.Name, reason)}
	}
	resp, err := s.cfg.Runtime.ContainerStatus(ctx, &runtimev1.ContainerStatusRequest{ContainerId: list[0].Id})
	if err != nil {
		return "", "", err
	}
	path = resp.Status.LogPath
	if err := checkLog(path); err != nil {
		return "", "", &apiError{http.StatusNotFound, fmt.Sprintf("the log of container %q in pod %q is gone: %v", name, pod.Name, err)}
	}
	return list[0].Id, path, nil
}

// logDepth is how many names of a log's path are below the folder of all logs:
// NAMESPACE_NAME_UID/CONTAINER/N.log. A pod that collects logs may write there.
const logDepth = 3

// checkLog refuses what is not a regular file, and a link on the way to it,
// without opening it: reading a FIFO would hang, a link may lead to any file.
func checkLog(path string) error {
	root, rel := path, ""
	for range logDepth {
		root, rel = filepath.Dir(root), filepath.Join(filepath.Base(root), rel)
	}
	dir, err := hostile.OpenRoot(root)
	if err != nil {
		return err
	}
	defer dir.Close()
	f, err := dir.Open(rel)
	if err != nil {
		return err
	}
	return f.Close()
}

func waiting(pod *corev1.Pod, name string) bool {
	for _, list := range [][]corev1.ContainerStatus{pod.Status.InitContainerStatuses, pod.Status.ContainerStatuses} {
		for i := range list {
			if list[i].Name == name {
				return list[i].State.Waiting != nil
			}
		}
	}
	return false
}

// flusher sends each line as it comes.
type flusher struct {
	w     io.Writer
	flush func()
}

func (f *flusher) Write(p []byte) (int, error) {
	n, err := f.w.Write(p)
	if err == nil && f.flush != nil {
		f.flush()
	}
	return n, err
}

// statusOnly is the part of the runtime service that following a log needs.
type statusOnly struct {
	internalapi.RuntimeService
	runtime runtimev1.RuntimeServiceClient
}

// ContainerStatus implements [internalapi.RuntimeService].
func (s statusOnly) ContainerStatus(ctx context.Context, id string, verbose bool) (*runtimev1.ContainerStatusResponse, error) {
	return s.runtime.ContainerStatus(ctx, &runtimev1.ContainerStatusRequest{ContainerId: id, Verbose: verbose})
}
