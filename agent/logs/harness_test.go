package logs

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtimev1 "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// patience is for conditions, on machines however loaded.
const patience = time.Minute

// fakeRuntime writes logs as containerd does: opened by path, appended to, and
// opened anew when told.
type fakeRuntime struct {
	Runtime
	mu         sync.Mutex
	containers map[string]*fakeContainer
	broken     error
	reopened   int
}

type fakeContainer struct {
	path  string
	f     *os.File
	state runtimev1.ContainerState
}

func newRuntime() *fakeRuntime { return &fakeRuntime{containers: map[string]*fakeContainer{}} }

func openLog(path string) (*os.File, error) {
	return os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o640)
}

// start begins a container that writes to a log of this name.
func (r *fakeRuntime) start(t *testing.T, id, path string) {
	t.Helper()
	f, err := openLog(path)
	require.NoError(t, err)
	r.mu.Lock()
	defer r.mu.Unlock()
	r.containers[id] = &fakeContainer{path: path, f: f, state: runtimev1.ContainerState_CONTAINER_RUNNING}
	t.Cleanup(func() { r.stop(id) })
}

func (r *fakeRuntime) stop(id string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if c := r.containers[id]; c != nil && c.f != nil {
		c.f.Close()
		c.f, c.state = nil, runtimev1.ContainerState_CONTAINER_EXITED
	}
}

func (r *fakeRuntime) write(id string, b []byte) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if f := r.containers[id].f; f != nil {
		_, _ = f.Write(b)
	}
}

func (r *fakeRuntime) breakDown(err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.broken = err
}

func (r *fakeRuntime) reopens() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.reopened
}

func (r *fakeRuntime) ListContainers(context.Context, *runtimev1.ListContainersRequest, ...grpc.CallOption) (*runtimev1.ListContainersResponse, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	out := &runtimev1.ListContainersResponse{}
	for id, c := range r.containers {
		out.Containers = append(out.Containers, &runtimev1.Container{Id: id, State: c.state})
	}
	return out, nil
}

func (r *fakeRuntime) ContainerStatus(_ context.Context, in *runtimev1.ContainerStatusRequest, _ ...grpc.CallOption) (*runtimev1.ContainerStatusResponse, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	c := r.containers[in.ContainerId]
	if c == nil {
		return nil, status.Error(codes.NotFound, "no such container")
	}
	return &runtimev1.ContainerStatusResponse{Status: &runtimev1.ContainerStatus{Id: in.ContainerId, State: c.state, LogPath: c.path}}, nil
}

func (r *fakeRuntime) ReopenContainerLog(_ context.Context, in *runtimev1.ReopenContainerLogRequest, _ ...grpc.CallOption) (*runtimev1.ReopenContainerLogResponse, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.reopened++
	c := r.containers[in.ContainerId]
	switch {
	case r.broken != nil:
		return nil, r.broken
	case c == nil:
		return nil, status.Error(codes.NotFound, "no such container")
	case c.state != runtimev1.ContainerState_CONTAINER_RUNNING:
		return nil, errors.New("container is not running")
	}
	f, err := openLog(c.path)
	if err != nil {
		return nil, err
	}
	c.f.Close()
	c.f = f
	return &runtimev1.ReopenContainerLogResponse{}, nil
}

// bench is a folder of logs with one container's.
type bench struct {
	*Logs
	t    *testing.T
	rt   *fakeRuntime
	dir  string // the container's
	path string // its log
}

const testSize = 64 << 10

func newBench(t *testing.T, change func(*Config)) *bench {
	t.Helper()
	b := &bench{t: t, rt: newRuntime()}
	cfg := Config{Dir: filepath.Join(t.TempDir(), "logs"), MaxSize: testSize, MaxFiles: 5, Runtime: b.rt, Logger: slog.New(slog.DiscardHandler)}
	if change != nil {
		change(&cfg)
	}
	b.dir = filepath.Join(cfg.Dir, "ns_pod_uid", "c")
	b.path = filepath.Join(b.dir, "0.log")
	require.NoError(t, os.MkdirAll(b.dir, 0o755))
	var err error
	b.Logs, err = New(cfg)
	require.NoError(t, err)
	return b
}

// run runs until the test ends or stop is called.
func (b *bench) run() (stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- b.Run(ctx) }()
	stop = sync.OnceFunc(func() {
		cancel()
		require.NoError(b.t, <-done)
	})
	b.t.Cleanup(stop)
	return stop
}

func (b *bench) until(what string, ok func() bool) {
	b.t.Helper()
	for end := time.Now().Add(patience); !ok(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(end) {
			b.t.Fatalf("timed out waiting for %s; the folder has %v", what, b.names())
		}
	}
}

func (b *bench) names() []string {
	b.t.Helper()
	list, err := os.ReadDir(b.dir)
	require.NoError(b.t, err)
	var out []string
	for _, e := range list {
		out = append(out, e.Name())
	}
	return out
}

// used is how many bytes the files of the log are.
func (b *bench) used() (sum int64) {
	list, err := os.ReadDir(b.dir)
	require.NoError(b.t, err)
	for _, e := range list {
		if info, err := e.Info(); err == nil && info.Mode().IsRegular() {
			sum += info.Size()
		}
	}
	return sum
}

func (b *bench) put(name string, content []byte) {
	b.t.Helper()
	require.NoError(b.t, os.WriteFile(filepath.Join(b.dir, name), content, 0o640))
}

// entries are numbered lines in CRI's form, from first to before end.
func entries(first, end int) []byte {
	var b bytes.Buffer
	for i := first; i < end; i++ {
		fmt.Fprintf(&b, "2026-01-02T03:04:05.%09dZ stdout F line %d\n", i%1e9, i)
	}
	return b.Bytes()
}
