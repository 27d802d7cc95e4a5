package logs

import (
	"context"
	"log/slog"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtimev1 "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// Logs are the logs of a node's containers.
type Logs struct {
	cfg     Config
	log     *slog.Logger
	notify  *notifier     // nil: files are looked at now and then instead
	packing chan struct{} // holds who compresses
	calls   chan struct{} // holds who asks containerd at start
	again   chan struct{}

	mu         sync.Mutex
	ctx        context.Context // of Run; nil before
	wg         sync.WaitGroup
	logs       map[string]*log       // those that somebody rotates or reads
	containers map[string]*container // by id
	buried     map[string]bool       // ended, and brought to what they may be
}

// New returns logs that can be read; they are rotated once Run runs.
func New(cfg Config) (*Logs, error) {
	cfg.SetDefaults()
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	s := &Logs{
		cfg: cfg, log: cfg.Logger.With("component", "logs"),
		packing: make(chan struct{}, 1), calls: make(chan struct{}, 4), again: make(chan struct{}, 1),
		logs: map[string]*log{}, containers: map[string]*container{}, buried: map[string]bool{},
	}
	var err error
	if s.notify, err = newNotifier(); err != nil {
		s.log.Warn("logs are looked at more often than they would have to be", "error", err)
	}
	return s, nil
}

// resyncInterval is how often containers are listed, should an event have been
// missed.
const resyncInterval = 5 * time.Minute

// Run rotates logs until ctx ends.
func (s *Logs) Run(ctx context.Context) error {
	if s.notify != nil {
		stopped := make(chan error, 1)
		go func() { stopped <- s.notify.run() }()
		defer func() {
			s.notify.close()
			if err := <-stopped; err != nil {
				s.log.Error("logs are not watched any more", "error", err)
			}
		}()
	}
	if s.cfg.MaxSize < 0 {
		<-ctx.Done()
		return nil
	}
	s.mu.Lock()
	s.ctx = ctx
	s.mu.Unlock()
	defer s.wg.Wait()
	s.Resync()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-s.again:
		case <-time.After(resyncInterval):
		}
		if err := s.sync(ctx); err != nil && ctx.Err() == nil {
			s.log.Warn("list containers to rotate their logs; trying again", "error", err)
			select {
			case <-ctx.Done():
			case <-time.After(time.Second):
				s.Resync()
			}
		}
	}
}

// Resync makes Run look for containers that started or ended unnoticed.
func (s *Logs) Resync() {
	select {
	case s.again <- struct{}{}:
	default:
	}
}

// Started takes that a container runs. It does not block.
func (s *Logs) Started(id string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.track(id)
}

// Ended takes that a container has ended. It does not block.
func (s *Logs) Ended(id string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.end(id)
}

// track begins to look at a container's log, if that is new. s.mu is held.
func (s *Logs) track(id string) *container {
	if c := s.containers[id]; c != nil || s.ctx == nil || s.ctx.Err() != nil {
		return c
	}
	c := &container{s: s, id: id, ended: make(chan struct{}), wake: make(chan struct{}, 1)}
	s.containers[id] = c
	s.wg.Add(1)
	go func() {
		defer s.wg.Done()
		c.run(s.ctx)
		s.mu.Lock()
		defer s.mu.Unlock()
		delete(s.containers, id)
	}()
	return c
}

// end has a container looked at for the last time. s.mu is held.
func (s *Logs) end(id string) {
	if c := s.track(id); c != nil && !c.over {
		c.over = true
		close(c.ended)
	}
}

// sync compares what is looked at with what CRI lists.
func (s *Logs) sync(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, reopenTimeout)
	defer cancel()
	s.mu.Lock()
	before := make([]string, 0, len(s.containers))
	for id := range s.containers {
		before = append(before, id)
	}
	s.mu.Unlock()
	resp, err := s.cfg.Runtime.ListContainers(ctx, &runtimev1.ListContainersRequest{})
	if err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	listed, buried := map[string]bool{}, map[string]bool{}
	for _, c := range resp.Containers {
		listed[c.Id] = true
		switch c.State {
		case runtimev1.ContainerState_CONTAINER_RUNNING:
			s.track(c.Id)
		case runtimev1.ContainerState_CONTAINER_EXITED:
			buried[c.Id] = true
			if !s.buried[c.Id] {
				s.end(c.Id)
			}
		}
	}
	s.buried = buried
	for _, id := range before {
		if !listed[id] {
			if c := s.containers[id]; c != nil {
				s.end(id)
			}
		}
	}
	return nil
}

// rel is the name of a container's log below the folder of all logs; "": it has
// none there.
func (s *Logs) rel(ctx context.Context, id string) (string, error) {
	select {
	case s.calls <- struct{}{}:
		defer func() { <-s.calls }()
	case <-ctx.Done():
		return "", ctx.Err()
	}
	ctx, cancel := context.WithTimeout(ctx, reopenTimeout)
	defer cancel()
	resp, err := s.cfg.Runtime.ContainerStatus(ctx, &runtimev1.ContainerStatusRequest{ContainerId: id})
	if status.Code(err) == codes.NotFound { // a sandbox, or removed
		return "", nil
	}
	if err != nil {
		return "", err
	}
	return s.below(resp.Status.GetLogPath()), nil
}

// below is the name of a path below the folder of all logs, "" when it is none.
func (s *Logs) below(path string) string {
	rel, err := filepath.Rel(s.cfg.Dir, path)
	if err != nil || !filepath.IsLocal(rel) || strings.Count(rel, "/") != Depth-1 {
		return ""
	}
	return rel
}

// hold returns the one log of that name. Each hold has its release.
func (s *Logs) hold(rel string) *log {
	s.mu.Lock()
	defer s.mu.Unlock()
	l := s.logs[rel]
	if l == nil {
		l = &log{s: s, rel: rel, readers: map[*source]struct{}{}, rotated: make(chan struct{})}
		s.logs[rel] = l
	}
	l.refs++
	return l
}

func (s *Logs) release(l *log) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if l.refs--; l.refs == 0 {
		delete(s.logs, l.rel)
	}
}

func (s *Logs) warn(rel, what string, err error) {
	s.log.Warn(what, "log", rel, "error", err)
}
