package main

import (
	"context"
	"fmt"
	"log/slog"
	"os"

	"github.com/go-logr/logr"
	"k8s.io/klog/v2"
)

// setUpLogs makes the process's logger, and lets what Kubernetes' libraries say
// through klog go the same way. klog's own levels are shown from debug on.
func setUpLogs(level, format string) (*slog.Logger, error) {
	var l slog.Level
	if err := l.UnmarshalText([]byte(level)); err != nil {
		return nil, fmt.Errorf("--log-level: %q is not debug, info, warn or error", level)
	}
	opts := &slog.HandlerOptions{Level: l}
	var h slog.Handler
	switch format {
	case "text":
		h = slog.NewTextHandler(os.Stderr, opts)
	case "json":
		h = slog.NewJSONHandler(os.Stderr, opts)
	default:
		return nil, fmt.Errorf("--log-format: %q is not text or json", format)
	}
	log := slog.New(h)
	klogLevel := slog.LevelWarn
	if l < slog.LevelInfo {
		klogLevel = l
	}
	klog.SetLoggerWithOptions(logr.FromSlogHandler(atLeast{log.With("from", "kubernetes").Handler(), klogLevel}), klog.ContextualLogger(true))
	return log, nil
}

// atLeast passes on only records of a level or above: at info, what Kubernetes'
// libraries say of their own start is noise to an operator.
type atLeast struct {
	slog.Handler
	level slog.Level
}

func (h atLeast) Enabled(ctx context.Context, l slog.Level) bool {
	return l >= h.level && h.Handler.Enabled(ctx, l)
}

func (h atLeast) WithAttrs(attrs []slog.Attr) slog.Handler {
	return atLeast{h.Handler.WithAttrs(attrs), h.level}
}

func (h atLeast) WithGroup(name string) slog.Handler {
	return atLeast{h.Handler.WithGroup(name), h.level}
}

// exitUnlessEnding lets klog.Fatal end the process for as long as ctx lasts. A start-up
// step of the API server fails when this controller ends, and would end the process
// before it has said why it ends, and left in order.
func exitUnlessEnding(ctx context.Context) {
	klog.OsExit = func(code int) {
		if ctx.Err() != nil {
			select {} // the process ends when run returns
		}
		os.Exit(code)
	}
}
