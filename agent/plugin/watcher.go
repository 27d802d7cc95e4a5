package plugin

import (
	"context"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"time"

	"github.com/fsnotify/fsnotify"
	"golang.org/x/sys/unix"

	"timonel/agent/hostile"
)

const (
	// maxSockets bounds how many plugins a node has.
	maxSockets = 128
	// settle is how long after a change the folder is looked at: a registrar makes its
	// socket a moment before it serves it.
	settle = 50 * time.Millisecond
	// relook is when the folder is looked at though nothing was said of it.
	relook = 30 * time.Second

	firstDelay = 500 * time.Millisecond
	lastDelay  = 2*time.Minute + 2*time.Second
)

// Plugin is what registered.
type Plugin struct {
	// Socket is the name of its registration socket in the watched folder.
	Socket string
	// Type and Name are what it says it is, Endpoint is the path of the socket where it
	// serves what its type is for, as it sees it. Empty: the registration socket.
	Type, Name, Endpoint string
	Versions             []string
}

// Handler takes plugins of a type. It is called from several goroutines.
type Handler interface {
	// Register takes a plugin, or says why it does not.
	Register(ctx context.Context, p Plugin) error
	// Deregister hears that a plugin that was taken has gone.
	Deregister(p Plugin)
}

// Config is what a watcher works with.
type Config struct {
	// Dir is plugins_registry. It is made when it is missing.
	Dir      string
	Handlers map[string]Handler // by type
	Logger   *slog.Logger
}

// Watcher looks who is in the folder.
type Watcher struct {
	cfg Config
	log *slog.Logger

	mu      sync.Mutex
	sockets map[string]*socket
	wake    chan struct{}
}

// identity tells a socket from one of the same name that was made after it.
type identity struct {
	dev, ino   uint64
	changedSec int64
	changedNs  int64
}

// socket is one that is in the folder.
type socket struct {
	name string
	is   identity
	stop context.CancelFunc
	done chan struct{} // its goroutine has ended
}

// New returns a watcher that does nothing until Run.
func New(cfg Config) *Watcher {
	if cfg.Logger == nil {
		cfg.Logger = slog.Default()
	}
	return &Watcher{cfg: cfg, log: cfg.Logger.With("component", "plugins"), sockets: map[string]*socket{}, wake: make(chan struct{}, 1)}
}

// Run registers who comes and drops who goes, until ctx ends. Those that are registered
// by then are not deregistered: they go on.
func (w *Watcher) Run(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()
	root, err := hostile.MakeRoot(w.cfg.Dir, 0o755)
	if err != nil {
		return fmt.Errorf("make the folder where plugins register: %w", err)
	}
	defer root.Close()
	events, err := fsnotify.NewWatcher()
	if err != nil {
		return fmt.Errorf("watch %s: %w", w.cfg.Dir, err)
	}
	defer events.Close()
	if err := events.Add(w.cfg.Dir); err != nil {
		return fmt.Errorf("watch %s: %w", w.cfg.Dir, err)
	}
	timer := time.NewTimer(0)
	defer timer.Stop()
	due := time.Now()
	soon := func(d time.Duration) {
		if at := time.Now().Add(d); at.Before(due) {
			due = at
			timer.Reset(d)
		}
	}
	for {
		select {
		case <-ctx.Done():
			return nil
		case _, ok := <-events.Events:
			if !ok {
				return fmt.Errorf("watch %s: it ended", w.cfg.Dir)
			}
			soon(settle)
		case err := <-events.Errors: // what was lost is found by looking
			w.log.Warn("watch the folder where plugins register", "error", err)
			soon(settle)
		case <-w.wake:
			soon(settle)
		case <-timer.C:
			w.look(ctx, root, &wg)
			due = time.Now().Add(relook)
			timer.Reset(relook)
		}
	}
}

// look compares what is in the folder with what is known.
func (w *Watcher) look(ctx context.Context, root *hostile.Root, wg *sync.WaitGroup) {
	found := map[string]identity{}
	err := root.Names(func(name string) bool {
		if strings.HasPrefix(name, ".") {
			return true
		}
		st, is, err := root.IsSocket(name)
		if err == nil && is {
			found[name] = identityOf(&st)
		}
		return len(found) < maxSockets
	})
	if err != nil {
		w.log.Warn("look for plugins", "error", err)
		return
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	for name, s := range w.sockets {
		if is, ok := found[name]; ok && is == s.is {
			continue
		}
		s.stop()
		select {
		case <-s.done:
			delete(w.sockets, name)
		default: // it is being told so; the next look takes the one in its place
			delete(found, name)
			wg.Go(func() {
				<-s.done
				w.again()
			})
		}
	}
	for name, is := range found {
		if w.sockets[name] != nil {
			continue
		}
		of, stop := context.WithCancel(ctx)
		s := &socket{name: name, is: is, stop: stop, done: make(chan struct{})}
		w.sockets[name] = s
		wg.Go(func() {
			defer close(s.done)
			defer stop()
			w.serve(of, ctx, s)
		})
	}
}

func (w *Watcher) again() {
	select {
	case w.wake <- struct{}{}:
	default:
	}
}

// serve registers what is behind a socket, again until it is taken, and drops it when the
// socket has gone: when of ends and the watcher, whose context is run, goes on.
func (w *Watcher) serve(of, run context.Context, s *socket) {
	for delay := time.Duration(0); ; {
		p, h, err := w.register(of, s.name)
		if of.Err() != nil && err != nil {
			return
		}
		if err == nil {
			w.log.Info("plugin registered", "type", p.Type, "name", p.Name, "socket", s.name)
			<-of.Done()
			if run.Err() == nil {
				w.log.Info("plugin has gone", "type", p.Type, "name", p.Name, "socket", s.name)
				h.Deregister(p)
			}
			return
		}
		delay = min(max(firstDelay, delay*2), lastDelay)
		w.log.Warn("plugin is not registered", "socket", s.name, "again", delay, "error", err)
		timer := time.NewTimer(delay)
		select {
		case <-of.Done():
			timer.Stop()
			return
		case <-timer.C:
		}
	}
}

func identityOf(st *unix.Stat_t) identity {
	return identity{uint64(st.Dev), st.Ino, st.Ctim.Sec, st.Ctim.Nsec}
}
