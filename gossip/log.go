package gossip

import (
	"context"
	"log"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"time"
)

const (
	problemRepeat = time.Minute      // the same problem is logged again after this
	problemKept   = 30 * time.Second // and shown for this long after it was last seen
)

type problem struct {
	text         string
	seen, logged time.Time
}

// report logs a problem, not more often than once a minute, and keeps it for
// [Pool.Problems].
func (p *Pool) report(key, text string, err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	now := time.Now()
	old := p.problems[key]
	next := problem{text: text, seen: now, logged: old.logged}
	if old.text != text || now.Sub(old.logged) >= problemRepeat {
		next.logged = now
		if err != nil {
			p.log.Error(text, "err", err)
		} else {
			p.log.Error(text)
		}
	}
	p.problems[key] = next
}

func (p *Pool) clear(key string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.problems, key)
}

// Problems lists what keeps members apart at the moment: keys that differ,
// foreign clusters, names used twice.
func (p *Pool) Problems() []string {
	p.mu.Lock()
	defer p.mu.Unlock()
	var out []string
	for _, key := range slices.Sorted(maps.Keys(p.problems)) {
		if q := p.problems[key]; time.Since(q.seen) < problemKept {
			out = append(out, q.text)
		} else if time.Since(q.seen) > 10*problemRepeat {
			delete(p.problems, key)
		}
	}
	return out
}

// keyDiffers recognises memberlist's ways to say that something was encrypted
// with another key.
func keyDiffers(line string) bool {
	for _, s := range []string{
		"no installed keys could decrypt", "Decrypt packet failed", "unsupported encryption version",
		"remote state is not encrypted", "remote state is encrypted",
	} {
		if strings.Contains(line, s) {
			return true
		}
	}
	return false
}

// bridge turns memberlist's log lines into records.
type bridge struct {
	p   *Pool
	log *slog.Logger
}

func newBridge(logger *slog.Logger, p *Pool) *log.Logger {
	return log.New(&bridge{p, logger.With("room", "gossip")}, "", 0)
}

// Write implements [io.Writer] for one line of memberlist's log, which looks
// like "[WARN] memberlist: text".
func (b *bridge) Write(line []byte) (int, error) {
	text := strings.TrimSpace(string(line))
	level := slog.LevelInfo
	if rest, ok := strings.CutPrefix(text, "["); ok {
		if name, after, ok := strings.Cut(rest, "] "); ok {
			text = strings.TrimPrefix(after, "memberlist: ")
			switch name {
			case "DEBUG":
				level = slog.LevelDebug
			case "INFO":
				level = slog.LevelDebug // it says each step of what Members shows
			case "WARN", "ERR", "ERROR":
				// None of it stops the pool, and it is about others: the pool's own
				// errors are reported where they are handled.
				level = slog.LevelWarn
			}
		}
	}
	if level == slog.LevelWarn && keyDiffers(text) {
		from := "somebody"
		if i := strings.LastIndex(text, "from="); i >= 0 {
			from = text[i+len("from="):]
		}
		host, _, _ := strings.Cut(from, ":")
		b.p.report("key "+host, "gossip from "+host+" cannot be decrypted: its gossip key differs from this member's"+
			" (another cluster, or a gossip.key that was not copied from this one)", nil)
		level = slog.LevelDebug
	}
	b.log.Log(context.Background(), level, text)
	return len(line), nil
}
