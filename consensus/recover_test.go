package consensus

import (
	"bytes"
	"crypto/sha256"
	"encoding/gob"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"go.etcd.io/bbolt"
)

// recover runs Recover on a replica's folder.
func (c *cluster) recover(id string, tune func(*RecoverConfig)) (Recovery, error) {
	cfg := RecoverConfig{DataDir: filepath.Join(c.dir, id), Now: time.Now()}
	if tune != nil {
		tune(&cfg)
	}
	fsm := newMapFSM()
	return Recover(cfg, fsm, func(w io.Writer, _, _ uint64) error { return gob.NewEncoder(w).Encode(fsm.state()) })
}

func TestRecover(t *testing.T) { forLogStores(t, testRecover) }

func testRecover(t *testing.T, c *cluster) {
	smallSnapshots(c)
	c.startAll(3)
	c.waitRoles("c1 voter, c2 voter, c3 voter")
	for i := range 50 { // a snapshot, and entries after it
		c.leader().put(t, fmt.Sprint(i), "x")
	}
	c.leader().put(t, "k", "kept")
	must(t, c.node("c2").ReadBarrier(t.Context()))
	if _, err := c.recover("c2", nil); err == nil || !strings.Contains(err.Error(), "in use by another process") {
		t.Errorf("a folder in use: %v", err)
	}
	for _, id := range []string{"c1", "c2", "c3"} {
		c.kill(id)
	}
	dry, err := c.recover("c2", func(r *RecoverConfig) { r.DryRun = true })
	must(t, err)
	if dry.ID != "c2" || dry.Index < 51 || dry.Term == 0 || len(dry.Members) != 3 || dry.LogStore != c.logStore || dry.Written.IsZero() {
		t.Errorf("%+v", dry)
	}
	// A run that was cut off before its work counted leaves a folder behind.
	must(t, os.MkdirAll(filepath.Join(c.dir, "c2.recovered.partial", "snapshots"), 0o700))
	out, err := c.recover("c2", nil)
	must(t, err)
	if out.Index != dry.Index || out.Kept == "" {
		t.Errorf("%+v", out)
	}
	if _, err := os.Stat(filepath.Join(out.Kept, identityFile)); err != nil {
		t.Errorf("the former folder: %v", err)
	}
	if left, _ := filepath.Glob(filepath.Join(c.dir, "c2.recovered*")); len(left) > 0 {
		t.Errorf("it left %v", left)
	}
	n := c.start("c2")
	c.waitRoles("c2 voter")
	if n.fsm.get("k") != "kept" || n.fsm.get("49") != "x" {
		t.Errorf("the recovered state: %v", n.fsm.state())
	}
	n.put(t, "k", "kept")
	c.kill("c2")
	// The lost majority comes back with its data.
	c.formerMajorityStops("c2", "kept", "c1", "c3")
}

// TestRecoverCutOff cuts Recover off between the exchange of the folders and the
// renaming of the former one.
func TestRecoverCutOff(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 3).startAll(3)
	c.leader().put(t, "k", "kept")
	must(t, c.node("c1").ReadBarrier(t.Context()))
	for _, id := range []string{"c1", "c2", "c3"} {
		c.kill(id)
	}
	first, err := c.recover("c1", nil)
	must(t, err)
	must(t, os.Rename(first.Kept, filepath.Join(c.dir, "c1.recovered")))
	again, err := c.recover("c1", nil)
	must(t, err)
	if !again.Finished || again.Kept == "" {
		t.Errorf("%+v", again)
	}
	n := c.start("c1")
	c.waitRoles("c1 voter")
	if n.fsm.get("k") != "kept" {
		t.Error("the state is not the recovered one")
	}
}

func TestRecoverRefuses(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 3)
	c.startAll(3)
	c.waitRoles("c1 voter, c2 voter, c3 voter")
	removed := c.followers()[0].cfg.ID
	c.leader().change(t, removeMember, removed)
	eventually(t, removed+" to hear that it was removed", func() error { // its log may lack it
		if c.node(removed).MemberErr() == nil {
			return errors.New("it has not")
		}
		return nil
	})
	for _, id := range []string{"c1", "c2", "c3"} {
		must(t, os.MkdirAll(filepath.Join(c.dir, "nobody"), 0o700))
		c.kill(id)
	}
	damaged := "c1"
	if removed == damaged {
		damaged = "c2"
	}
	file := filepath.Join(c.dir, damaged, logFile)
	b, err := os.ReadFile(file)
	must(t, err)
	must(t, os.WriteFile(file, b[:3*4096], 0o600))
	for _, x := range []struct{ id, why string }{
		{"nobody", "is not the data folder of a replica"},
		{damaged, "truncated"},
	} {
		before := digest(t, filepath.Join(c.dir, x.id))
		_, err := c.recover(x.id, nil)
		if err == nil || !strings.Contains(err.Error(), x.why) || strings.Contains(err.Error(), "\n") {
			t.Errorf("%s: %v, want %q", x.id, err, x.why)
		}
		for file, sum := range before {
			if file != lockFile && digest(t, filepath.Join(c.dir, x.id))[file] != sum {
				t.Errorf("%s: %s was changed", x.id, file)
			}
		}
	}
	_, err = c.recover(removed, nil)
	if err == nil || !strings.Contains(err.Error(), "replica "+removed+" was removed from the cluster") || !strings.Contains(err.Error(), "--force") {
		t.Errorf("of a removed replica: %v", err)
	}
	out, err := c.recover(removed, func(r *RecoverConfig) { r.Force = true })
	if err != nil || out.Kept == "" {
		t.Errorf("of a removed replica, with force: %+v, %v", out, err)
	}
	c.start(removed)
	c.waitRoles(removed + " voter")
}

// contents is digest with names relative to dir, and with what the bolt log holds
// in place of its bytes: each opening begins a new generation of its journal.
func contents(t *testing.T, dir string) map[string]string {
	t.Helper()
	out := map[string]string{}
	for file, sum := range digest(t, dir) {
		name, err := filepath.Rel(dir, file)
		must(t, err)
		if out[name] = sum; name != logFile {
			continue
		}
		h := sha256.New()
		db, err := bbolt.Open(file, 0o600, &bbolt.Options{ReadOnly: true, Timeout: time.Second})
		must(t, err)
		must(t, db.View(func(tx *bbolt.Tx) error {
			return tx.ForEach(func(bucket []byte, b *bbolt.Bucket) error {
				return b.ForEach(func(k, v []byte) error {
					if !bytes.Equal(k, journalKey) {
						fmt.Fprintf(h, "%q %q %q\n", bucket, k, v)
					}
					return nil
				})
			})
		}))
		must(t, db.Close())
		out[name] = fmt.Sprintf("%x", h.Sum(nil))
	}
	return out
}

func TestRecoverNonVoter(t *testing.T) { forLogStores(t, testRecoverNonVoter) }

func testRecoverNonVoter(t *testing.T, c *cluster) {
	smallSnapshots(c)
	small := c.tune
	c.tune = func(cfg *Config) {
		small(cfg)
		cfg.StabilizationTime = time.Hour // nobody is promoted
	}
	c.startAll(3)
	n := c.start("c4")
	c.waitRoles("c1 voter, c2 voter, c3 voter, c4 non-voter")
	for i := range 50 { // a snapshot, and entries after it
		c.leader().put(t, fmt.Sprint(i), "x")
	}
	c.leader().put(t, "k", "kept")
	must(t, n.ReadBarrier(t.Context()))
	for _, id := range []string{"c1", "c2", "c3", "c4"} {
		c.kill(id)
	}
	dir := filepath.Join(c.dir, "c4")
	before := contents(t, dir)
	requireUnchanged := func(after string) {
		t.Helper()
		if got := contents(t, dir); !maps.Equal(got, before) {
			t.Errorf("after %s the folder holds\n%v, before\n%v", after, got, before)
		}
		if beside, _ := filepath.Glob(dir + "?*"); len(beside) > 0 {
			t.Errorf("%s left %v", after, beside)
		}
	}
	for _, dry := range []bool{true, false} {
		out, err := c.recover("c4", func(r *RecoverConfig) { r.DryRun = dry })
		if err == nil {
			t.Fatalf("a non-voter was recovered (dry run: %v): %+v", dry, out)
		}
		for _, w := range []string{dir, "replica c4 was not a voter", "recover a voter, or give --force"} {
			if !strings.Contains(err.Error(), w) {
				t.Errorf("error %q lacks %q", err, w)
			}
		}
		requireUnchanged("a refusal")
	}
	dry, err := c.recover("c4", func(r *RecoverConfig) { r.Force, r.DryRun = true, true })
	must(t, err)
	requireUnchanged("a dry run with force")
	votes := map[string]bool{}
	for _, m := range dry.Members {
		votes[m.ID] = m.Voter
	}
	if !maps.Equal(votes, map[string]bool{"c1": true, "c2": true, "c3": true, "c4": false}) {
		t.Errorf("members of the lost cluster: %+v", dry.Members)
	}
	out, err := c.recover("c4", func(r *RecoverConfig) { r.Force = true })
	must(t, err)
	if out.ID != "c4" || out.Index < 51 || out.Index != dry.Index || out.Term != dry.Term || out.Kept == "" {
		t.Errorf("%+v, and the dry run %+v", out, dry)
	}
	if got := contents(t, out.Kept); !maps.Equal(got, before) {
		t.Errorf("the folder that was kept holds\n%v, before\n%v", got, before)
	}
	n = c.start("c4")
	c.waitRoles("c4 voter")
	if id, _, _ := n.Leader(); id != "c4" {
		t.Errorf("%q leads", id)
	}
	if n.fsm.get("k") != "kept" || n.fsm.get("0") != "x" || n.fsm.get("49") != "x" {
		t.Errorf("the recovered state: %v", n.fsm.state())
	}
	n.put(t, "k", "new")
	must(t, n.ReadBarrier(t.Context()))
}
