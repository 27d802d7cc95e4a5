package backup

import (
	"bytes"
	"context"
	"errors"
	"io"
	"log/slog"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"timonel/state"
	"timonel/test/s3"
)

// memory is a store whose next Put can be made to fail, or to damage.
type memory struct {
	mu     sync.Mutex
	files  map[string][]byte
	fail   error
	damage bool
}

func (m *memory) String() string { return "memory" }

func (m *memory) List(context.Context) ([]Item, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	var items []Item
	for name, b := range m.files {
		if item, ok := parseName(name); ok {
			item.Size = int64(len(b))
			items = append(items, item)
		}
	}
	return items, nil
}

func (m *memory) Put(_ context.Context, name string, write func(io.Writer) error) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.fail != nil {
		return m.fail
	}
	var b bytes.Buffer
	if err := write(&b); err != nil {
		return err
	}
	if m.damage {
		b.Bytes()[b.Len()/2] ^= 1
	}
	if m.files == nil {
		m.files = map[string][]byte{}
	}
	m.files[name] = b.Bytes()
	return nil
}

func (m *memory) Open(_ context.Context, name string) (io.ReadCloser, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return io.NopCloser(bytes.NewReader(m.files[name])), nil
}

func (m *memory) Delete(_ context.Context, name string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.files, name)
	return nil
}

func scheduler(t testing.TB, store Store, interval time.Duration, retain int) *Scheduler {
	s := sample(t)
	return NewScheduler(Schedule{Store: store, Interval: interval, Retain: retain, ClusterID: "prod", Version: "v1",
		View: func(context.Context) (state.View, error) { return s.View(), nil }, Logger: slog.New(slog.DiscardHandler)})
}

func names(t testing.TB, s *Scheduler) []string {
	t.Helper()
	list, err := s.List(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	var out []string
	for _, item := range list.Items {
		out = append(out, item.Name)
	}
	return out
}

func TestSchedule(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := &memory{}
		s := scheduler(t, store, time.Hour, 3)
		run := func() (stop func()) {
			ctx, cancel := context.WithCancel(context.Background())
			done := make(chan error, 1)
			go func() { done <- s.Run(ctx) }()
			return func() {
				cancel()
				if err := <-done; !errors.Is(err, context.Canceled) {
					t.Errorf("Run returns %v", err)
				}
			}
		}
		count := func(want int, when string) {
			t.Helper()
			synctest.Wait()
			if got := names(t, s); len(got) != want {
				t.Fatalf("%s: %v, want %d", when, got, want)
			}
		}
		stop := run()
		count(1, "at once, as there is none")
		time.Sleep(59 * time.Minute)
		count(1, "before the hour")
		stop()
		stop = run() // another leader
		count(1, "a new leader takes none before it is due")
		time.Sleep(2 * time.Minute)
		count(2, "when it is due")

		store.mu.Lock()
		store.fail = errors.New("no space left on device")
		store.mu.Unlock()
		time.Sleep(time.Hour)
		count(2, "while it fails")
		if p := s.Problems(); len(p) != 1 || p[0] != "scheduled snapshots to memory fail: write: no space left on device" {
			t.Error(p)
		}
		store.mu.Lock()
		store.fail = nil
		store.mu.Unlock()
		time.Sleep(retryAfter)
		count(3, "soon after there is space again")
		if p := s.Problems(); p != nil {
			t.Error(p)
		}
		time.Sleep(5 * time.Hour)
		count(3, "no more than are to be kept")
		before := names(t, s)
		store.mu.Lock()
		store.damage = true
		store.mu.Unlock()
		time.Sleep(2 * time.Hour)
		count(3, "damaged ones")
		if after := names(t, s); !slices.Equal(before, after) {
			t.Errorf("a damaged snapshot drove out a good one: %v, before %v", after, before)
		}
		if p := s.Problems(); len(p) != 1 || !strings.Contains(p[0], "read back: "+"timonel-prod-") {
			t.Error(p)
		}
		stop()
		if p := s.Problems(); p != nil {
			t.Errorf("who does not lead has %v", p)
		}
	})
}

func TestFolderKeepsWhatIsNotItsOwn(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	old := time.Now().Add(-3 * time.Hour)
	partial := Name("prod", old, 5) + partialSuffix
	foreign := []string{"notes.txt", "timonel-prod.snapshot", "timonel-prod-20200101T000000Z-5.snapshot.gz", Name("staging", old, 5), "x" + Name("prod", old, 5), "other" + partialSuffix}
	for _, name := range append(foreign, partial, Name("prod", old, 5), Name("prod", old.Add(-time.Hour), 4)) {
		if err := os.WriteFile(filepath.Join(dir, name), []byte("x"), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Chtimes(filepath.Join(dir, name), old, old); err != nil {
			t.Fatal(err)
		}
	}
	// One from a clock that was ahead sorts before the one that is taken now.
	ahead := Name("prod", time.Now().Add(24*time.Hour), 6)
	if err := os.WriteFile(filepath.Join(dir, ahead), []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	s := scheduler(t, Folder(dir), time.Hour, 1)
	item, err := s.Take(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, entry := range entries {
		got = append(got, entry.Name())
	}
	want := append(foreign, ahead, item.Name)
	slices.Sort(want)
	if !slices.Equal(got, want) {
		t.Errorf("left %v\nwant %v", got, want)
	}
	if info, err := os.Stat(filepath.Join(dir, item.Name)); err != nil || info.Mode().Perm() != 0o600 || info.Size() != item.Size {
		t.Errorf("%v, %v", info, err)
	}
}

func TestWriteFileLeavesWhatWasThere(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "f.snapshot")
	good := save(t, sample(t))
	for what, b := range map[string][]byte{"nothing": nil, "half": good[:len(good)/2], "text": []byte("hello")} {
		if err := os.WriteFile(path, []byte("before"), 0o600); err != nil {
			t.Fatal(err)
		}
		err := WriteFile(path, func(w io.Writer) error { _, err := w.Write(b); return err })
		if !errors.Is(err, ErrCorrupt) {
			t.Errorf("%s: %v", what, err)
		}
		if left, _ := filepath.Glob(path + "*"); len(left) != 1 {
			t.Errorf("%s: it left %v", what, left)
		}
	}
	if b, _ := os.ReadFile(path); string(b) != "before" {
		t.Errorf("it holds %q", b)
	}
}

func TestS3(t *testing.T) {
	server := &s3.Server{AccessKey: "key"}
	web := httptest.NewServer(server)
	defer web.Close()
	t.Setenv("AWS_ACCESS_KEY_ID", "key")
	t.Setenv("AWS_SECRET_ACCESS_KEY", "secret")
	config := S3Config{Endpoint: web.URL}
	store, err := NewS3("s3://backups/prod/hourly", config)
	if err != nil {
		t.Fatal(err)
	}
	server.Change("backups/prod/hourly/notes.txt", func([]byte) []byte { return []byte("mine") })
	server.Change("backups/prod/hourly/sub/"+Name("prod", taken, 3), func([]byte) []byte { return []byte("deeper") })
	server.Change("backups/"+Name("prod", taken, 3), func([]byte) []byte { return []byte("higher") })
	s := scheduler(t, store, time.Hour, 1)
	var last Item
	for range 3 {
		if last, err = s.Take(t.Context()); err != nil {
			t.Fatal(err)
		}
		time.Sleep(1100 * time.Millisecond) // names have seconds
	}
	want := []string{"backups/prod/hourly/notes.txt", "backups/prod/hourly/sub/" + Name("prod", taken, 3), "backups/prod/hourly/" + last.Name, "backups/" + Name("prod", taken, 3)}
	slices.Sort(want)
	if got := server.Keys(); !slices.Equal(got, want) {
		t.Errorf("%v, want %v", got, want)
	}
	if got := names(t, s); len(got) != 1 || got[0] != last.Name {
		t.Error(got)
	}
	object, err := OpenS3(t.Context(), "s3://backups/prod/hourly/"+last.Name, config)
	if err != nil {
		t.Fatal(err)
	}
	defer object.Close()
	r, err := NewReader(object, "")
	if err != nil {
		t.Fatal(err)
	}
	if info, err := Inspect(r); err != nil || info.Size != last.Size {
		t.Errorf("%+v, %v", info, err)
	}

	if _, err := OpenS3(t.Context(), "s3://backups/nothing", config); err == nil || !strings.Contains(err.Error(), "NoSuchKey") {
		t.Errorf("an object that there is not: %v", err)
	}
	// A source that breaks leaves no object and no upload.
	err = store.Put(t.Context(), "broken", func(w io.Writer) error {
		_, _ = w.Write(make([]byte, partSize+1))
		return errors.New("broke")
	})
	if err == nil || !strings.Contains(err.Error(), "broke") || len(server.Keys()) != len(want) || server.Uploads() != 0 {
		t.Errorf("%v, %v, %d uploads", err, server.Keys(), server.Uploads())
	}
	server.Fail(errors.New("on fire"))
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	if _, err := s.Take(ctx); err == nil || !strings.Contains(err.Error(), "on fire") {
		t.Errorf("a store that fails: %v", err)
	}
	server.Fail(nil)
	t.Setenv("AWS_ACCESS_KEY_ID", "other")
	if store, err = NewS3("s3://backups/prod", config); err != nil {
		t.Fatal(err)
	}
	if _, err := store.List(t.Context()); err == nil || !strings.Contains(err.Error(), "InvalidAccessKeyId") {
		t.Errorf("wrong credentials: %v", err)
	}
	t.Setenv("AWS_SECRET_ACCESS_KEY", "")
	for what, c := range map[string]S3Config{"no credentials": config, "no file": {Endpoint: web.URL, CredentialsFile: "/nowhere"}, "no endpoint": {Endpoint: "s3.example.com"}} {
		if _, err := NewS3("s3://backups/prod", c); err == nil || strings.Contains(err.Error(), "\n") {
			t.Errorf("%s: %v", what, err)
		}
	}
}

// TestUploadsInParts stores more than one part holds.
func TestUploadsInParts(t *testing.T) {
	server := &s3.Server{AccessKey: "key"}
	web := httptest.NewServer(server)
	defer web.Close()
	t.Setenv("AWS_ACCESS_KEY_ID", "key")
	t.Setenv("AWS_SECRET_ACCESS_KEY", "secret")
	store, err := NewS3("s3://backups", S3Config{Endpoint: web.URL})
	if err != nil {
		t.Fatal(err)
	}
	big := bytes.Repeat([]byte("0123456789abcdef"), (2*partSize+5)/16)
	if err := store.Put(t.Context(), "big", func(w io.Writer) error { _, err := w.Write(big); return err }); err != nil {
		t.Fatal(err)
	}
	file, err := store.Open(t.Context(), "big")
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	if got, err := io.ReadAll(file); err != nil || !bytes.Equal(got, big) {
		t.Errorf("%d bytes of %d, %v", len(got), len(big), err)
	}
}
