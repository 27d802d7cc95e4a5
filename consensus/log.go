package consensus

import (
	"context"
	"fmt"
	"io"
	"log"
	"log/slog"
	"strings"
	"time"

	"github.com/hashicorp/go-hclog"
)

// raftLog gives Raft's hclog messages to slog. Messages that Raft repeats in
// normal operation, or with every message to a peer that is down, are demoted
// or limited, so that the log stays readable at night.
type raftLog struct {
	to    *slog.Logger
	name  string
	args  []any
	limit *logLimiter
}

func newRaftLog(to *slog.Logger) hclog.Logger {
	return &raftLog{to: to, name: "raft", limit: newLogLimiter(5 * time.Second)}
}

// demoted are Raft's messages that say nothing to an operator.
var demoted = []string{
	"failed to get previous log", // a follower that is about to be caught up
	"previous log term mis-match",
	"appendEntries rejected, sending older logs",
	"skipping application of old log",
	"failed to heartbeat to",
	"failed to contact",
	"failed to appendEntries to",
	"failed to pipeline appendEntries",
	"failed to start pipeline replication to",
	"failed to make requestVote RPC",
	"failed to decode incoming command", // a connection that its peer closed
	"failed to flush response",
	"pipelining replication",
	"aborting pipeline replication",
	"duplicate requestVote",
	"creating new snapshot",
	"reaping snapshot",
	"no known peers, aborting election",
	"added peer, starting replication",
	"initial configuration",
}

// limited are messages that repeat while something is wrong.
var limited = []string{"rejecting", "failed to", "Election timeout reached"}

func (l *raftLog) Log(level hclog.Level, msg string, args ...any) {
	to := map[hclog.Level]slog.Level{hclog.Info: slog.LevelInfo, hclog.Warn: slog.LevelWarn, hclog.Error: slog.LevelError}[level]
	if level == hclog.Trace || level == hclog.Debug || level == hclog.NoLevel {
		to = slog.LevelDebug
	}
	for _, d := range demoted {
		if strings.HasPrefix(msg, d) {
			to = slog.LevelDebug
		}
	}
	ctx := context.Background()
	if !l.to.Enabled(ctx, to) {
		return
	}
	all := append(append([]any(nil), l.args...), args...)
	for i, a := range all {
		switch a := a.(type) {
		case hclog.Format:
			all[i] = fmt.Sprintf(a[0].(string), a[1:]...)
		case error:
			all[i] = a.Error()
		case fmt.Stringer:
			all[i] = a.String()
		}
	}
	if to > slog.LevelDebug {
		for _, p := range limited {
			if strings.HasPrefix(msg, p) && !l.limit.allow(fmt.Sprint(msg, all)) {
				return
			}
		}
	}
	l.to.Log(ctx, to, l.name+": "+msg, all...)
}

func (l *raftLog) Trace(msg string, args ...any) { l.Log(hclog.Trace, msg, args...) }
func (l *raftLog) Debug(msg string, args ...any) { l.Log(hclog.Debug, msg, args...) }
func (l *raftLog) Info(msg string, args ...any)  { l.Log(hclog.Info, msg, args...) }
func (l *raftLog) Warn(msg string, args ...any)  { l.Log(hclog.Warn, msg, args...) }
func (l *raftLog) Error(msg string, args ...any) { l.Log(hclog.Error, msg, args...) }

func (l *raftLog) enabled(level slog.Level) bool {
	return l.to.Enabled(context.Background(), level)
}
func (l *raftLog) IsTrace() bool      { return false }
func (l *raftLog) IsDebug() bool      { return l.enabled(slog.LevelDebug) }
func (l *raftLog) IsInfo() bool       { return l.enabled(slog.LevelInfo) }
func (l *raftLog) IsWarn() bool       { return l.enabled(slog.LevelWarn) }
func (l *raftLog) IsError() bool      { return l.enabled(slog.LevelError) }
func (l *raftLog) ImpliedArgs() []any { return l.args }
func (l *raftLog) Name() string       { return l.name }

func (l *raftLog) With(args ...any) hclog.Logger {
	c := *l
	c.args = append(append([]any(nil), l.args...), args...)
	return &c
}
func (l *raftLog) Named(name string) hclog.Logger { return l.ResetNamed(l.name + "." + name) }
func (l *raftLog) ResetNamed(name string) hclog.Logger {
	c := *l
	c.name = name
	return &c
}
func (l *raftLog) SetLevel(hclog.Level) {} // slog's handler decides
func (l *raftLog) GetLevel() hclog.Level {
	switch {
	case l.IsDebug():
		return hclog.Debug
	case l.IsInfo():
		return hclog.Info
	case l.IsWarn():
		return hclog.Warn
	}
	return hclog.Error
}
func (l *raftLog) StandardLogger(o *hclog.StandardLoggerOptions) *log.Logger {
	return log.New(l.StandardWriter(o), "", 0)
}
func (l *raftLog) StandardWriter(*hclog.StandardLoggerOptions) io.Writer {
	return logWriter{l}
}

type logWriter struct{ l *raftLog }

func (w logWriter) Write(b []byte) (int, error) {
	w.l.Info(strings.TrimRight(string(b), "\n"))
	return len(b), nil
}
