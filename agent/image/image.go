package image

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"time"

	"github.com/distribution/reference"
	"google.golang.org/grpc/status"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"
	runtimev1 "k8s.io/cri-api/pkg/apis/runtime/v1"
	"k8s.io/kubernetes/pkg/credentialprovider"

	"timonel/internal/fair"
)

// Waiting reasons, as the kubelet's.
const (
	ReasonNeverPull   = "ErrImageNeverPull"
	ReasonPull        = "ErrImagePull"
	ReasonBackOff     = "ImagePullBackOff"
	ReasonInvalidName = "InvalidImageName"
	ReasonInspect     = "ImageInspectError"
)

const (
	firstBackOff = 10 * time.Second
	maxBackOff   = 300 * time.Second
	// errorShown is for how long a failure is reported as itself before it
	// becomes a back-off.
	errorShown = 2 * time.Second
	// roomEvery is how often it is looked whether there is room for what is being pulled.
	roomEvery = time.Second
)

// State is where an image is.
type State int

// The states of an image for one container.
const (
	Ready   State = iota + 1
	Pulling       // or being imported
	Failed
)

// Request is one container's wish for its image.
type Request struct {
	Pod       *corev1.Pod
	Container *corev1.Container
	// Secrets are the pod's pull secrets that exist.
	Secrets []*corev1.Secret
	// Sandbox is the pod's, for the runtime.
	Sandbox *runtimev1.PodSandboxConfig
	// Changed is called, from another goroutine, when a pull has ended.
	Changed func()
	// Event tells the pod's owner what happened.
	Event func(eventType, reason, message string)
}

// Result is what is so now.
type Result struct {
	State   State
	ID      string // the image to start, when Ready
	Reason  string // when Failed
	Message string
	Retry   time.Time // when Failed: when to ask again; zero: only when something changes
}

// Manager knows the pulls of one node.
type Manager struct {
	images runtimev1.ImageServiceClient
	coming func() bool
	now    func() time.Time
	log    *slog.Logger
	slots  *fair.Room
	full   func() error // nil: it never is

	mu    sync.Mutex
	pulls map[pullKey]*pull
}

type pullKey struct {
	pod       types.UID
	container string
	image     string
}

type pull struct {
	running bool
	done    bool // pulled, not used yet
	err     string
	failed  time.Time
	backOff time.Duration
}

// New returns a manager that pulls through CRI. coming, if it is not nil, says that images
// are being imported: one that is not here may be among them and is waited for, where its
// policy is not to pull it always. Whoever waits asks again when an image has come, and
// when all have.
func New(images runtimev1.ImageServiceClient, coming func() bool, now func() time.Time, log *slog.Logger) *Manager {
	if coming == nil {
		coming = func() bool { return false }
	}
	return &Manager{images: images, coming: coming, now: now, log: log, slots: newSlots(), pulls: map[pullKey]*pull{}}
}

// StopWhen has no image pulled while full says why not, for the disk is full, and stops those
// that are being pulled: a few bytes of a registry become as many on the disk as it likes. Call
// it before the first Ensure.
func (m *Manager) StopWhen(full func() error) { m.full = full }

// Forget drops what is known about the pulls of a pod that is gone.
func (m *Manager) Forget(pod types.UID) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for k := range m.pulls {
		if k.pod == pod {
			delete(m.pulls, k)
		}
	}
}

// Appeared ends all back-offs for an image that was just imported.
func (m *Manager) Appeared(name string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for k, p := range m.pulls {
		if normal, err := Normalize(k.image); err == nil && normal == name && !p.running {
			delete(m.pulls, k)
		}
	}
}

// Normalize gives the full form of an image's name, as CRI uses it:
// "timonel/sample" is docker.io/timonel/sample:latest.
func Normalize(name string) (string, error) {
	ref, err := reference.ParseDockerRef(name)
	if err != nil {
		return "", err
	}
	return ref.String(), nil
}

// Ensure says whether a container's image can be started, and starts a pull
// when its policy asks for one.
func (m *Manager) Ensure(ctx context.Context, req Request) Result {
	name := req.Container.Image
	normal, err := Normalize(name)
	if err != nil {
		msg := fmt.Sprintf("Failed to apply default image tag %q: %v", name, err)
		req.Event(corev1.EventTypeWarning, "InspectFailed", msg)
		return Result{State: Failed, Reason: ReasonInvalidName, Message: msg}
	}
	key := pullKey{req.Pod.UID, req.Container.Name, name}
	m.mu.Lock()
	p := m.pulls[key]
	if p != nil && p.running {
		defer m.mu.Unlock()
		if p.err != "" { // the attempt before failed
			return Result{State: Failed, Reason: ReasonBackOff, Message: backOffMessage(name, p.err)}
		}
		return Result{State: Pulling}
	}
	fresh := p != nil && p.done
	if fresh {
		delete(m.pulls, key)
	}
	m.mu.Unlock()

	coming := m.coming() // before it is looked for: what has come by then is found
	id, err := m.present(ctx, normal)
	if err != nil {
		return Result{State: Failed, Reason: ReasonInspect, Message: fmt.Sprintf("Failed to inspect image %q: %v", name, err), Retry: m.now().Add(errorShown)}
	}
	policy := req.Container.ImagePullPolicy
	switch {
	case id != "" && (fresh || policy != corev1.PullAlways):
		if !fresh {
			req.Event(corev1.EventTypeNormal, "Pulled", fmt.Sprintf("Container image %q already present on machine", name))
		}
		m.mu.Lock()
		delete(m.pulls, key)
		m.mu.Unlock()
		return Result{State: Ready, ID: id}
	case coming && policy != corev1.PullAlways:
		return Result{State: Pulling}
	case policy == corev1.PullNever:
		msg := fmt.Sprintf("Container image %q is not present with pull policy of Never", name)
		if m.firstFailure(key, msg) {
			req.Event(corev1.EventTypeWarning, "ErrImageNeverPull", msg)
		}
		return Result{State: Failed, Reason: ReasonNeverPull, Message: msg}
	}
	return m.pull(ctx, key, normal, req)
}

// present returns the id of an image on this node, "" when it is not here.
func (m *Manager) present(ctx context.Context, normal string) (string, error) {
	resp, err := m.images.ImageStatus(ctx, &runtimev1.ImageStatusRequest{Image: &runtimev1.ImageSpec{Image: normal}})
	if err != nil {
		return "", err
	}
	if resp.Image == nil {
		return "", nil
	}
	return resp.Image.Id, nil
}

func (m *Manager) firstFailure(key pullKey, msg string) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	if p := m.pulls[key]; p != nil && p.err == msg {
		return false
	}
	m.pulls[key] = &pull{err: msg, failed: m.now()}
	return true
}

func backOffMessage(name, err string) string {
	return fmt.Sprintf("Back-off pulling image %q: %s: %s", name, ReasonPull, err)
}

// pull starts a pull, or says for how long it is put off.
func (m *Manager) pull(ctx context.Context, key pullKey, normal string, req Request) Result {
	name := req.Container.Image
	now := m.now()
	m.mu.Lock()
	defer m.mu.Unlock()
	p := m.pulls[key]
	if p == nil {
		p = &pull{}
		m.pulls[key] = p
	}
	if p.backOff > 0 {
		retry := p.failed.Add(p.backOff)
		if now.Before(p.failed.Add(errorShown)) {
			return Result{State: Failed, Reason: ReasonPull, Message: p.err, Retry: p.failed.Add(errorShown)}
		}
		if now.Before(retry) {
			req.Event(corev1.EventTypeNormal, "BackOff", fmt.Sprintf("Back-off pulling image %q", name))
			return Result{State: Failed, Reason: ReasonBackOff, Message: backOffMessage(name, p.err), Retry: retry}
		}
	}
	p.running = true
	req.Event(corev1.EventTypeNormal, "Pulling", fmt.Sprintf("Pulling image %q", name))
	go m.run(ctx, p, normal, req)
	if p.err != "" {
		return Result{State: Failed, Reason: ReasonBackOff, Message: backOffMessage(name, p.err)}
	}
	return Result{State: Pulling}
}

// run pulls one image; it ends with ctx, the pod's.
func (m *Manager) run(ctx context.Context, p *pull, normal string, req Request) {
	name := req.Container.Image
	began := m.now()
	err := m.pullInTurn(ctx, normal, req)
	m.mu.Lock()
	p.running = false
	if err == nil {
		p.done, p.err, p.backOff = true, "", 0
	} else {
		p.err, p.failed = errText(err), m.now()
		p.backOff = min(max(firstBackOff, p.backOff*2), maxBackOff)
	}
	m.mu.Unlock()
	if ctx.Err() != nil {
		return
	}
	if err == nil {
		req.Event(corev1.EventTypeNormal, "Pulled", fmt.Sprintf("Successfully pulled image %q in %s", name, m.now().Sub(began).Round(time.Millisecond)))
	} else {
		req.Event(corev1.EventTypeWarning, "Failed", fmt.Sprintf("Failed to pull image %q: %s", name, errText(err)))
		req.Event(corev1.EventTypeWarning, "Failed", "Error: "+ReasonPull)
	}
	req.Changed()
}

// pullInTurn waits for a slot. An image that came while it waited is not pulled again, but
// for whoever wants it pulled always.
func (m *Manager) pullInTurn(ctx context.Context, normal string, req Request) error {
	give, err := m.slots.Take(ctx, req.Pod.Namespace, 1)
	if err != nil {
		return err
	}
	defer give()
	if req.Container.ImagePullPolicy != corev1.PullAlways {
		if id, err := m.present(ctx, normal); err == nil && id != "" {
			return nil
		}
	}
	if m.full == nil {
		return m.pullWith(ctx, normal, req)
	}
	if err := m.full(); err != nil {
		return err
	}
	ctx, stop := context.WithCancelCause(ctx)
	watched := make(chan struct{})
	go func() {
		defer close(watched)
		m.watchRoom(ctx, stop)
	}()
	err = m.pullWith(ctx, normal, req)
	why := context.Cause(ctx)
	stop(nil)
	<-watched
	if err != nil && why != nil {
		return why
	}
	return err
}

// watchRoom stops a pull when the disk is full, and returns when it has ended.
func (m *Manager) watchRoom(ctx context.Context, stop context.CancelCauseFunc) {
	tick := time.NewTicker(roomEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		if err := m.full(); err != nil {
			stop(err)
			return
		}
	}
}

// pullWith tries each of the pod's credentials for the registry in turn, and
// without any when there are none.
func (m *Manager) pullWith(ctx context.Context, normal string, req Request) error {
	auths, err := Credentials(req.Secrets, normal)
	if err != nil {
		return err
	}
	if len(auths) == 0 {
		auths = []*runtimev1.AuthConfig{nil}
	}
	for _, auth := range auths {
		_, err = m.images.PullImage(ctx, &runtimev1.PullImageRequest{
			Image: &runtimev1.ImageSpec{Image: normal}, Auth: auth, SandboxConfig: req.Sandbox,
		})
		if err == nil {
			return nil
		}
	}
	return err
}

// Credentials picks from pull secrets what may open an image's registry, the
// most specific first. A secret that cannot be read is an error: pulling
// without it would only hide that.
func Credentials(secrets []*corev1.Secret, normal string) ([]*runtimev1.AuthConfig, error) {
	ring := &credentialprovider.BasicDockerKeyring{}
	for _, s := range secrets {
		var cfg credentialprovider.DockerConfig
		switch {
		case s.Type == corev1.SecretTypeDockerConfigJson || len(s.Data[corev1.DockerConfigJsonKey]) > 0:
			var doc credentialprovider.DockerConfigJSON
			if err := json.Unmarshal(s.Data[corev1.DockerConfigJsonKey], &doc); err != nil {
				return nil, fmt.Errorf("pull secret %s/%s: key %s: %w", s.Namespace, s.Name, corev1.DockerConfigJsonKey, err)
			}
			cfg = doc.Auths
		case s.Type == corev1.SecretTypeDockercfg:
			if err := json.Unmarshal(s.Data[corev1.DockerConfigKey], &cfg); err != nil {
				return nil, fmt.Errorf("pull secret %s/%s: key %s: %w", s.Namespace, s.Name, corev1.DockerConfigKey, err)
			}
		default:
			return nil, fmt.Errorf("pull secret %s/%s has type %q, wanted %s", s.Namespace, s.Name, s.Type, corev1.SecretTypeDockerConfigJson)
		}
		ring.Add(nil, cfg)
	}
	repo := normal
	if ref, err := reference.ParseDockerRef(normal); err == nil {
		repo = ref.Name()
	}
	found, _ := ring.Lookup(repo)
	var out []*runtimev1.AuthConfig
	for _, c := range found {
		out = append(out, &runtimev1.AuthConfig{
			Username: c.Username, Password: c.Password, Auth: c.Auth,
			ServerAddress: c.ServerAddress, IdentityToken: c.IdentityToken, RegistryToken: c.RegistryToken,
		})
	}
	return out, nil
}

// maxErrText bounds what is kept of an error. A registry may answer with as much
// as it likes, and it goes to a status and to events.
const maxErrText = 2048

// errText is an error's message without gRPC's prefix.
func errText(err error) string {
	text := err.Error()
	if s, ok := status.FromError(err); ok {
		text = strings.TrimSpace(s.Message())
	}
	if len(text) > maxErrText {
		text = text[:maxErrText] + " ..."
	}
	return strings.ToValidUTF8(text, "")
}
