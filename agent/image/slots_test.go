package image

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"google.golang.org/grpc"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	runtimev1 "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// stalling is an image service of which images named slow never come.
type stalling struct {
	registry
	slow, most int
}

func (s *stalling) PullImage(ctx context.Context, in *runtimev1.PullImageRequest, opts ...grpc.CallOption) (*runtimev1.PullImageResponse, error) {
	if in.Image.Image != "docker.io/library/slow:latest" {
		return s.registry.PullImage(ctx, in, opts...)
	}
	s.mu.Lock()
	s.slow++
	s.most = max(s.most, s.slow)
	s.mu.Unlock()
	defer func() {
		s.mu.Lock()
		s.slow--
		s.mu.Unlock()
	}()
	<-ctx.Done()
	return nil, ctx.Err()
}

// TestSlowRegistriesKeepNobodyOut has one namespace pull from a registry that never answers,
// with as many pods as it likes.
func TestSlowRegistriesKeepNobodyOut(t *testing.T) {
	t.Parallel()
	s := &stalling{registry: registry{present: map[string]bool{}}}
	m := New(s, nil, time.Now, slog.New(slog.DiscardHandler))
	ctx, cancel := context.WithCancel(t.Context())
	var wait sync.WaitGroup
	ensure := func(namespace string, uid int, name string) {
		wait.Add(1)
		m.Ensure(ctx, Request{
			Pod:       &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: namespace, UID: types.UID(fmt.Sprint(namespace, uid))}},
			Container: &corev1.Container{Name: "c", Image: name, ImagePullPolicy: corev1.PullIfNotPresent},
			Changed:   wait.Done, Event: func(_, _, _ string) {},
		})
	}
	for i := range 100 {
		ensure("evil", i, "slow")
	}
	require.Eventually(t, func() bool { s.mu.Lock(); defer s.mu.Unlock(); return s.slow == maxNamespacePulls }, 10*time.Second, time.Millisecond)
	for i := range 20 {
		ensure("good", i, "fast")
	}
	require.Eventually(t, func() bool { s.mu.Lock(); defer s.mu.Unlock(); return s.present["docker.io/library/fast:latest"] }, 10*time.Second, time.Millisecond)
	s.mu.Lock()
	require.Equal(t, maxNamespacePulls, s.most)
	s.mu.Unlock()
	cancel()
	require.Eventually(t, func() bool { s := m.slots.Stats(); return s.Held == 0 && s.Sources == 0 && s.Waiting == 0 }, 10*time.Second, time.Millisecond)
}

func TestSlots(t *testing.T) {
	t.Parallel()
	s := newSlots()
	var gives []func()
	for _, namespace := range []string{"a", "b"} {
		for range maxNamespacePulls {
			give, err := s.Take(t.Context(), namespace, 1)
			require.NoError(t, err)
			gives = append(gives, give)
		}
	}
	got := make(chan string, 10)
	queue := func(namespace string, ctx context.Context) {
		before := s.Stats().Waiting
		go func() {
			if _, err := s.Take(ctx, namespace, 1); err == nil {
				got <- namespace
			}
		}()
		require.Eventually(t, func() bool { return s.Stats().Waiting > before }, 10*time.Second, time.Millisecond)
	}
	queue("a", t.Context())
	gone, cancel := context.WithCancel(t.Context())
	queue("c", gone)
	queue("d", t.Context())
	cancel()
	require.Eventually(t, func() bool { return s.Stats().Waiting == 2 }, 10*time.Second, time.Millisecond)
	gives[maxNamespacePulls]() // of b: not a's turn, which has most
	require.Equal(t, "d", <-got)
	gives[0]()
	require.Equal(t, "a", <-got)
	require.EqualValues(t, MaxPulls, s.Stats().Held)
}

// TestPullsStopWhenTheDiskIsFull is what an image does that becomes larger than the disk.
func TestPullsStopWhenTheDiskIsFull(t *testing.T) {
	t.Parallel()
	s := &stalling{registry: registry{present: map[string]bool{}}}
	m := New(s, nil, time.Now, slog.New(slog.DiscardHandler))
	var mu sync.Mutex
	full := error(nil)
	m.StopWhen(func() error { mu.Lock(); defer mu.Unlock(); return full })
	changed := make(chan struct{}, 10)
	ensure := func(name string) Result {
		return m.Ensure(t.Context(), Request{
			Pod: &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: "n", UID: "u"}}, Container: &corev1.Container{Name: name, Image: name, ImagePullPolicy: corev1.PullIfNotPresent},
			Changed: func() { changed <- struct{}{} }, Event: func(_, _, _ string) {},
		})
	}
	require.Equal(t, Pulling, ensure("slow").State)
	require.Eventually(t, func() bool { s.mu.Lock(); defer s.mu.Unlock(); return s.slow == 1 }, 10*time.Second, time.Millisecond)
	mu.Lock()
	full = errors.New("the disk has 7 bytes left")
	mu.Unlock()
	<-changed
	require.Equal(t, "the disk has 7 bytes left", ensure("slow").Message)
	require.Equal(t, Pulling, ensure("fast").State)
	<-changed
	require.Equal(t, "the disk has 7 bytes left", ensure("fast").Message, "nothing is begun")
	s.mu.Lock()
	require.Zero(t, s.pulls)
	require.Zero(t, s.slow)
	s.mu.Unlock()
}
