package backup

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"math"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/iotest"
	"time"

	"timonel/state"
)

var taken = time.Date(2026, 11, 24, 2, 30, 0, 0, time.UTC)

func sample(t testing.TB) *state.Store {
	t.Helper()
	s := state.New(state.Options{})
	for i, key := range []string{"/registry/pods/default/web-1", "/registry/pods/default/web-2", "/registry/minions/a1", "/registry/services/specs/default/web",
		"/registry/services/endpoints/default/web", "/registry/example.com/widgets/default/w1", "/registry/apiregistration.k8s.io/apiservices/v1.", "/registry/pods/default/web-1", "/other"} {
		txn := state.Txn{Time: 1000, Changes: []state.Change{{Key: key, Value: bytes.Repeat([]byte{byte(i)}, 100)}}}
		if r := s.ApplyBatch([]state.Entry{{Index: uint64(10 + i), Term: 3, Command: txn.Marshal()}})[0]; !r.Succeeded {
			t.Fatal(r.Err)
		}
	}
	return s
}

func save(t testing.TB, s *state.Store) []byte {
	t.Helper()
	var b bytes.Buffer
	n, err := Save(&b, s.View(), Header{ClusterID: "prod", Version: "v1", Time: taken})
	if err != nil || n != int64(b.Len()) {
		t.Fatal(n, b.Len(), err)
	}
	return b.Bytes()
}

func TestSaveAndInspect(t *testing.T) {
	t.Parallel()
	s := sample(t)
	saved := save(t, s)
	r, err := NewReader(iotest.OneByteReader(bytes.NewReader(saved)), "")
	if err != nil {
		t.Fatal(err)
	}
	info, err := Inspect(r)
	if err != nil {
		t.Fatal(err)
	}
	want := Header{Format: 1, ClusterID: "prod", Version: "v1", Time: taken, Revision: 10, Index: 18, Term: 3, Keys: 8, Hash: fmt.Sprintf("%016x", s.View().Hash())}
	if info.Header != want || info.Size != int64(len(saved)) || len(info.SHA256) != 64 {
		t.Errorf("%+v", info)
	}
	var got []string
	for _, resource := range info.Resources {
		got = append(got, fmt.Sprintf("%s %d", resource.Name, resource.Objects))
	}
	const resources = "(other) 1, apiservices.apiregistration.k8s.io 1, endpoints 1, nodes 1, pods 2, services 1, widgets.example.com 1"
	if strings.Join(got, ", ") != resources {
		t.Errorf("%s, want %s", got, resources)
	}
	// What it carries is the state's own snapshot.
	r, err = NewReader(bytes.NewReader(saved), "")
	if err != nil {
		t.Fatal(err)
	}
	restored := state.New(state.Options{})
	if err := restored.Restore(r); err != nil || restored.View().Hash() != s.View().Hash() {
		t.Error(err)
	}
}

func TestDamageIsRefused(t *testing.T) {
	t.Parallel()
	saved := save(t, sample(t))
	dir := t.TempDir()
	read := func(b []byte) error {
		path := filepath.Join(dir, "file")
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
		f, err := Open(path)
		if err != nil {
			return err
		}
		defer f.Close()
		_, err = Inspect(f.Reader)
		return err
	}
	if err := read(saved); err != nil {
		t.Fatal(err)
	}
	refused := func(what string, err error) {
		t.Helper()
		if err == nil || !strings.HasPrefix(err.Error(), filepath.Join(dir, "file")+": ") || strings.Contains(err.Error(), "\n") || !errors.Is(err, ErrCorrupt) {
			t.Fatalf("%s: %v", what, err)
		}
	}
	for i := range saved {
		refused(fmt.Sprintf("cut off at %d", i), read(saved[:i]))
		altered := bytes.Clone(saved)
		altered[i] ^= 1
		refused(fmt.Sprintf("altered at %d", i), read(altered))
	}
	refused("longer", read(append(bytes.Clone(saved), 0)))
	refused("text", read([]byte("apiVersion: v1\nkind: Pod\n")))

	if _, err := NewReader(iotest.ErrReader(errors.New("EIO")), "x"); err == nil || errors.Is(err, ErrCorrupt) {
		t.Errorf("a disk's error is %v", err)
	}
	var b bytes.Buffer
	if _, err := Save(&failing{after: 300}, sample(t).View(), Header{}); err == nil {
		t.Errorf("saved to a full disk: %d", b.Len())
	}
}

type failing struct{ after int }

func (f *failing) Write(b []byte) (int, error) {
	if f.after -= len(b); f.after < 0 {
		return 0, errors.New("no space left on device")
	}
	return len(b), nil
}

func TestRestore(t *testing.T) {
	t.Parallel()
	saved := save(t, sample(t))
	for name, test := range map[string]struct {
		bump     int64
		now      time.Time
		revision int64
		index    uint64
	}{
		"by the clock":               {0, taken, taken.UnixMicro(), uint64(taken.UnixMicro())},
		"by a clock that makes none": {0, time.Unix(0, 0), 10 + leastBump, 18 + leastBump},
		"by a number":                {5, taken, 15, uint64(taken.UnixMicro())},
	} {
		t.Run(name, func(t *testing.T) {
			r, err := NewReader(bytes.NewReader(saved), "")
			if err != nil {
				t.Fatal(err)
			}
			dir := filepath.Join(t.TempDir(), "data", "raft")
			target := Target{DataDir: dir, ClusterID: "prod", Name: "c1", Address: "127.0.0.1:1", Now: test.now, Bump: test.bump}
			got, err := Restore(r, target)
			if err != nil || got.Revision != test.revision || got.Index != test.index || got.Header.Revision != 10 {
				t.Fatalf("%+v, %v", got, err)
			}
			if _, err := os.Stat(filepath.Join(dir, "replica.json")); err != nil {
				t.Error(err)
			}
			r, _ = NewReader(bytes.NewReader(saved), "")
			if _, err := Restore(r, target); err == nil || !strings.Contains(err.Error(), "holds data already") {
				t.Errorf("into a folder with data: %v", err)
			}
		})
	}
	for _, cut := range []int{len(saved) / 2, len(saved) - 1} {
		r, err := NewReader(bytes.NewReader(saved[:cut]), "f")
		if err != nil {
			t.Fatal(err)
		}
		dir := t.TempDir()
		if _, err := Restore(r, Target{DataDir: filepath.Join(dir, "raft"), ClusterID: "prod", Name: "c1", Address: "127.0.0.1:1", Now: taken}); !errors.Is(err, ErrCorrupt) {
			t.Errorf("cut off: %v", err)
		}
		if left, _ := os.ReadDir(dir); len(left) > 0 {
			t.Errorf("it left %v", left)
		}
	}
}

// FuzzInspect reads what may be a snapshot file: as it is, and as the records of
// one whose checksums are right, so that damage gets as far as the records.
func FuzzInspect(f *testing.F) {
	saved := save(f, sample(f))
	var inner bytes.Buffer
	if err := sample(f).Save(&inner); err != nil {
		f.Fatal(err)
	}
	records := inner.Bytes()[:inner.Len()-sha256.Size]
	f.Add(saved, false)
	f.Add(saved[:len(saved)/2], false)
	f.Add([]byte(magic), false)
	f.Add([]byte(magic+"\xff\xff\xff\xff{}"), false)
	f.Add([]byte(magic+"\x00\x00\x00\x02{}\x00\x00\x00\x00"), false)
	f.Add(records, true)
	f.Add(records[:len(records)/2], true)
	f.Add([]byte("TIMONEL\x00\x09M\x01\x01\x02\x00\x00\x00\x00\x00\x01Z"), true) // an empty state
	f.Fuzz(func(t *testing.T, b []byte, wrap bool) {
		if wrap {
			b = wrapped(b)
		}
		r, err := NewReader(bytes.NewReader(b), "")
		if err != nil {
			return
		}
		info, err := state.ScanSnapshot(r, nil)
		if err != nil {
			return
		}
		// What was taken for whole can be raised, and the state loads that.
		r, err = NewReader(bytes.NewReader(b), "")
		if err != nil {
			t.Fatal(err)
		}
		var raised bytes.Buffer
		if _, err := state.RaiseSnapshot(&raised, r, state.Raise{By: 1, Index: 1, Term: 1}); err != nil {
			if info.Revision > math.MaxInt64/2-1 {
				return
			}
			t.Fatalf("%+v: %v", info, err)
		}
		if err := state.New(state.Options{}).Restore(&raised); err != nil {
			t.Fatalf("%+v: %v", info, err)
		}
	})
}

// wrapped is a file of the records with checksums that are right.
func wrapped(records []byte) []byte {
	sum := sha256.Sum256(records)
	var file bytes.Buffer
	f := &fileWriter{w: &file, sum: sha256.New()}
	header := []byte(`{"format":1}`)
	f.write([]byte(magic))
	f.write(binary.BigEndian.AppendUint32(nil, uint32(len(header))))
	f.write(header)
	f.write(binary.BigEndian.AppendUint32(nil, crc32.Checksum(header, castagnoli)))
	chunkWriter{f}.Write(append(bytes.Clone(records), sum[:]...))
	f.write(make([]byte, 4))
	f.write(f.sum.Sum(nil))
	return file.Bytes()
}
