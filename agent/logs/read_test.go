package logs

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
	crilogs "k8s.io/cri-client/pkg/logs"
)

// isRunning is what CRI says of the bench's container.
func (b *bench) isRunning(context.Context) (bool, error) {
	b.rt.mu.Lock()
	defer b.rt.mu.Unlock()
	c := b.rt.containers["id"]
	return c != nil && c.f != nil, nil
}

func (b *bench) read(o Options) (string, error) {
	b.t.Helper()
	r, err := b.Read(b.t.Context(), b.path, o, b.isRunning)
	if err != nil {
		return "", err
	}
	defer r.Close()
	var out bytes.Buffer
	err = r.Copy(b.t.Context(), &out, nil)
	return out.String(), err
}

func number(n int64) *int64 { return &n }

// TestReadingIsUpstreams reads logs of all sorts with all sorts of options, and
// holds it against upstream's reader.
func TestReadingIsUpstreams(t *testing.T) {
	t.Parallel()
	at := func(second int, rest string) string {
		return fmt.Sprintf("2026-01-02T03:04:%02d.5Z %s\n", second, rest)
	}
	var many strings.Builder
	for i := range 4000 {
		many.WriteString(at(i%60, fmt.Sprintf("stdout F line %d %s", i, strings.Repeat("x", i%97))))
	}
	files := map[string]string{
		"empty":          "",
		"one":            at(1, "stdout F a"),
		"both streams":   at(1, "stdout F a") + at(2, "stderr F b") + at(3, "stdout F c") + at(4, "stderr F d"),
		"empty lines":    at(1, "stdout F ") + at(2, "stdout F ") + at(3, "stdout F x"),
		"partial":        at(1, "stdout P a") + at(2, "stdout P b") + at(3, "stdout F c") + at(4, "stdout F d"),
		"partial, empty": at(1, "stdout P a") + at(2, "stdout F ") + at(3, "stdout P ") + at(4, "stdout F d"),
		"partial at end": at(1, "stdout F a") + at(2, "stdout P b"),
		"cut short":      at(1, "stdout F a") + "2026-01-02T03:04:05Z stdout F half",
		"cut in head":    at(1, "stdout F a") + "2026-01-02T03:04:05Z std",
		"cut partial":    at(1, "stdout F a") + "2026-01-02T03:04:05Z stdout P half",
		"junk between":   at(1, "stdout F a") + "junk\n\n" + at(2, "sideways F b") + "2026-99-02T03:04:05Z stdout F c\n" + at(4, "stdout F d"),
		"more tags":      at(1, "stdout F:new a") + at(2, "stdout P:new b") + at(3, "stdout F c"),
		"long":           at(1, "stdout F "+strings.Repeat("long", 100000)) + at(2, "stdout F b"),
		"many":           many.String(),
	}
	options := map[string]Options{
		"all": {}, "timestamps": {Timestamps: true},
		"since":  {Since: time.Date(2026, 1, 2, 3, 4, 3, 0, time.UTC)},
		"tail 0": {TailLines: number(0)}, "tail 1": {TailLines: number(1)}, "tail 3": {TailLines: number(3), Timestamps: true}, "tail 1000000": {TailLines: number(1000000)},
		"tail 3000": {TailLines: number(3000)},
		"limit 1":   {LimitBytes: number(1)}, "limit 40": {LimitBytes: number(40), Timestamps: true}, "limit 100000": {LimitBytes: number(100000)},
		"tail and limit": {TailLines: number(2), LimitBytes: number(3)},
		"stdout":         {Stream: Stdout}, "stderr": {Stream: Stderr, Timestamps: true},
		"follow": {Follow: true}, "follow, tail": {Follow: true, TailLines: number(2), Timestamps: true},
	}
	for name, content := range files {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := newBench(t, nil)
			b.put("0.log", []byte(content))
			for name, o := range options {
				if o.Follow && !strings.HasSuffix(content, "\n") {
					continue // upstream waits for the end of a line for good
				}
				var want bytes.Buffer
				u := &crilogs.LogOptions{TailLines: o.TailLines, LimitBytes: o.LimitBytes, Timestamp: o.Timestamps, Since: o.Since}
				stdout, stderr := io.Writer(&want), io.Writer(&want)
				switch o.Stream {
				case Stdout:
					stderr = nil
				case Stderr:
					stdout = nil
				}
				if err := crilogs.ReadLogs(t.Context(), b.path, "", u, nil, stdout, stderr); err != nil {
					// It shows nothing of a log whose first line is none; this one the rest.
					require.ErrorContains(t, err, "unsupported log format", name)
					continue
				}
				got, err := b.read(o)
				require.NoError(t, err, name)
				require.Equal(t, want.String(), got, name)
			}
		})
	}
}

// TestOnlyLogsAreRead has a pod that collects logs put something else there.
func TestOnlyLogsAreRead(t *testing.T) {
	t.Parallel()
	outside := t.TempDir()
	require.NoError(t, os.WriteFile(filepath.Join(outside, "0.log"), entries(0, 1), 0o600))
	for _, tc := range []struct {
		name string
		make func(path string) error
	}{
		{"a link", func(p string) error { return os.Symlink(filepath.Join(outside, "0.log"), p) }},
		{"a fifo", func(p string) error { return unix.Mkfifo(p, 0o600) }},
		{"a folder", func(p string) error { return os.Mkdir(p, 0o700) }},
		{"a link for its folder", func(p string) error {
			if err := os.Remove(filepath.Dir(p)); err != nil {
				return err
			}
			return os.Symlink(outside, filepath.Dir(p))
		}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			b := newBench(t, nil)
			require.NoError(t, tc.make(b.path))
			done := make(chan error, 1)
			go func() {
				_, err := b.read(Options{})
				done <- err
			}()
			select {
			case err := <-done:
				require.Error(t, err)
			case <-time.After(patience):
				t.Fatal("blocks")
			}
		})
	}
	b := newBench(t, nil)
	_, err := b.Read(t.Context(), filepath.Join(outside, "0.log"), Options{}, b.isRunning)
	require.ErrorContains(t, err, "not in this node's folder")
	b.put("0.log", []byte("no log\n"))
	_, err = b.read(Options{})
	require.ErrorContains(t, err, "unsupported log format")
}

// TestALineOfAnyLength reads one that has no end.
func TestALineOfAnyLength(t *testing.T) {
	const size = 64 << 20
	for _, head := range []string{"2026-01-02T03:04:05Z stdout F ", "2026-01-02T03:04:05Z stdout ", ""} {
		b := newBench(t, nil)
		b.put("0.log", []byte(head))
		require.NoError(t, os.Truncate(b.path, size)) // has no blocks on the disk
		for _, o := range []Options{{}, {TailLines: number(5)}} {
			r, err := b.Read(t.Context(), b.path, o, b.isRunning)
			require.NoError(t, err)
			var before, after runtime.MemStats
			runtime.ReadMemStats(&before)
			n := &counter{}
			err = r.Copy(t.Context(), n, nil)
			runtime.ReadMemStats(&after)
			r.Close()
			require.Less(t, after.TotalAlloc-before.TotalAlloc, uint64(4<<20))
			if strings.HasSuffix(head, "F ") {
				require.NoError(t, err)
				require.EqualValues(t, size-len(head), n.n)
			} else {
				require.ErrorContains(t, err, "unsupported log format")
			}
		}
	}
}

type counter struct{ n int64 }

func (c *counter) Write(b []byte) (int, error) {
	c.n += int64(len(b))
	return len(b), nil
}

// slowly hands on what is written only as fast as next is sent to.
type slowly struct {
	next chan struct{}
	mu   sync.Mutex
	b    bytes.Buffer
}

func (s *slowly) Write(b []byte) (int, error) {
	if s.next != nil {
		<-s.next
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.Write(b)
}

func (s *slowly) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.String()
}

// follow follows the bench's log in the background.
func (b *bench) follow(o Options, w io.Writer) (done chan error) {
	b.t.Helper()
	o.Follow = true
	r, err := b.Read(b.t.Context(), b.path, o, b.isRunning)
	require.NoError(b.t, err)
	done = make(chan error, 1)
	go func() {
		defer r.Close()
		done <- r.Copy(b.t.Context(), w, nil)
	}()
	return done
}

func lines(first, end int) string {
	var b strings.Builder
	for i := first; i < end; i++ {
		fmt.Fprintf(&b, "line %d\n", i)
	}
	return b.String()
}

// TestFollowingAcrossRotations sees each line once, whatever is rotated and
// compressed meanwhile, and ends with the container.
func TestFollowingAcrossRotations(t *testing.T) {
	t.Parallel()
	b := newBench(t, nil)
	b.rt.start(t, "id", b.path)
	b.run()
	b.rt.write("id", entries(0, 100))
	out := &slowly{}
	done := b.follow(Options{TailLines: number(10)}, out)
	n := 100
	for range 10 {
		before := b.rt.reopens()
		for range 16 { // more than a file
			b.rt.write("id", entries(n, n+250))
			n += 250
		}
		// Not further ahead than what is kept.
		b.until("what was written to be read", func() bool { return strings.HasSuffix(out.String(), lines(n-1, n)) })
		b.until("a rotation", func() bool { return b.rt.reopens() > before })
	}
	b.rt.write("id", entries(n, n+1))
	b.rt.stop("id")
	b.Ended("id")
	select {
	case err := <-done:
		require.NoError(t, err)
	case <-time.After(patience):
		t.Fatal("does not end")
	}
	got, want := out.String(), lines(90, n+1)
	if got != want {
		for i := range min(len(got), len(want)) {
			if got[i] != want[i] {
				t.Fatalf("after %q: %q instead of %q", got[max(0, i-40):i], got[i:min(len(got), i+80)], want[i:min(len(want), i+80)])
			}
		}
		t.Fatalf("%d bytes instead of %d", len(got), len(want))
	}
}

// TestASlowReaderHoldsNoRoom stops reading while the log is rotated away.
func TestASlowReaderHoldsNoRoom(t *testing.T) {
	t.Parallel()
	b := newBench(t, nil)
	b.rt.start(t, "id", b.path)
	b.run()
	out := &slowly{next: make(chan struct{})}
	b.rt.write("id", entries(100000, 101200)) // more than is held between file and client
	done := b.follow(Options{}, out)
	fixed, err := b.Read(t.Context(), b.path, Options{}, b.isRunning)
	require.NoError(t, err)
	defer fixed.Close()
	for n := 101200; b.rt.reopens() < 12; n += 500 {
		b.rt.write("id", entries(n, n+500))
		time.Sleep(time.Millisecond)
	}
	b.until("nobody to hold what is removed", func() bool { return deleted(t, b.dir) == 0 })
	close(out.next)
	b.rt.write("id", entries(999998, 999999))
	b.until("the rest to be read", func() bool { return strings.HasSuffix(out.String(), "line 999998\n") })
	require.Contains(t, out.String(), "\n"+lostText+"\n")
	require.ErrorContains(t, fixed.Copy(t.Context(), io.Discard, nil), "rotated away")
	b.rt.stop("id")
	b.Ended("id")
	require.NoError(t, <-done)
}

// deleted counts the files of a folder that this process has open and that are
// removed.
func deleted(t *testing.T, dir string) (n int) {
	list, err := os.ReadDir("/proc/self/fd")
	require.NoError(t, err)
	for _, e := range list {
		if name, err := os.Readlink("/proc/self/fd/" + e.Name()); err == nil && strings.HasPrefix(name, dir) && strings.HasSuffix(name, " (deleted)") {
			n++
		}
	}
	return n
}

// TestFollowing has somebody wait for what comes, without rotation.
func TestFollowing(t *testing.T) {
	t.Parallel()
	t.Run("an end that nobody tells", func(t *testing.T) {
		t.Parallel()
		b := newBench(t, func(c *Config) { c.MaxSize = -1 })
		b.rt.start(t, "id", b.path)
		b.run()
		out := &slowly{}
		done := b.follow(Options{}, out)
		b.rt.write("id", entries(0, 3))
		b.until("three lines", func() bool { return out.String() == lines(0, 3) })
		b.rt.write("id", []byte("2026-01-02T03:04:05Z stdout F no"))
		b.rt.write("id", []byte("t yet\n"))
		b.rt.stop("id")
		require.NoError(t, <-done)
		require.Equal(t, lines(0, 3)+"not yet\n", out.String())
	})
	t.Run("a file that somebody replaces", func(t *testing.T) {
		t.Parallel()
		b := newBench(t, nil)
		b.rt.start(t, "id", b.path)
		b.run()
		out := &slowly{}
		done := b.follow(Options{}, out)
		b.rt.write("id", entries(0, 3))
		b.until("three lines", func() bool { return out.String() == lines(0, 3) })
		require.NoError(t, os.Rename(b.path, b.path+".mine"))
		b.Resync()
		b.until("it to be begun anew", func() bool { _, err := os.Stat(b.path); return err == nil })
		b.rt.write("id", entries(3, 5))
		b.until("what came after", func() bool { return out.String() == lines(0, 5) })
		b.rt.stop("id")
		b.Ended("id")
		require.NoError(t, <-done)
	})
	t.Run("a client that goes", func(t *testing.T) {
		t.Parallel()
		b := newBench(t, nil)
		b.rt.start(t, "id", b.path)
		ctx, cancel := context.WithCancel(t.Context())
		r, err := b.Read(ctx, b.path, Options{Follow: true}, b.isRunning)
		require.NoError(t, err)
		done := make(chan error, 1)
		go func() { done <- r.Copy(ctx, io.Discard, nil) }()
		cancel()
		require.ErrorIs(t, <-done, context.Canceled)
		r.Close()
		require.Empty(t, b.logs, "nothing is kept")
	})
}

// collected is what a parser found, as text.
type collected struct{ strings.Builder }

func (c *collected) begin(e entry) error {
	fmt.Fprintf(c, "<%d %s %v ", e.time.UnixNano(), e.stream, e.partial)
	return nil
}
func (c *collected) text(b []byte) error { c.Write(b); return nil }
func (c *collected) end() error          { c.WriteString(">"); return nil }

// FuzzParser gives it a file in pieces of any size.
func FuzzParser(f *testing.F) {
	f.Add(entries(0, 3), uint8(7))
	f.Add([]byte("2026-01-02T03:04:05Z stdout P a\n2026-01-02T03:04:05Z stderr F:x \njunk\n\n   \n2026-01-02T03:04:05Z stdout F half"), uint8(1))
	f.Fuzz(func(t *testing.T, file []byte, piece uint8) {
		var whole, pieces collected
		var p, q parser
		_ = p.feed(file, &whole)
		_ = p.close(&whole)
		for rest := file; len(rest) > 0; {
			n := min(len(rest), int(piece)+1)
			_ = q.feed(rest[:n], &pieces)
			rest = rest[n:]
			if len(q.head) > maxHead {
				t.Fatalf("holds %d bytes", len(q.head))
			}
		}
		_ = q.close(&pieces)
		if whole.String() != pieces.String() {
			t.Fatalf("whole %q, in pieces %q", whole.String(), pieces.String())
		}
		// Each entry is one that the file has.
		if p.good && !bytes.Contains(file, []byte("std")) {
			t.Fatalf("found %q in %q", whole.String(), file)
		}
	})
}
