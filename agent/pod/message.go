package pod

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"strings"

	corev1 "k8s.io/api/core/v1"

	"timonel/agent/hostile"
	"timonel/agent/logs"
)

// How much of what containers leave to say is reported, as upstream.
const (
	maxMessage      = 4096      // of a message file, its end
	maxMessageLogs  = 2048      // of a log, its end
	maxMessageLines = 80        // of a log
	maxPodMessages  = 12 * 1024 // of a pod, each container its part
	minWaitMessage  = 64        // of why a container waits, however many wait
	maxEventMessage = 10 << 10  // of an event; a probe's output is as long
	// maxLogTail is how much of a log is read for that: the lines have prefixes.
	maxLogTail = 16 << 10
)

// How many names of a path are below the folder that has all pods'.
const (
	messageDepth = 4 // UID/containers/NAME/termination-N
	logDepth     = logs.Depth
)

func readTail(path string, depth int, limit int64) ([]byte, error) {
	root, rel := hostile.Split(path, depth)
	dir, err := hostile.OpenRoot(root)
	if err != nil {
		return nil, err
	}
	defer dir.Close()
	return dir.ReadTail(rel, limit)
}

// removeFile removes a file of a container that is gone.
func removeFile(path string, depth int) error {
	if path == "" {
		return nil
	}
	root, rel := hostile.Split(path, depth)
	dir, err := hostile.OpenRoot(root)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer dir.Close()
	return dir.Remove(rel)
}

// removeLog removes all files of the log of a container that is gone.
func removeLog(ctx context.Context, path string) error {
	if path == "" {
		return nil
	}
	return logs.Remove(ctx, path)
}

// messageFile makes the file that a container writes its last words to.
func (w *worker) messageFile(pod *corev1.Pod, c *corev1.Container, restarts int32) (string, error) {
	if c.TerminationMessagePath == "" {
		return "", nil
	}
	path := filepath.Join(w.m.volumes.PodDir(pod.UID), "containers", c.Name, fmt.Sprintf("termination-%d", restarts))
	if err := makeMessageFile(path); err != nil {
		return "", fmt.Errorf("make the termination message file: %w", err)
	}
	return path, nil
}

func makeMessageFile(path string) error {
	root, rel := hostile.Split(path, messageDepth)
	pods, err := hostile.MakeRoot(root, 0o750)
	if err != nil {
		return err
	}
	defer pods.Close()
	dir, err := pods.MkdirAll(filepath.Dir(rel), 0o750, -1, -1)
	if err != nil {
		return err
	}
	defer dir.Close()
	if err := dir.Remove(filepath.Base(rel)); err != nil { // of an attempt that failed
		return err
	}
	return dir.Create(filepath.Base(rel), nil, 0o666, -1, -1) // whatever user the container has
}

// terminationMessage is what a container left to say: its message file, else
// the end of its log when it failed and its policy says so, else CRI's words.
// The file is whatever the container made of it: of any length, of any kind.
func terminationMessage(c *container) string {
	if c.messageFile == "" {
		return c.message
	}
	raw, err := readTail(c.messageFile, messageDepth, maxMessage)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Sprintf("Error on reading termination log %s: %v", c.messageFile, err)
	}
	if len(raw) > 0 {
		return text(raw, maxMessage)
	}
	if c.messagePolicy == string(corev1.TerminationMessageFallbackToLogsOnError) && c.exitCode != 0 && c.logPath != "" {
		if text := logTail(c.logPath); text != "" {
			return text
		}
	}
	return c.message
}

// text is the end of what a container wrote, as valid UTF-8 of limit bytes at
// most.
func text(raw []byte, limit int) string {
	raw = raw[max(0, len(raw)-limit):]
	return strings.ToValidUTF8(string(raw), "")
}

// logTail is the end of a CRI log: 80 lines at most, without their prefixes.
func logTail(path string) string {
	raw, err := readTail(path, logDepth, maxLogTail)
	if err != nil {
		return ""
	}
	var out []byte
	lines := bytes.SplitAfter(raw, []byte("\n"))
	for _, line := range lines[max(0, len(lines)-maxMessageLines-1):] {
		parts := bytes.SplitN(line, []byte(" "), 4) // time, stream, tags, text
		if len(parts) == 4 {
			text := parts[3]
			if string(parts[2]) == "P" {
				text = bytes.TrimSuffix(text, []byte("\n"))
			}
			out = append(out, text...)
		}
	}
	return text(out, maxMessageLogs)
}

// shareMessages gives each container of a pod its part of what all of them
// together may say in a status, and bounds what the pod says as a whole. What is
// said of one volume may be said of each container, so that a small pod could have
// a status of gigabytes otherwise.
func shareMessages(st *corev1.PodStatus) {
	lists := [][]corev1.ContainerStatus{st.InitContainerStatuses, st.ContainerStatuses, st.EphemeralContainerStatuses}
	count := 0
	for _, list := range lists {
		count += len(list)
	}
	for _, list := range lists {
		for i := range list {
			for _, state := range []*corev1.ContainerState{&list[i].State, &list[i].LastTerminationState} {
				if t := state.Terminated; t != nil && len(t.Message) > maxPodMessages/count {
					t = t.DeepCopy() // the old status may share it
					t.Message = begin(t.Message, maxPodMessages/count)
					state.Terminated = t
				}
				if w := state.Waiting; w != nil {
					w.Message = begin(w.Message, max(maxPodMessages/count, minWaitMessage))
				}
			}
		}
	}
	st.Message = begin(st.Message, maxPodMessages)
}

// begin is the beginning of a text, of limit bytes at most and as valid UTF-8.
func begin(text string, limit int) string {
	if len(text) > limit {
		text = text[:limit]
	}
	return strings.ToValidUTF8(text, "")
}
