package pod

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	corev1 "k8s.io/api/core/v1"
	nodev1 "k8s.io/api/node/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/validation"
	runtimev1 "k8s.io/cri-api/pkg/apis/runtime/v1"

	"timonel/agent/admission"
	"timonel/agent/hostile"
	"timonel/agent/image"
	"timonel/agent/userns"
	"timonel/agent/volume"
	"timonel/network/dns/resolvconf"
)

// Runtime is CRI's runtime service.
type Runtime = runtimev1.RuntimeServiceClient

// callTimeout bounds CRI calls that do not wait for a container.
const callTimeout = 2 * time.Minute

// straysKept bounds the ids that ended before they had an owner.
const straysKept = 1024

// Objects finds what pods refer to.
type Objects interface {
	volume.Objects
	RuntimeClass(name string) (*nodev1.RuntimeClass, bool)
}

// Statuses keeps the last computed status of pods over restarts of the agent.
type Statuses interface {
	Status(uid types.UID) (*corev1.PodStatus, bool)
	SetStatus(uid types.UID, status *corev1.PodStatus)
	ForgetStatus(uid types.UID)
}

// Reporter hears what becomes of pods. Its methods do not wait.
type Reporter interface {
	SetPodStatus(pod *corev1.Pod, status *corev1.PodStatus)
	PodTerminated(pod *corev1.Pod)
	ForgetPod(pod *corev1.Pod)
	Event(e *corev1.Event)
}

// Config is what a manager works with.
type Config struct {
	NodeName string
	// Dir holds pods/ (volumes and files) and logs/ (containers' output).
	Dir string
	// LocalDir holds the node's own PersistentVolumes.
	LocalDir string
	// CgroupRoot is the cgroup below which all pods are.
	CgroupRoot string
	SeccompDir string
	// MaxPids is how many processes and threads one pod may have; 0: any number.
	MaxPids int64

	Runtime Runtime
	Images  runtimev1.ImageServiceClient
	// ImagesComing says whether images are still being imported; nil: none are.
	ImagesComing func() bool
	// ImagesFull says why no image is to be pulled; nil: there always is room.
	ImagesFull func() error
	Layers     Layers
	// CSI mounts the volumes of CSI drivers; nil: there are none.
	CSI volume.CSI
	// Views mounts images as volumes.
	Views        volume.Images
	Beside       Beside
	Objects      Objects
	Statuses     Statuses
	Reporter     Reporter
	Tokens       volume.Tokens
	Certificates volume.Certificates

	HostIPs  func() []string
	Capacity func() corev1.ResourceList
	// Node is what new pods are held against, without the pods that are there.
	Node func() admission.Node
	// Users has the ids of pods in user namespaces of their own. UserNamespaces says
	// whether a runtime, of its handler's name, can do that. nil: none can.
	Users          *userns.Users
	UserNamespaces func(handler string) bool
	// RecursiveReadOnly says whether mounts can be read-only with all below them.
	RecursiveReadOnly bool
	// Policies holds pods to their addresses and to network policies; nil: nothing does.
	// PolicyOf is the revision as of which one may hold for a pod, as Policies.Ready has it.
	Policies Policies
	PolicyOf func(uid types.UID) int64
	// NetworkReady says whether sandboxes on the pod network can be made.
	NetworkReady func() bool

	// DNS is what new pods are told of the cluster's name servers, by now. Default: there
	// are none. ResolvConf is the node's file.
	DNS        func() DNS
	ResolvConf string
	// KubernetesServiceIP is what KUBERNETES_SERVICE_HOST says in containers.
	KubernetesServiceIP string
	// Services are those of a namespace, of which containers get variables, or why they
	// are not known yet. nil: there are none.
	Services func(namespace string) ([]*corev1.Service, error)

	Now    func() time.Time
	Logger *slog.Logger
}

// Manager owns the workers of all pods of a node.
type Manager struct {
	cfg     Config
	log     *slog.Logger
	volumes *volume.Manager
	images  *image.Manager

	admission sync.Mutex // one pod is admitted at a time; taken before mu
	weights   weights    // last set; admission guards it

	mu      sync.Mutex
	ctx     context.Context // of Run; nil before
	wg      sync.WaitGroup
	workers map[types.UID]*worker
	owner   map[string]types.UID // container or sandbox id to pod
	strays  map[string]bool      // ids that ended before they had an owner
}

// NewManager returns a manager that does nothing until Run.
func NewManager(cfg Config) *Manager {
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.ResolvConf == "" {
		cfg.ResolvConf = resolvconf.Default
	}
	if cfg.DNS == nil {
		cfg.DNS = func() DNS { return DNS{} }
	}
	log := cfg.Logger.With("component", "pods")
	m := &Manager{
		cfg: cfg, log: log,
		images:  image.New(cfg.Images, cfg.ImagesComing, cfg.Now, log),
		workers: map[types.UID]*worker{}, owner: map[string]types.UID{}, strays: map[string]bool{},
	}
	m.images.StopWhen(cfg.ImagesFull)
	m.volumes = volume.New(volume.Config{
		Dir: filepath.Join(cfg.Dir, "pods"), Objects: cfg.Objects, Tokens: cfg.Tokens, Certificates: cfg.Certificates, Images: cfg.Views, CSI: cfg.CSI, Event: m.volumeEvent,
		Allocatable: cfg.Capacity, Now: cfg.Now, Logger: log,
		Node: cfg.NodeName, LocalDir: cfg.LocalDir, Labels: func() map[string]string {
			if cfg.Node == nil {
				return nil
			}
			if node := cfg.Node().Object; node != nil {
				return node.Labels
			}
			return nil
		},
	})
	return m
}

// volumeEvent tells the cluster what happened to a pod's volumes.
func (m *Manager) volumeEvent(uid types.UID, kind, reason, message string) {
	m.mu.Lock()
	w := m.workers[uid]
	m.mu.Unlock()
	if w == nil {
		return
	}
	if pod := w.snapshot(); pod != nil {
		w.event(pod, kind, reason, message, "")
	}
}

// DeleteVolumes deletes those of the node's own volumes that are being deleted, as
// [volume.Manager.DeleteLocal].
func (m *Manager) DeleteVolumes(ctx context.Context, volumes []*corev1.PersistentVolume) ([]types.UID, error) {
	return m.volumes.DeleteLocal(ctx, volumes)
}

// LogDir is the folder of a pod's container logs.
func (m *Manager) LogDir(pod *corev1.Pod) string {
	return filepath.Join(m.cfg.Dir, "logs", LogDirName(pod))
}

// Run works on the pods that were set, until ctx ends. Containers go on.
func (m *Manager) Run(ctx context.Context) error {
	m.mu.Lock()
	m.ctx = ctx
	for _, w := range m.workers {
		m.launch(w)
	}
	m.mu.Unlock()
	<-ctx.Done()
	m.wg.Wait()
	return nil
}

// launch starts a worker's goroutine. m.mu is held.
func (m *Manager) launch(w *worker) {
	m.wg.Add(1)
	go func() {
		defer m.wg.Done()
		w.run(m.ctx)
		m.mu.Lock()
		defer m.mu.Unlock()
		if m.ctx.Err() == nil && m.workers[w.uid] == w {
			delete(m.workers, w.uid)
		}
	}()
}

// Set takes a new or changed pod.
func (m *Manager) Set(pod *corev1.Pod) {
	m.mu.Lock()
	w := m.workers[pod.UID]
	if w == nil {
		w = newWorker(m, pod)
		m.workers[pod.UID] = w
		if m.ctx != nil {
			m.launch(w)
		}
	}
	m.mu.Unlock()
	w.set(pod)
}

// Remove takes that a pod is not wanted any more and unknown to the cluster.
func (m *Manager) Remove(pod *corev1.Pod) {
	m.mu.Lock()
	w := m.workers[pod.UID]
	m.mu.Unlock()
	if w != nil {
		w.change(func(want *want) { want.removed = true })
	}
}

// ObjectChanged wakes the pods that refer to a ConfigMap, Secret or
// ServiceAccount.
func (m *Manager) ObjectChanged(kind, namespace, name string) {
	for _, w := range m.all() {
		if w.refersTo(kind, namespace, name) {
			w.refresh()
		}
	}
}

// VolumeChanged makes a pod look at its volumes again.
func (m *Manager) VolumeChanged(uid types.UID) {
	m.mu.Lock()
	w := m.workers[uid]
	m.mu.Unlock()
	if w != nil {
		w.refresh()
	}
}

// WakeAll makes every worker look again.
func (m *Manager) WakeAll() {
	for _, w := range m.all() {
		w.wakeUp()
	}
}

// Hurry lets pods that were put off for want of the pod network or of a
// controller try at once.
func (m *Manager) Hurry() {
	for _, w := range m.all() {
		w.change(func(*want) { w.hurry = true })
	}
}

// ImageAppeared ends back-offs for an image that was imported.
func (m *Manager) ImageAppeared(name string) {
	m.images.Appeared(name)
	for _, w := range m.all() {
		if w.waitsForImage() {
			w.wakeUp()
		}
	}
}

// TaskChanged wakes the pod that a container or sandbox belongs to. exited
// says that CRI is about to learn of its end.
func (m *Manager) TaskChanged(id string, exited bool) {
	m.mu.Lock()
	w := m.workers[m.owner[id]]
	if w == nil && exited {
		// It may be one that is just being made, and ended before CRI gave its id.
		if len(m.strays) >= straysKept {
			clear(m.strays)
		}
		m.strays[id] = true
	}
	m.mu.Unlock()
	if w == nil {
		return
	}
	if exited {
		w.expectExit(id)
	}
	w.wakeUp()
}

func (m *Manager) all() []*worker {
	m.mu.Lock()
	defer m.mu.Unlock()
	out := make([]*worker, 0, len(m.workers))
	for _, w := range m.workers {
		out = append(out, w)
	}
	return out
}

// own notes whose a container or sandbox is. If it has ended already, its pod
// looks again.
func (m *Manager) own(id string, uid types.UID) {
	m.mu.Lock()
	ended, w := m.strays[id], m.workers[uid]
	m.owner[id] = uid
	delete(m.strays, id)
	m.mu.Unlock()
	if ended && w != nil {
		w.expectExit(id)
		w.wakeUp()
	}
}

func (m *Manager) disown(id string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.owner, id)
}

// Collect ends what belongs to no pod: sandboxes, containers and folders of
// pods that were removed while this agent did not run. Call it when the
// desired state is whole.
func (m *Manager) Collect(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	orphans := map[types.UID]*corev1.Pod{}
	add := func(labels, annotations map[string]string) {
		uid := types.UID(labels[labelPodUID])
		if uid == "" || orphans[uid] != nil {
			return
		}
		pod := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{UID: uid, Namespace: labels[labelPodNamespace], Name: labels[labelPodName]}}
		// Another may run in its place already, so it gets no more than pods that do not
		// say, and what it said itself is not believed to be a number.
		grace := int64(corev1.DefaultTerminationGracePeriodSeconds)
		if n, err := strconv.ParseInt(annotations[annotationPodGrace], 10, 64); err == nil {
			grace = min(max(n, 0), grace)
		}
		pod.Spec.TerminationGracePeriodSeconds = &grace
		orphans[uid] = pod
	}
	boxes, err := m.cfg.Runtime.ListPodSandbox(ctx, &runtimev1.ListPodSandboxRequest{})
	if err != nil {
		return fmt.Errorf("list sandboxes: %w", err)
	}
	for _, s := range boxes.Items {
		add(s.Labels, s.Annotations)
	}
	list, err := m.cfg.Runtime.ListContainers(ctx, &runtimev1.ListContainersRequest{})
	if err != nil {
		return fmt.Errorf("list containers: %w", err)
	}
	for _, c := range list.Containers {
		add(c.Labels, c.Annotations)
	}
	if err := m.loggedPods(func(namespace, name, uid string) {
		add(map[string]string{labelPodUID: uid, labelPodNamespace: namespace, labelPodName: name}, nil)
	}); err != nil {
		return fmt.Errorf("list folders of logs: %w", err)
	}
	dirs, err := m.volumes.Pods()
	if err != nil {
		return fmt.Errorf("list pod folders: %w", err)
	}
	if m.cfg.Users != nil {
		dirs = append(dirs, m.cfg.Users.Pods()...)
	}
	for _, uid := range dirs {
		if orphans[uid] == nil {
			orphans[uid] = &corev1.Pod{ObjectMeta: metav1.ObjectMeta{UID: uid}}
		}
	}
	m.mu.Lock()
	var made []*worker
	for uid, pod := range orphans {
		if m.workers[uid] == nil {
			w := newWorker(m, pod)
			w.orphan = true
			m.workers[uid] = w
			if m.ctx != nil {
				m.launch(w)
			}
			made = append(made, w)
		}
	}
	m.mu.Unlock()
	for _, w := range made {
		m.log.Info("cleaning up a pod that was removed while this agent was away", "uid", w.uid, "pod", w.name())
		w.change(func(want *want) { want.removed = true })
	}
	return nil
}

// maxLogged is how many folders of logs one Collect looks at. Who may write
// there may make any number of them.
const maxLogged = 10000

// loggedPods calls f with the pods that have a folder of logs.
func (m *Manager) loggedPods(f func(namespace, name, uid string)) error {
	dir, err := hostile.OpenRoot(filepath.Join(m.cfg.Dir, "logs"))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer dir.Close()
	left := maxLogged
	return dir.Names(func(entry string) bool {
		parts := strings.Split(entry, "_")
		// A name that no pod has is not made into a path.
		if len(parts) == 3 && len(validation.IsDNS1123Label(parts[0])) == 0 && len(validation.IsDNS1123Subdomain(parts[1])) == 0 && len(validation.IsDNS1123Label(parts[2])) == 0 {
			f(parts[0], parts[1], parts[2])
			left--
		}
		return left > 0
	})
}

// Pods returns the pods with workers and their last status.
func (m *Manager) Pods() []*corev1.Pod {
	var out []*corev1.Pod
	for _, w := range m.all() {
		if pod := w.snapshot(); pod != nil {
			out = append(out, pod)
		}
	}
	return out
}

// PodByName finds a pod by its name, the newest when there are two.
func (m *Manager) PodByName(namespace, name string) (*corev1.Pod, bool) {
	var found *corev1.Pod
	for _, pod := range m.Pods() {
		if pod.Namespace != namespace || pod.Name != name {
			continue
		}
		if found == nil || pod.CreationTimestamp.After(found.CreationTimestamp.Time) {
			found = pod
		}
	}
	return found, found != nil
}

func notFound(err error) bool { return status.Code(err) == codes.NotFound }

// rpcText is an error's message without gRPC's prefix.
func rpcText(err error) string {
	var se interface{ GRPCStatus() *status.Status }
	if errors.As(err, &se) {
		return se.GRPCStatus().Message()
	}
	return err.Error()
}
