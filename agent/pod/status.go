package pod

import (
	"fmt"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	runtimev1 "k8s.io/cri-api/pkg/apis/runtime/v1"
	"k8s.io/kubernetes/pkg/apis/core/v1/helper/qos"
)

// waiting is why a container that is wanted does not run.
type waiting struct{ reason, message string }

// verdict ends a pod for a reason of the node's own.
type verdict struct {
	reason, message string
	rejected        bool // the node never took the pod
	disruption      bool // through no fault of the pod's own
	// grace is what the pod gets of its grace period; 0: all.
	grace time.Duration
}

// statusInput is all that a pod's status is made from.
type statusInput struct {
	want
	*seen
	pass
	now time.Time
}

// makeStatus computes the status to report, as the kubelet would.
func makeStatus(in statusInput) corev1.PodStatus {
	pod, spec := in.pod, &in.pod.Spec
	st := corev1.PodStatus{
		ObservedGeneration: pod.Generation,
		QOSClass:           qos.GetPodQOS(pod),
		StartTime:          in.old.StartTime,
		NominatedNodeName:  in.old.NominatedNodeName,
		Reason:             in.old.Reason,
		Message:            in.old.Message,
		Resize:             in.old.Resize,

		ResourceClaimStatuses: pod.Status.ResourceClaimStatuses,
	}
	if st.StartTime == nil {
		now := metav1.NewTime(in.now).Rfc3339Copy()
		st.StartTime = &now
	}
	if len(in.hostIPs) > 0 {
		st.HostIP = in.hostIPs[0]
		for _, ip := range in.hostIPs {
			st.HostIPs = append(st.HostIPs, corev1.HostIP{IP: ip})
		}
	}
	for _, ip := range podIPs(in) {
		st.PodIPs = append(st.PodIPs, corev1.PodIP{IP: ip})
	}
	if len(st.PodIPs) > 0 {
		st.PodIP = st.PodIPs[0].IP
	}
	if rejected(in) {
		// As upstream's, it says nothing of containers: there never were any.
		st.Phase = corev1.PodFailed
		if in.verdict != nil {
			st.Reason, st.Message = in.verdict.reason, in.verdict.message
		}
		st.Conditions = conditions(in, &st)
		return st
	}
	if spec.Resources != nil {
		st.Resources, st.AllocatedResources = spec.Resources, spec.Resources.Requests
	}
	for i := range spec.InitContainers {
		st.InitContainerStatuses = append(st.InitContainerStatuses, containerStatus(in, &spec.InitContainers[i], true))
	}
	for i := range spec.Containers {
		st.ContainerStatuses = append(st.ContainerStatuses, containerStatus(in, &spec.Containers[i], false))
	}
	st.EphemeralContainerStatuses = ephemeralStatuses(in)

	st.Phase = phase(spec, &st, in.stopped)
	if in.verdict != nil {
		st.Phase, st.Reason, st.Message = corev1.PodFailed, in.verdict.reason, in.verdict.message
	}
	if terminal(in.old.Phase) { // a terminal phase is for ever
		st.Phase = in.old.Phase
	} else if terminal(st.Phase) && !in.stopped {
		// Not while something of the pod still runs.
		st.Phase = corev1.PodRunning
		if in.old.Phase == corev1.PodPending || in.old.Phase == "" {
			st.Phase = corev1.PodPending
		}
		st.Reason, st.Message = in.old.Reason, in.old.Message
	}
	shareMessages(&st)
	st.Conditions = conditions(in, &st)
	return st
}

// rejected says whether this pod was not taken, by this agent or one before it.
func rejected(in statusInput) bool {
	if in.verdict != nil {
		return in.verdict.rejected
	}
	return in.old.Phase == corev1.PodFailed && len(in.old.ContainerStatuses) == 0 && !in.any() && len(in.sandboxes) == 0
}

func podIPs(in statusInput) []string {
	if ips := in.addresses(in.current()); len(ips) > 0 {
		return ips
	}
	// Kept while the pod is between sandboxes or has ended, as upstream does.
	var out []string
	if in.ending || in.stopped {
		for _, ip := range in.old.PodIPs {
			out = append(out, ip.IP)
		}
	}
	return out
}

func stamp(t time.Time) metav1.Time { return metav1.NewTime(t).Rfc3339Copy() }

func terminated(c *container) *corev1.ContainerStateTerminated {
	return &corev1.ContainerStateTerminated{
		ExitCode: c.exitCode, Reason: c.reason, Message: c.message,
		StartedAt: metav1.NewTime(c.started).Rfc3339Copy(), FinishedAt: metav1.NewTime(c.finished).Rfc3339Copy(),
		ContainerID: containerID(c),
	}
}

func containerID(c *container) string { return "containerd://" + c.id }

// oldStatus finds a container in a status, or nil.
func oldStatus(st *corev1.PodStatus, name string) *corev1.ContainerStatus {
	for _, list := range [][]corev1.ContainerStatus{st.InitContainerStatuses, st.ContainerStatuses} {
		for i := range list {
			if list[i].Name == name {
				return &list[i]
			}
		}
	}
	return nil
}

func containerStatus(in statusInput, spec *corev1.Container, init bool) corev1.ContainerStatus {
	st := corev1.ContainerStatus{
		Name: spec.Name, Image: spec.Image, AllocatedResources: spec.Resources.Requests,
		Resources: &corev1.ResourceRequirements{Limits: spec.Resources.Limits, Requests: spec.Resources.Requests},

		VolumeMounts: mountStatuses(spec, in.sealing),
	}
	if in.applied != nil {
		have := in.applied.containers[spec.Name]
		st.Resources = &corev1.ResourceRequirements{Limits: have.Limits, Requests: have.Requests}
	}
	started := false
	st.Started = &started
	c := in.latest(spec.Name)
	old := oldStatus(in.old, spec.Name)
	if c == nil {
		return lostStatus(in, spec, st, old, init)
	}
	st.Image, st.ImageID, st.ContainerID, st.RestartCount = c.image, c.imageID, containerID(c), c.restarts
	if st.Image == "" {
		st.Image = spec.Image
	}
	if list := in.containers[spec.Name]; len(list) > 1 && list[1].exited() {
		st.LastTerminationState.Terminated = terminated(list[1])
	} else if old != nil && old.State.Terminated != nil && old.ContainerID != st.ContainerID {
		st.LastTerminationState.Terminated = old.State.Terminated // its record is gone
	} else if old != nil && old.LastTerminationState.Terminated != nil {
		st.LastTerminationState = old.LastTerminationState
	}
	if resetStatus(in, spec, c, &st) {
		return st
	}
	wait, isWaiting := waitingOf(in, spec.Name, old)
	switch {
	case c.running():
		st.State.Running = &corev1.ContainerStateRunning{StartedAt: metav1.NewTime(c.started).Rfc3339Copy()}
		started = in.beside[c.id].started
		st.Ready = started && in.beside[c.id].ready && !(init && !sidecar(spec))
	case c.exited() && isWaiting && !in.ending:
		st.LastTerminationState.Terminated = terminated(c)
		st.State.Waiting = &corev1.ContainerStateWaiting{Reason: wait.reason, Message: wait.message}
	case c.exited():
		st.State.Terminated = terminated(c)
		st.Ready = init && !sidecar(spec) && c.exitCode == 0
	case c.state == runtimev1.ContainerState_CONTAINER_CREATED && !in.stopped:
		st.State.Waiting = &corev1.ContainerStateWaiting{Reason: "ContainerCreating"}
		if isWaiting {
			st.State.Waiting = &corev1.ContainerStateWaiting{Reason: wait.reason, Message: wait.message}
		}
	default:
		st.State.Terminated = unknownEnd(old)
	}
	if c.user != nil && c.user.GetLinux() != nil {
		u := c.user.Linux
		st.User = &corev1.ContainerUser{Linux: &corev1.LinuxContainerUser{UID: u.Uid, GID: u.Gid, SupplementalGroups: u.SupplementalGroups}}
	}
	return st
}

// waitingOf is why a container waits. One of a pod that ends waits for what it has waited
// for, and nobody asks about that any more.
func waitingOf(in statusInput, name string, old *corev1.ContainerStatus) (waiting, bool) {
	if in.ending && old != nil && old.State.Waiting != nil {
		return waiting{old.State.Waiting.Reason, old.State.Waiting.Message}, true
	}
	w, ok := in.waiting[name]
	return w, ok
}

func unknownEnd(old *corev1.ContainerStatus) *corev1.ContainerStateTerminated {
	t := &corev1.ContainerStateTerminated{
		Reason: "ContainerStatusUnknown", Message: "The container could not be located when the pod was terminated", ExitCode: 137,
	}
	if old != nil {
		t.ContainerID = old.ContainerID
	}
	return t
}

// lostStatus is the status of a container that CRI does not have: it was never
// made, or its record was lost.
func lostStatus(in statusInput, spec *corev1.Container, st corev1.ContainerStatus, old *corev1.ContainerStatus, init bool) corev1.ContainerStatus {
	if old != nil {
		if init && old.State.Terminated != nil {
			return *old // as upstream: what has done its part may be removed at any time
		}
		st.RestartCount, st.LastTerminationState = old.RestartCount, old.LastTerminationState
		ended := old.State.Terminated
		if ended == nil && old.State.Running != nil {
			ended = unknownEnd(old)
		}
		switch {
		case ended != nil && (in.ending || in.stopped):
			st.State.Terminated, st.Image, st.ImageID, st.ContainerID = ended, old.Image, old.ImageID, old.ContainerID
			return st
		case ended != nil:
			st.LastTerminationState.Terminated = ended
		}
	}
	w, ok := waitingOf(in, spec.Name, old)
	if !ok {
		w.reason = "ContainerCreating"
		if len(in.pod.Spec.InitContainers) > 0 {
			w.reason = reasonInitializing
		}
	}
	st.State.Waiting = &corev1.ContainerStateWaiting{Reason: w.reason, Message: w.message}
	return st
}

// phase sums up the containers' states.
func phase(spec *corev1.PodSpec, st *corev1.PodStatus, stopped bool) corev1.PodPhase {
	pendingInit, failedInit := 0, 0
	for i := range spec.InitContainers {
		c, cs := &spec.InitContainers[i], &st.InitContainerStatuses[i]
		if sidecar(c) {
			if !stopped && (cs.State.Running == nil || !isTrue(cs.Started)) && cs.LastTerminationState.Terminated == nil && cs.State.Terminated == nil {
				pendingInit++
			}
			continue
		}
		ended := cs.State.Terminated
		if ended == nil && cs.State.Waiting != nil && cs.LastTerminationState.Terminated != nil {
			ended = cs.LastTerminationState.Terminated
		}
		switch {
		case ended == nil, ended.Reason == reasonRestartingAll && !stopped:
			pendingInit++
		case ended.ExitCode != 0:
			if stopped || !restartable(&corev1.Pod{Spec: *spec}, c, &container{exitCode: ended.ExitCode}) {
				failedInit++
			} else {
				pendingInit++
			}
		}
	}
	unknown, running, waiting, stoppedCount, succeeded, stay := 0, 0, 0, 0, 0, 0
	for i := range spec.Containers {
		c, cs := &spec.Containers[i], &st.ContainerStatuses[i]
		switch {
		case cs.State.Running != nil:
			running++
		case cs.State.Terminated != nil:
			stoppedCount++
			if cs.State.Terminated.ExitCode == 0 {
				succeeded++
			}
			if !restartable(&corev1.Pod{Spec: *spec}, c, &container{exitCode: cs.State.Terminated.ExitCode}) {
				stay++
			}
		case cs.State.Waiting != nil:
			if cs.LastTerminationState.Terminated != nil {
				stoppedCount++
			} else {
				waiting++
			}
		default:
			unknown++
		}
	}
	switch {
	case failedInit > 0:
		return corev1.PodFailed
	case stopped && stoppedCount+waiting+unknown > 0 && running == 0:
		if succeeded == len(spec.Containers) {
			return corev1.PodSucceeded
		}
		return corev1.PodFailed
	case pendingInit > 0 && running == 0 && stoppedCount == 0:
		return corev1.PodPending
	case waiting > 0:
		return corev1.PodPending
	case running > 0 && unknown == 0:
		return corev1.PodRunning
	case stoppedCount > 0 && unknown == 0:
		if stay == stoppedCount && stoppedCount == len(spec.Containers) {
			if succeeded == stoppedCount {
				return corev1.PodSucceeded
			}
			return corev1.PodFailed
		}
		return corev1.PodRunning
	}
	return corev1.PodPending
}

// owned are the conditions that the node sets; all others are kept.
var owned = []corev1.PodConditionType{
	corev1.PodReadyToStartContainers, corev1.PodInitialized, corev1.PodReady, corev1.ContainersReady, corev1.PodScheduled,
	corev1.PodResizePending, corev1.PodResizeInProgress, corev1.AllContainersRestarting,
}

func conditions(in statusInput, st *corev1.PodStatus) []corev1.PodCondition {
	set := []corev1.PodCondition{
		sandboxCondition(in), initializedCondition(in, st),
	}
	containers := containersReady(in, st)
	set = append(set, readyCondition(in, st, containers), containers,
		corev1.PodCondition{Type: corev1.PodScheduled, Status: corev1.ConditionTrue})
	if !in.stopped {
		set = append(set, resizeConditions(in)...)
	}
	if mayRestartAll(in.pod) {
		set = append(set, restartingCondition(in))
	}
	if in.verdict != nil && in.verdict.disruption {
		set = append(set, corev1.PodCondition{
			Type: corev1.DisruptionTarget, Status: corev1.ConditionTrue, ObservedGeneration: in.pod.Generation,
			Reason: corev1.PodReasonTerminationByKubelet, Message: in.verdict.message,
		})
	}
	for _, c := range in.pod.Status.Conditions {
		if !slices.Contains(owned, c.Type) && findCondition(set, c.Type) == nil {
			set = append(set, c)
		}
	}
	for i := range set {
		c := &set[i]
		if slices.Contains(owned, c.Type) {
			c.ObservedGeneration = in.pod.Generation
			c.Message = begin(c.Message, maxPodMessages) // it lists containers
		}
		old := findCondition(in.old.Conditions, c.Type)
		switch {
		case old != nil && old.Status == c.Status:
			c.LastTransitionTime = old.LastTransitionTime
		case c.LastTransitionTime.IsZero():
			c.LastTransitionTime = metav1.NewTime(in.now).Rfc3339Copy()
		}
		if c.Type == corev1.PodScheduled && old != nil {
			c.Reason, c.Message = old.Reason, old.Message
		}
	}
	return set
}

func findCondition(list []corev1.PodCondition, t corev1.PodConditionType) *corev1.PodCondition {
	for i := range list {
		if list[i].Type == t {
			return &list[i]
		}
	}
	return nil
}

func truth(b bool) corev1.ConditionStatus {
	if b {
		return corev1.ConditionTrue
	}
	return corev1.ConditionFalse
}

func sandboxCondition(in statusInput) corev1.PodCondition {
	return corev1.PodCondition{Type: corev1.PodReadyToStartContainers, Status: truth(in.usable() != nil && !in.stopped)}
}

func initializedCondition(in statusInput, st *corev1.PodStatus) corev1.PodCondition {
	c := corev1.PodCondition{Type: corev1.PodInitialized, Status: corev1.ConditionTrue}
	if st.Phase == corev1.PodSucceeded {
		c.Reason = "PodCompleted"
		return c
	}
	// A pod that starts anew has been initialized, as upstream says.
	if old := findCondition(in.old.Conditions, corev1.PodInitialized); old != nil && old.Status == corev1.ConditionTrue && mayRestartAll(in.pod) {
		return c
	}
	// Once a container of the pod's own has been made, that is over.
	for i := range in.pod.Spec.Containers {
		if in.latest(in.pod.Spec.Containers[i].Name) != nil {
			return c
		}
	}
	var incomplete []string
	for i := range st.InitContainerStatuses {
		cs := &st.InitContainerStatuses[i]
		done := cs.Ready
		if sidecar(&in.pod.Spec.InitContainers[i]) {
			done = isTrue(cs.Started)
		}
		if !done {
			incomplete = append(incomplete, cs.Name)
		}
	}
	if len(incomplete) > 0 {
		c.Status, c.Reason = corev1.ConditionFalse, "ContainersNotInitialized"
		c.Message = fmt.Sprintf("containers with incomplete status: %s", bracket(incomplete))
	}
	return c
}

func bracket(names []string) string { return "[" + strings.Join(names, " ") + "]" }

func containersReady(in statusInput, st *corev1.PodStatus) corev1.PodCondition {
	c := corev1.PodCondition{Type: corev1.ContainersReady, Status: corev1.ConditionTrue}
	switch st.Phase {
	case corev1.PodSucceeded:
		c.Status, c.Reason = corev1.ConditionFalse, "PodCompleted"
		return c
	case corev1.PodFailed:
		c.Status, c.Reason = corev1.ConditionFalse, "PodFailed"
		return c
	}
	var unready []string
	for i := range st.InitContainerStatuses {
		if sidecar(&in.pod.Spec.InitContainers[i]) && !st.InitContainerStatuses[i].Ready {
			unready = append(unready, st.InitContainerStatuses[i].Name)
		}
	}
	for i := range st.ContainerStatuses {
		if !st.ContainerStatuses[i].Ready {
			unready = append(unready, st.ContainerStatuses[i].Name)
		}
	}
	if len(unready) > 0 {
		c.Status, c.Reason = corev1.ConditionFalse, "ContainersNotReady"
		c.Message = "containers with unready status: " + bracket(unready)
	}
	return c
}

func readyCondition(in statusInput, st *corev1.PodStatus, containers corev1.PodCondition) corev1.PodCondition {
	c := corev1.PodCondition{Type: corev1.PodReady, Status: containers.Status, Reason: containers.Reason, Message: containers.Message}
	if c.Status != corev1.ConditionTrue {
		return c
	}
	var missing []string
	for _, gate := range in.pod.Spec.ReadinessGates {
		got := findCondition(in.pod.Status.Conditions, gate.ConditionType)
		switch {
		case got == nil:
			missing = append(missing, fmt.Sprintf("corresponding condition of pod readiness gate %q does not exist.", gate.ConditionType))
		case got.Status != corev1.ConditionTrue:
			missing = append(missing, fmt.Sprintf("the status of pod readiness gate %q is not \"True\", but %v", gate.ConditionType, got.Status))
		}
	}
	if len(missing) > 0 {
		c.Status, c.Reason, c.Message = corev1.ConditionFalse, "ReadinessGatesNotReady", strings.Join(missing, ", ")
	}
	return c
}
