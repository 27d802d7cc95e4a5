package consensus

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// A running replica that meets damage in its log stops, names the file and says what
// to do. It sends on nothing that is wrong, and the others go on.
func TestDamageMetWhileRunning(t *testing.T) {
	t.Parallel()
	for _, kind := range logKinds {
		for name, spoil := range map[string]func(page []byte, at int){
			"a bit of an entry": func(page []byte, at int) { page[at] ^= 1 },
			"a page":            func(page []byte, _ int) { clear(page) },
		} {
			t.Run(kind.name+" "+name, func(t *testing.T) {
				t.Parallel()
				testDamage(t, kind, spoil, kind.name == LogStoreBolt || name != "a page")
			})
		}
	}
}

func testDamage(t *testing.T, kind logKind, spoil func(page []byte, at int), refused bool) {
	c := newCluster(t, 3)
	c.logStore = kind.name
	c.tune = func(cfg *Config) { cfg.MaxAppendEntries = 4 } // and a small cache
	c.startAll(3)
	leader, away := c.leader(), c.followers()[0].cfg.ID
	leader.put(t, "first", "1")
	c.kill(away)
	for i := range 100 {
		leader.put(t, fmt.Sprintf("key-%03d", i), strings.Repeat("x", 3000))
	}

	file := filepath.Join(c.dir, leader.cfg.ID, kind.file)
	data := file
	if kind.name == LogStoreWAL {
		files, err := filepath.Glob(filepath.Join(file, "*.wal"))
		must(t, err)
		data = files[0]
	}
	var content []byte
	at := -1
	eventually(t, "the entry to be in the file", func() (err error) { // out of the journal
		content, err = os.ReadFile(data)
		if at = bytes.Index(content, []byte("key-050=xxx")); err == nil && at < 0 {
			err = errors.New("it is not")
		}
		return err
	})
	at += 10
	page := content[at/4096*4096:][:4096]
	spoil(page, at%4096)
	f, err := os.OpenFile(data, os.O_WRONLY, 0)
	must(t, err)
	_, err = f.WriteAt(page, int64(at/4096*4096))
	must(t, errors.Join(err, f.Close()))

	c.start(away) // the leader reads what it lacks
	<-leader.Failed()
	for _, want := range []string{file, "entry", "if the other replicas are healthy, remove " + filepath.Join(c.dir, leader.cfg.ID)} {
		if err := leader.Err(); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("it says %v, which lacks %q", err, want)
		}
	}
	c.kill(leader.cfg.ID) // as its process does then
	eventually(t, "the others to go on", func() error {
		_, err := c.node(away).Apply(context.Background(), []byte("after=1"))
		return err
	})
	if got := c.node(away).fsm.get("key-050"); got != strings.Repeat("x", 3000) {
		t.Errorf("the follower got %.20q", got)
	}
	if _, err := c.tryStart(leader.cfg.ID); err == nil && !refused {
		c.kill(leader.cfg.ID) // raft-wal takes it for the log's end: see docs/log-store.md
	} else if err == nil || !strings.Contains(err.Error(), file) {
		t.Errorf("started again: %v", err)
	}
	c.wipe(leader.cfg.ID)
	c.start(leader.cfg.ID)
	eventually(t, "it to catch up", func() error {
		if c.node(leader.cfg.ID).fsm.get("after") != "1" {
			return errors.New("it lags")
		}
		return nil
	})
}
