package csi

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"path/filepath"
	"slices"
	"sync"
	"time"

	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	storagev1 "k8s.io/api/storage/v1"
	"k8s.io/apimachinery/pkg/types"
)

// ErrPending marks a volume that is not mounted yet, and of which nothing has failed.
var ErrPending = errors.New("not there yet")

// Objects finds what volumes refer to.
type Objects interface {
	Secret(namespace, name string) (*corev1.Secret, bool)
	CSIDriver(name string) (*storagev1.CSIDriver, bool)
	VolumeAttachment(name string) (*storagev1.VolumeAttachment, bool)
}

// Config is what a manager works with.
type Config struct {
	// Node is this node's name.
	Node string
	// Root is the folder that has pods/ and plugins/, Seen the same folder as drivers
	// have it mounted.
	Root, Seen string
	// Dir is for the records. No driver sees it.
	Dir string
	Objects
	// Live is the Node as the API has it; nil while it is not known.
	Live func() *corev1.Node
	// Tokens asks for a service account token.
	Tokens func(ctx context.Context, namespace, serviceAccount string, tr *authenticationv1.TokenRequest) (*authenticationv1.TokenRequest, error)
	// Grown says that a claim's volume is as large on the node as it is.
	Grown func(ctx context.Context, claim *corev1.PersistentVolumeClaim, volume string, bytes int64) error
	// Drivers hears which drivers there are, and which were since the start.
	Drivers func(node *storagev1.CSINode, gone []string)
	// NodeChanged is called when what Facts returns has changed.
	NodeChanged func()
	// Changed is called when one of a pod's volumes has become another.
	Changed func(pod types.UID)
	Now     func() time.Time
	Logger  *slog.Logger
}

// Request is a pod's volume that is to be mounted.
type Request struct {
	Pod    *corev1.Pod
	Volume string // its name in the pod
	// PV is the claim's volume, nil for one that is the pod's own; Inline says so.
	PV     *corev1.PersistentVolume
	Source *corev1.CSIVolumeSource
	Inline bool
	// Claim is the claim's object; nil while it is not known.
	Claim *corev1.PersistentVolumeClaim
	// ReadOnly is what the pod's use of it says.
	ReadOnly bool
	// Block: the pod has it as a device.
	Block bool
}

// Manager mounts volumes. Its methods are safe for concurrent use.
type Manager struct {
	cfg     Config
	log     *slog.Logger
	records records

	mu      sync.Mutex
	ctx     context.Context // of Run; nil before
	wg      sync.WaitGroup
	drivers map[string]*driver
	gone    map[string]bool // drivers that were here
	volumes map[key]*volume
	byUser  map[user]key
	inUse   []corev1.UniqueVolumeName // as it was said last
}

// volume is one volume of a driver, with the goroutine that works on it, if one does.
type volume struct {
	key
	state
	busy  bool
	put   map[deed]backOff
	why   map[user]string // the last failure
	due   map[user]time.Time
	timer *time.Timer
	stats map[user]*measured
	moved chan struct{} // closed when it has become another
}

// New returns a manager that knows what the one before it left, and does nothing until Run.
func New(cfg Config) *Manager {
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.Default()
	}
	m := &Manager{
		cfg: cfg, log: cfg.Logger.With("component", "csi"), records: records{cfg.Dir},
		drivers: map[string]*driver{}, gone: map[string]bool{}, volumes: map[key]*volume{}, byUser: map[user]key{},
	}
	staged, published, err := m.records.load()
	if err != nil {
		m.log.Error("records of CSI volumes are damaged; what they were of is not taken back", "error", err)
	}
	for _, rec := range staged {
		if rec.Done && rec.Mounted && !mounted(cfg.Root, rec.Path) {
			rec.Done = false // the machine was started anew
		}
		m.volume(rec.key).staged = rec
	}
	for _, rec := range published {
		if rec.Done && rec.Mounted && !mounted(cfg.Root, rec.Path) {
			rec.Done = false
		}
		m.volume(rec.key).uses[rec.user] = use{rec: rec, left: true}
		m.byUser[rec.user] = rec.key
	}
	m.inUse = m.used()
	return m
}

// volume returns a volume, made if it is not known. m.mu is held.
func (m *Manager) volume(k key) *volume {
	v := m.volumes[k]
	if v == nil {
		v = &volume{
			key: k, state: state{uses: map[user]use{}}, put: map[deed]backOff{}, why: map[user]string{},
			due: map[user]time.Time{}, moved: make(chan struct{}),
		}
		m.volumes[k] = v
	}
	return v
}

// Run works until ctx ends. What is mounted stays.
func (m *Manager) Run(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	m.mu.Lock()
	m.ctx = ctx
	// What was staged for pods that are no more is unstaged; what pods had waits for
	// them, or for their folders' removal.
	for _, v := range m.volumes {
		m.kick(v)
	}
	m.mu.Unlock()
	<-ctx.Done()
	cancel()
	m.mu.Lock()
	for _, v := range m.volumes {
		if v.timer != nil {
			v.timer.Stop()
		}
	}
	for _, d := range m.drivers {
		d.close()
	}
	m.mu.Unlock()
	m.wg.Wait()
	return nil
}

// Mount says where a pod's volume is, and when to ask again though nothing changed; zero:
// never. If it is not there, the error says why, and the pod is woken when that changes:
// [ErrPending], or what has failed last.
func (m *Manager) Mount(r Request) (path string, again time.Time, err error) {
	u := user{r.Pod.UID, r.Volume}
	k := r.key()
	if err := errors.Join(checkKey(k), checkUser(u)); err != nil {
		return "", again, failure(&r, "MountVolume.SetUp", err.Error())
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if had, ok := m.byUser[u]; ok && had != k {
		return "", again, failure(&r, "MountVolume.SetUp", fmt.Sprintf("the pod has volume %s of driver %s by that name", had.Handle, had.Driver))
	}
	v := m.volume(k)
	m.byUser[u] = k
	e, now := v.uses[u], m.cfg.Now()
	e.want, e.left = &r, false
	if e.rec != nil && e.rec.Done {
		if every := m.republish(&r); every > 0 {
			if v.due[u].IsZero() {
				v.due[u] = now.Add(every)
			}
			if !now.Before(v.due[u]) {
				e.again, v.due[u] = true, now.Add(every)
			}
			again = v.due[u]
		}
		e.grow = growth(&r, e.rec)
	}
	v.uses[u] = e
	m.kick(v)
	m.tellUsed()
	if e.rec != nil && e.rec.Done {
		return filepath.Join(m.cfg.Root, e.rec.Path), again, nil
	}
	f := m.facts(v)
	if f.absent != "" {
		return "", again, failure(&r, "MountVolume.SetUp", f.absent)
	}
	if why := v.why[u]; why != "" {
		return "", again, failureOf(why)
	}
	if why := f.blocked[u]; why != "" {
		return "", again, fmt.Errorf("%s: %w", why, ErrPending)
	}
	return "", again, fmt.Errorf("driver %s mounts it: %w", k.Driver, ErrPending)
}

// releasePatience is for how long Release waits for drivers before its caller asks again.
const releasePatience = 5 * time.Second

// Release takes a pod's volumes back. Nothing of the pod may use them any more. An error
// says what is still there, and that it is to be called again.
func (m *Manager) Release(ctx context.Context, uid types.UID) error {
	timer := time.NewTimer(releasePatience)
	defer timer.Stop()
	for {
		m.mu.Lock()
		var left *volume
		var of user
		for u, k := range m.byUser {
			if u.UID != uid {
				continue
			}
			v := m.volumes[k]
			e := v.uses[u]
			if e.want != nil {
				delete(v.why, u) // that was of mounting it
			}
			e.want, e.left, e.again, e.grow = nil, false, false, 0
			if v.uses[u] = e; e.rec == nil && !v.busy {
				m.forget(v, u)
				m.kick(v)
				continue
			}
			m.kick(v)
			left, of = v, u
		}
		m.tellUsed()
		if left == nil {
			m.mu.Unlock()
			return nil
		}
		why, moved, absent := left.why[of], left.moved, m.facts(left).absent
		m.mu.Unlock()
		switch {
		case absent != "":
			return fmt.Errorf("UnmountVolume.TearDown failed for volume %q : %s", of.Volume, absent)
		case why != "":
			return errors.New(why)
		}
		select {
		case <-moved:
		case <-timer.C:
			return fmt.Errorf("volume %s: driver %s is being asked to unpublish it: %w", of.Volume, left.Driver, ErrPending)
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// Pods are those that have, or may have, volumes.
func (m *Manager) Pods() []types.UID {
	m.mu.Lock()
	defer m.mu.Unlock()
	uids := map[types.UID]bool{}
	for u := range m.byUser {
		uids[u.UID] = true
	}
	return slices.Collect(maps.Keys(uids))
}

// Look looks again at all volumes: at what they wait for, something has changed.
func (m *Manager) Look() {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, v := range m.volumes {
		m.kick(v)
	}
}

// kick starts the next deed of a volume, if there is one to do now. m.mu is held.
func (m *Manager) kick(v *volume) {
	if m.ctx == nil || m.ctx.Err() != nil || v.busy {
		return
	}
	d, wake := plan(&v.state, m.facts(v), v.put, m.cfg.Now())
	if v.timer != nil {
		v.timer.Stop()
		v.timer = nil
	}
	if d.kind == nothing {
		if !wake.IsZero() {
			v.timer = time.AfterFunc(max(time.Millisecond, wake.Sub(m.cfg.Now())), func() {
				m.mu.Lock()
				defer m.mu.Unlock()
				m.kick(v)
			})
		} else if len(v.uses) == 0 && v.staged == nil && m.volumes[v.key] == v {
			delete(m.volumes, v.key)
		}
		return
	}
	v.busy = true
	drv, e := m.drivers[v.Driver], v.uses[d.user]
	job := job{deed: d, key: v.key, driver: drv, want: e.want, grow: e.grow}
	if v.staged != nil {
		job.staged = new(*v.staged)
	}
	if e.rec != nil {
		job.rec = new(*e.rec)
	}
	m.wg.Go(func() { m.work(v, job) })
}

// work does one deed, and notes what came of it.
func (m *Manager) work(v *volume, j job) {
	err := m.do(m.ctx, &j)
	m.mu.Lock()
	defer m.mu.Unlock()
	v.busy = false
	v.staged = j.staged
	e := v.uses[j.user]
	e.rec = j.rec
	switch {
	case m.ctx.Err() != nil:
		return
	case err != nil:
		p := j.putOff()
		v.put[p] = v.put[p].after(m.cfg.Now())
		m.log.Warn("volume", "deed", string(j.kind), "driver", v.Driver, "volume", v.Handle, "pod", j.user.UID, "again", v.put[p].delay, "error", err)
		if j.kind == unstage {
			break
		}
		v.why[j.user] = err.Error()
		if j.kind == publish && e.again {
			e.again = false // it stays as it is until its time comes again
		}
		v.uses[j.user] = e
	default:
		m.log.Debug("volume", "deed", string(j.kind), "driver", v.Driver, "volume", v.Handle, "pod", j.user.UID)
		delete(v.put, j.putOff())
		if j.kind == unstage {
			break
		}
		delete(v.why, j.user)
		if j.kind == publish {
			e.again = false
		}
		if j.kind == expand {
			e.grow = 0
		}
		v.uses[j.user] = e
		if e.rec == nil && e.want == nil {
			m.forget(v, j.user)
		}
	}
	m.kick(v)
	m.wake(v)
	m.tellUsed()
}

// forget drops a pod's volume of which nothing is left. m.mu is held.
func (m *Manager) forget(v *volume, u user) {
	delete(v.uses, u)
	delete(v.why, u)
	delete(v.due, u)
	delete(v.stats, u)
	delete(m.byUser, u)
	for d := range v.put {
		if d.user == u {
			delete(v.put, d)
		}
	}
}

// wake wakes whoever waits for a volume. m.mu is held.
func (m *Manager) wake(v *volume) {
	close(v.moved)
	v.moved = make(chan struct{})
	if m.cfg.Changed == nil || m.ctx == nil || m.ctx.Err() != nil {
		return
	}
	uids := map[types.UID]bool{}
	for u, e := range v.uses {
		if e.want != nil {
			uids[u.UID] = true
		}
	}
	if len(uids) == 0 {
		return
	}
	m.wg.Go(func() { // it may call back
		for uid := range uids {
			m.cfg.Changed(uid)
		}
	})
}

// facts are what a volume depends on now. m.mu is held.
func (m *Manager) facts(v *volume) facts {
	d := m.drivers[v.Driver]
	if d == nil || !d.ready {
		return facts{absent: fmt.Sprintf("driver name %s not found in the list of registered CSI drivers", v.Driver)}
	}
	f := facts{stages: d.can.stage, blocked: map[user]string{}}
	for u, e := range v.uses {
		if e.want == nil || e.rec != nil && e.rec.Done {
			continue
		}
		if why := m.blocked(v.key, e.want); why != "" {
			f.blocked[u] = why
		}
	}
	return f
}
