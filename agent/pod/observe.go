package pod

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"time"

	"k8s.io/apimachinery/pkg/types"
	runtimev1 "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// Labels and annotations on sandboxes and containers, as the kubelet's.
const (
	labelPodName       = "io.kubernetes.pod.name"
	labelPodNamespace  = "io.kubernetes.pod.namespace"
	labelPodUID        = "io.kubernetes.pod.uid"
	labelContainerName = "io.kubernetes.container.name"

	annotationHash          = "io.kubernetes.container.hash"
	annotationRestartCount  = "io.kubernetes.container.restartCount"
	annotationMessagePath   = "io.kubernetes.container.terminationMessagePath"
	annotationMessagePolicy = "io.kubernetes.container.terminationMessagePolicy"
	annotationPodGrace      = "io.kubernetes.pod.terminationGracePeriod"
	// annotationMessageFile is where the termination message is on the node.
	annotationMessageFile = "timonel.io/termination-message-file"
)

// sandbox is one pod sandbox as CRI has it.
type sandbox struct {
	id      string
	attempt uint32
	created time.Time
	ready   bool
	hostNet bool
	ips     []string
}

// container is one container, of now or before, as CRI has it.
type container struct {
	id, name, sandbox string
	attempt           uint32
	restarts          int32
	state             runtimev1.ContainerState
	created           time.Time
	started, finished time.Time
	exitCode          int32
	reason, message   string
	image, imageID    string
	hash, logPath     string
	messageFile       string
	messagePolicy     string
	user              *runtimev1.ContainerUser
}

func (c *container) running() bool {
	return c != nil && c.state == runtimev1.ContainerState_CONTAINER_RUNNING
}

func (c *container) exited() bool {
	return c != nil && c.state == runtimev1.ContainerState_CONTAINER_EXITED
}

// observed is what CRI says of one pod at one moment.
type observed struct {
	sandboxes  []sandbox               // newest first
	containers map[string][]*container // by name, newest first
}

// current is the sandbox that containers belong in: the newest, if it is ready.
func (o *observed) current() *sandbox {
	if len(o.sandboxes) == 0 || !o.sandboxes[0].ready {
		return nil
	}
	return &o.sandboxes[0]
}

// latest is the newest container of a name, or nil.
func (o *observed) latest(name string) *container {
	if list := o.containers[name]; len(list) > 0 {
		return list[0]
	}
	return nil
}

// in is the newest container of a name in one sandbox, or nil.
func (o *observed) in(s *sandbox, name string) *container {
	if s == nil {
		return nil
	}
	for _, c := range o.containers[name] {
		if c.sandbox == s.id {
			return c
		}
	}
	return nil
}

// running lists all containers that run, of any sandbox.
func (o *observed) running() []*container {
	var out []*container
	for _, list := range o.containers {
		for _, c := range list {
			if c.running() {
				out = append(out, c)
			}
		}
	}
	slices.SortFunc(out, func(a, b *container) int { return cmp.Compare(a.id, b.id) })
	return out
}

// any says whether there is a container.
func (o *observed) any() bool {
	for _, list := range o.containers {
		if len(list) > 0 {
			return true
		}
	}
	return false
}

// names are those of all containers, sorted.
func (o *observed) names() []string { return slices.Sorted(maps.Keys(o.containers)) }

// inside are the containers of one sandbox.
func (o *observed) inside(sandbox string) []*container {
	var out []*container
	for _, list := range o.containers {
		for _, c := range list {
			if c.sandbox == sandbox {
				out = append(out, c)
			}
		}
	}
	return out
}

// observer reads one pod's state from CRI. What has exited does not change any
// more and is asked for once.
type observer struct {
	runtime Runtime
	uid     types.UID
	exited  map[string]*container
}

func nano(t int64) time.Time {
	if t == 0 {
		return time.Time{}
	}
	return time.Unix(0, t)
}

func (ob *observer) observe(ctx context.Context) (*observed, error) {
	selector := map[string]string{labelPodUID: string(ob.uid)}
	boxes, err := ob.runtime.ListPodSandbox(ctx, &runtimev1.ListPodSandboxRequest{Filter: &runtimev1.PodSandboxFilter{LabelSelector: selector}})
	if err != nil {
		return nil, fmt.Errorf("list sandboxes: %w", err)
	}
	out := &observed{containers: map[string][]*container{}}
	for _, s := range boxes.Items {
		out.sandboxes = append(out.sandboxes, sandbox{
			id: s.Id, attempt: s.Metadata.GetAttempt(), created: nano(s.CreatedAt),
			ready: s.State == runtimev1.PodSandboxState_SANDBOX_READY,
		})
	}
	slices.SortFunc(out.sandboxes, func(a, b sandbox) int { return b.created.Compare(a.created) })
	if s := out.current(); s != nil {
		st, err := ob.runtime.PodSandboxStatus(ctx, &runtimev1.PodSandboxStatusRequest{PodSandboxId: s.id})
		if err != nil {
			return nil, fmt.Errorf("status of sandbox %s: %w", s.id, err)
		}
		s.ready = st.Status.State == runtimev1.PodSandboxState_SANDBOX_READY
		s.hostNet, s.ips = onNodeNetwork(st.Status), addressesOf(st.Status)
	}
	list, err := ob.runtime.ListContainers(ctx, &runtimev1.ListContainersRequest{Filter: &runtimev1.ContainerFilter{LabelSelector: selector}})
	if err != nil {
		return nil, fmt.Errorf("list containers: %w", err)
	}
	seen := map[string]*container{}
	for _, item := range list.Containers {
		c := ob.exited[item.Id]
		if c == nil {
			if c, err = ob.status(ctx, item); err != nil {
				return nil, err
			}
			if c == nil {
				continue // removed meanwhile
			}
		}
		if c.exited() {
			seen[c.id] = c
		}
		out.containers[c.name] = append(out.containers[c.name], c)
	}
	ob.exited = seen
	for _, list := range out.containers {
		slices.SortFunc(list, func(a, b *container) int { return b.created.Compare(a.created) })
	}
	return out, nil
}

func (ob *observer) status(ctx context.Context, item *runtimev1.Container) (*container, error) {
	resp, err := ob.runtime.ContainerStatus(ctx, &runtimev1.ContainerStatusRequest{ContainerId: item.Id})
	if err != nil {
		if notFound(err) {
			return nil, nil
		}
		return nil, fmt.Errorf("status of container %s: %w", item.Id, err)
	}
	st := resp.Status
	c := &container{
		id: item.Id, name: st.Labels[labelContainerName], sandbox: item.PodSandboxId,
		attempt: st.Metadata.GetAttempt(), state: st.State,
		created: nano(st.CreatedAt), started: nano(st.StartedAt), finished: nano(st.FinishedAt),
		exitCode: st.ExitCode, reason: st.Reason, message: st.Message,
		image: st.GetImage().GetImage(), imageID: st.ImageRef,
		hash: st.Annotations[annotationHash], logPath: st.LogPath,
		messageFile: st.Annotations[annotationMessageFile], messagePolicy: st.Annotations[annotationMessagePolicy],
		user: st.User,
	}
	if n, err := strconv.ParseInt(st.Annotations[annotationRestartCount], 10, 32); err == nil {
		c.restarts = int32(n)
	}
	if c.exited() {
		c.message = terminationMessage(c)
	}
	return c, nil
}

// onNodeNetwork says whether a sandbox has the node's network and none of its own.
func onNodeNetwork(st *runtimev1.PodSandboxStatus) bool {
	return st.GetLinux().GetNamespaces().GetOptions().GetNetwork() == runtimev1.NamespaceMode_NODE
}

// addressesOf are a sandbox's, the first first.
func addressesOf(st *runtimev1.PodSandboxStatus) (out []string) {
	if ip := st.GetNetwork().GetIp(); ip != "" {
		out = append(out, ip)
	}
	for _, ip := range st.GetNetwork().GetAdditionalIps() {
		out = append(out, ip.GetIp())
	}
	return out
}
