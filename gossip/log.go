package gossip

import (
	"context"
	"log"
	"log/slog"
	"maps"
	"net"
	"slices"
	"strings"
	"sync"
	"time"
)

const (
	maxProblems   = 64
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
	old, known := p.problems[key]
	if !known && len(p.problems) >= maxProblems {
		return // what makes so many is among them
	}
	next := problem{text: text, seen: now, logged: old.logged}
	if now.Sub(old.logged) >= problemRepeat { // another text, too: others choose what is in it
		next.logged = now
		if err != nil {
			p.log.Error(text, "err", err)
		} else {
			p.log.Error(text)
		}
	}
	p.problems[key] = next
}

// refuse counts what is not taken, and logs one of each kind a minute: whoever sends
// it may send much.
func (p *Pool) refuse(reason, who string, err error) {
	p.count(reason)
	p.mu.Lock()
	defer p.mu.Unlock()
	old, now := p.problems["log "+reason], time.Now()
	if now.Sub(old.logged) < problemRepeat {
		return
	}
	p.problems["log "+reason] = problem{logged: now}
	p.log.Warn("gossip is not taken", "reason", reason, "from", who, "err", err)
}

// refuseFrom refuses what came from an address and could not be read.
func (p *Pool) refuseFrom(from string, err error) {
	if !keyDiffers(err.Error()) {
		p.refuse(refusedMessage, from, err)
		return
	}
	p.count(refusedKey)
	host, _, splitErr := net.SplitHostPort(from)
	if splitErr != nil {
		host = from
	}
	p.report("key "+host, "gossip from "+host+" cannot be decrypted: its gossip key differs from this member's"+
		" (another cluster, a gossip.key that was not copied from this one, or a key that was rotated while it was away)", nil)
}

func (p *Pool) count(reason string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.refused[reason]++
}

// Refused returns how much was not taken since the start, by reason.
func (p *Pool) Refused() map[string]uint64 {
	p.mu.Lock()
	defer p.mu.Unlock()
	return maps.Clone(p.refused)
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
		if q := p.problems[key]; q.text == "" {
			continue // of the log alone
		} else if time.Since(q.seen) < problemKept {
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

// maxWarnings bounds memberlist's warnings in a minute. It warns of each message that
// it does not like, and whoever has a key may send many.
const maxWarnings = 20

// bridge turns memberlist's log lines into records.
type bridge struct {
	p   *Pool
	log *slog.Logger

	mu     sync.Mutex
	minute time.Time // when it began
	warned int       // in it
}

// mayWarn counts a warning, and reports whether it may be logged.
func (b *bridge) mayWarn() bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	if now := time.Now(); now.Sub(b.minute) >= time.Minute {
		if more := b.warned - maxWarnings; more > 0 {
			b.log.Warn("memberlist warned of more than was logged", "more", more)
		}
		b.minute, b.warned = now, 0
	}
	b.warned++
	return b.warned <= maxWarnings
}

func newBridge(logger *slog.Logger, p *Pool) *log.Logger {
	return log.New(&bridge{p: p, log: logger.With("room", "gossip")}, "", 0)
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
	if level == slog.LevelWarn && strings.HasSuffix(text, errRefused.Error()) {
		return len(line), nil
	}
	if level == slog.LevelWarn && keyDiffers(text) {
		level = slog.LevelDebug // the transport has said so
	}
	if level == slog.LevelWarn && !b.mayWarn() {
		return len(line), nil
	}
	b.log.Log(context.Background(), level, text)
	return len(line), nil
}
