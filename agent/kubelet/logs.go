package kubelet

import (
	"context"
	"fmt"
	"net/http"
	"net/url"
	"strconv"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	runtimev1 "k8s.io/cri-api/pkg/apis/runtime/v1"

	"timonel/agent/logs"
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
	running := func(ctx context.Context) (bool, error) { return s.isRunning(ctx, id) }
	log, err := s.cfg.Logs.Read(r.Context(), path, readOptions(opts, time.Now()), running)
	if err != nil {
		fail(w, &apiError{http.StatusNotFound, fmt.Sprintf("the log of container %q in pod %q is gone: %v", r.PathValue("container"), pod.Name, err)})
		return
	}
	defer log.Close()
	flush := func() {}
	if f, ok := w.(http.Flusher); ok {
		flush = f.Flush
		w.Header().Set("Content-Type", "text/plain")
		f.Flush()
	}
	if err := log.Copy(r.Context(), w, flush); err != nil && r.Context().Err() == nil {
		fmt.Fprintf(w, "%s\n", err)
	}
}

// isRunning says whether a container runs. While containerd does not answer it
// is taken to.
func (s *Server) isRunning(ctx context.Context, id string) (bool, error) {
	resp, err := s.cfg.Runtime.ContainerStatus(ctx, &runtimev1.ContainerStatusRequest{ContainerId: id})
	switch status.Code(err) {
	case codes.OK:
		return resp.Status.GetState() == runtimev1.ContainerState_CONTAINER_RUNNING, nil
	case codes.Unavailable:
		return true, nil
	case codes.NotFound:
		return false, nil
	}
	return false, err
}

// readOptions are the reader's own form of a request's options.
func readOptions(o *corev1.PodLogOptions, now time.Time) logs.Options {
	out := logs.Options{TailLines: o.TailLines, LimitBytes: o.LimitBytes, Follow: o.Follow, Timestamps: o.Timestamps}
	switch *o.Stream {
	case corev1.LogStreamStdout:
		out.Stream = logs.Stdout
	case corev1.LogStreamStderr:
		out.Stream = logs.Stderr
	}
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
	for i := range pod.Spec.EphemeralContainers {
		known = known || pod.Spec.EphemeralContainers[i].Name == name
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
	return list[0].Id, resp.Status.LogPath, nil
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
