package plugin

import (
	"context"
	"errors"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"google.golang.org/grpc"
	registration "k8s.io/kubelet/pkg/apis/pluginregistration/v1"
)

// handler keeps what it was told, in order.
type handler struct {
	mu     sync.Mutex
	told   []string
	refuse error
}

func (h *handler) say(what string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.told = append(h.told, what)
}

func (h *handler) Register(_ context.Context, p Plugin) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.refuse != nil {
		return h.refuse
	}
	h.told = append(h.told, "+"+p.Name+" "+p.Endpoint+" "+strings.Join(p.Versions, ","))
	return nil
}

func (h *handler) Deregister(p Plugin) { h.say("-" + p.Name) }

func (h *handler) all() []string {
	h.mu.Lock()
	defer h.mu.Unlock()
	return slices.Clone(h.told)
}

// registrar is a plugin's side.
type registrar struct {
	registration.UnimplementedRegistrationServer
	info   *registration.PluginInfo
	hang   bool
	mu     sync.Mutex
	status []*registration.RegistrationStatus
}

func (r *registrar) GetInfo(ctx context.Context, _ *registration.InfoRequest) (*registration.PluginInfo, error) {
	if r.hang {
		<-ctx.Done()
		return nil, ctx.Err()
	}
	return r.info, nil
}

func (r *registrar) NotifyRegistrationStatus(_ context.Context, s *registration.RegistrationStatus) (*registration.RegistrationStatusResponse, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.status = append(r.status, s)
	return &registration.RegistrationStatusResponse{}, nil
}

func (r *registrar) last() *registration.RegistrationStatus {
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.status) == 0 {
		return nil
	}
	return r.status[len(r.status)-1]
}

// serve makes the registrar's socket; what it returns ends it and removes the socket.
func (r *registrar) serve(t *testing.T, path string) (stop func()) {
	t.Helper()
	l, err := net.Listen("unix", path)
	require.NoError(t, err)
	s := grpc.NewServer()
	registration.RegisterRegistrationServer(s, r)
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = s.Serve(l)
	}()
	var once sync.Once
	stop = func() { once.Do(func() { s.Stop(); <-done }) }
	t.Cleanup(stop)
	return stop
}

func watch(t *testing.T, h Handler) (dir string) {
	t.Helper()
	dir = filepath.Join(t.TempDir(), "r") // short: a socket's path has 108 bytes
	w := New(Config{Dir: dir, Handlers: map[string]Handler{registration.CSIPlugin: h}})
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- w.Run(ctx) }()
	t.Cleanup(func() { cancel(); require.NoError(t, <-done) })
	require.Eventually(t, func() bool { _, err := os.Stat(dir); return err == nil }, 10*time.Second, time.Millisecond)
	return dir
}

func eventually(t *testing.T, what string, is func() bool) {
	t.Helper()
	require.Eventually(t, is, 20*time.Second, 2*time.Millisecond, what)
}

// TestPluginsComeAndGo: a plugin is registered and told so, goes with its socket, and is
// registered anew when its socket is made anew, even at once.
func TestPluginsComeAndGo(t *testing.T) {
	t.Parallel()
	h := &handler{}
	dir := watch(t, h)
	path := filepath.Join(dir, "d-reg.sock")
	r := &registrar{info: &registration.PluginInfo{Type: registration.CSIPlugin, Name: "d.example", Endpoint: "/x/csi.sock", SupportedVersions: []string{"1.0.0"}}}
	stop := r.serve(t, path)
	eventually(t, "told", func() bool { return r.last().GetPluginRegistered() })
	require.Equal(t, []string{"+d.example /x/csi.sock 1.0.0"}, h.all())

	stop()
	eventually(t, "gone", func() bool { return slices.Equal(h.all()[1:], []string{"-d.example"}) })
	for i := range 3 {
		again := r.serve(t, path)
		eventually(t, "back", func() bool { return len(h.all()) == 3+2*i })
		require.True(t, strings.HasPrefix(h.all()[2+2*i], "+"), "%q", h.all())
		again()
		if i < 2 {
			eventually(t, "gone", func() bool { return len(h.all()) == 4+2*i })
		}
	}
	r.serve(t, path) // with no time between: the old one still goes first
	eventually(t, "the last", func() bool {
		all := h.all()
		return len(all) == 9 && strings.HasPrefix(all[7], "-") && strings.HasPrefix(all[8], "+")
	})
}

// TestRefusedPlugins: what is no socket, what leads to one, and what says too much or
// nothing is not taken; who can be told why is, and it is asked again.
func TestRefusedPlugins(t *testing.T) {
	t.Parallel()
	h := &handler{}
	dir := watch(t, h)
	elsewhere := t.TempDir()
	good := &registration.PluginInfo{Type: registration.CSIPlugin, Name: "good", SupportedVersions: []string{"1.0.0"}}
	outside := &registrar{info: good}
	outside.serve(t, filepath.Join(elsewhere, "s.sock"))
	require.NoError(t, os.Symlink(filepath.Join(elsewhere, "s.sock"), filepath.Join(dir, "link.sock")))
	require.NoError(t, os.WriteFile(filepath.Join(dir, "file.sock"), nil, 0o600))
	require.NoError(t, os.Mkdir(filepath.Join(dir, "folder.sock"), 0o700))

	told := map[string]*registrar{
		"no handler registered for plugin type: Other": {info: &registration.PluginInfo{Type: "Other", Name: "o"}},
		"its name of 0 bytes is none":                  {info: &registration.PluginInfo{Type: registration.CSIPlugin}},
		"its name of 7 bytes is none":                  {info: &registration.PluginInfo{Type: registration.CSIPlugin, Name: "../../x"}},
		"it names 40 versions":                         {info: &registration.PluginInfo{Type: registration.CSIPlugin, Name: "v", SupportedVersions: make([]string, 40)}},
		"its endpoint of 5000 bytes is no path":        {info: &registration.PluginInfo{Type: registration.CSIPlugin, Name: "e", Endpoint: strings.Repeat("/", 5000)}},
	}
	silent := []*registrar{
		{hang: true},
		{info: &registration.PluginInfo{Type: registration.CSIPlugin, Name: strings.Repeat("n", 200<<10)}},
	}
	i := 0
	next := func() string { i++; return filepath.Join(dir, string(rune('a'+i))+".sock") }
	for _, r := range told {
		r.serve(t, next())
	}
	for _, r := range silent {
		r.serve(t, next())
	}
	last := &registrar{info: good}
	last.serve(t, next())
	for why, r := range told {
		eventually(t, why, func() bool { return strings.Contains(r.last().GetError(), why) })
		require.False(t, r.last().PluginRegistered)
	}
	eventually(t, "others do not hold one up", func() bool { return last.last().GetPluginRegistered() })
	require.Equal(t, []string{"+good  1.0.0"}, h.all())
	require.Nil(t, outside.last())
	for _, r := range silent {
		require.Nil(t, r.last())
	}
}

// TestRefusedIsAskedAgain: a handler that refuses is asked again after a while.
func TestRefusedIsAskedAgain(t *testing.T) {
	t.Parallel()
	h := &handler{refuse: errors.New("taken by another")}
	dir := watch(t, h)
	r := &registrar{info: &registration.PluginInfo{Type: registration.CSIPlugin, Name: "d", SupportedVersions: []string{"1.0.0"}}}
	r.serve(t, filepath.Join(dir, "d.sock"))
	eventually(t, "told why", func() bool { return strings.Contains(r.last().GetError(), "taken by another") })
	h.mu.Lock()
	h.refuse = nil
	h.mu.Unlock()
	eventually(t, "taken", func() bool { return r.last().GetPluginRegistered() })
}
