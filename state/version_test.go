package state

import (
	"bytes"
	"errors"
	"testing"
)

func raiseTo(version string) []byte {
	txn := Txn{Changes: []Change{{Key: VersionKey, Value: []byte(version)}}}
	return txn.Marshal()
}

func TestNewerCommandsAreNotSkipped(t *testing.T) {
	t.Parallel()
	good := (&Txn{Changes: []Change{{Key: "a", Value: []byte("1")}}}).Marshal()
	newer := bytes.Clone(good)
	newer[0] = txnVersion + 1
	flags := (&Txn{Changes: []Change{{Key: "a", Delete: true}}}).Marshal()
	flags[len(flags)-3] = 1 << 6 // before the length of the key and its one byte

	for name, command := range map[string][]byte{"version": newer, "flags": flags, "raise": raiseTo("99")} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := New(Options{})
			got := s.ApplyBatch([]Entry{
				{Index: 1, Term: 1, Command: good},
				{Index: 2, Term: 1, Command: command},
				{Index: 3, Term: 1, Command: good},
			})
			if got[0].Err != nil || !got[0].Succeeded {
				t.Fatalf("the first: %+v", got[0])
			}
			for i, r := range got[1:] {
				if !errors.Is(r.Err, ErrNewerVersion) {
					t.Errorf("entry %d: %v, want ErrNewerVersion", i+2, r.Err)
				}
			}
			if index, _ := s.Applied(); index != 1 || s.View().Revision() != 2 {
				t.Errorf("applied up to %d at revision %d, want 1 and 2: what cannot be read must not be skipped", index, s.View().Revision())
			}
		})
	}
}

func TestClusterVersion(t *testing.T) {
	t.Parallel()
	s := New(Options{})
	index := uint64(0)
	apply := func(command []byte) {
		t.Helper()
		index++
		if r := s.ApplyBatch([]Entry{{Index: index, Term: 1, Command: command}})[0]; r.Err != nil {
			t.Fatal(r.Err)
		}
	}
	want := func(version int) {
		t.Helper()
		if got := s.View().ClusterVersion(); got != version {
			t.Fatalf("cluster version %d, want %d", got, version)
		}
	}
	want(1)
	failing := Txn{Conditions: []Condition{{Key: "nobody", ModRevision: 7}}, Changes: []Change{{Key: VersionKey, Value: []byte("2")}}}
	apply(failing.Marshal())
	want(1)
	apply(raiseTo("2"))
	want(2)
	for _, less := range []string{"1", "-3", "", "two"} {
		apply(raiseTo(less))
		want(2)
	}
	apply(raiseTo("2"))

	var snapshot bytes.Buffer
	if err := s.Save(&snapshot); err != nil {
		t.Fatal(err)
	}
	restored := New(Options{})
	if err := restored.Restore(bytes.NewReader(snapshot.Bytes())); err != nil {
		t.Fatal(err)
	}
	if got := restored.View().ClusterVersion(); got != 2 {
		t.Errorf("restored: cluster version %d, want 2", got)
	}
	older := New(Options{NewestVersion: 1})
	before := older.View().Revision()
	if err := older.Restore(bytes.NewReader(snapshot.Bytes())); !errors.Is(err, ErrNewerVersion) {
		t.Errorf("an older program restores it: %v, want ErrNewerVersion", err)
	}
	if older.View().Revision() != before {
		t.Error("the refused snapshot changed the state")
	}
}
