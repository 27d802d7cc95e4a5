package apiserver

import (
	"context"
	"log/slog"
	"time"

	genericapiserver "k8s.io/apiserver/pkg/server"
	controlplaneapiserver "k8s.io/kubernetes/pkg/controlplane/apiserver"
)

// hookRetry is the time between two attempts of a hook that failed.
const hookRetry = time.Second

// hookSay is the time between two log messages about it.
const hookSay = time.Minute

// patient is a provider whose hook after the server's start waits for the state
// and repeats when it fails. Upstream gives such hooks a minute or less and then
// ends the process; a replica that is alone for an hour must wait for the others
// instead.
type patient struct {
	controlplaneapiserver.RESTStorageProvider
	hook    genericapiserver.PostStartHookProvider
	barrier func(context.Context) error
}

// newPatient returns provider as a patient one.
func newPatient[P interface {
	controlplaneapiserver.RESTStorageProvider
	genericapiserver.PostStartHookProvider
}](provider P, barrier func(context.Context) error) patient {
	return patient{provider, provider, barrier}
}

// PostStartHook implements genericapiserver.PostStartHookProvider.
func (p patient) PostStartHook() (string, genericapiserver.PostStartHookFunc, error) {
	name, hook, err := p.hook.PostStartHook()
	if err != nil {
		return "", nil, err
	}
	return name, func(ctx genericapiserver.PostStartHookContext) error {
		var said time.Time
		for {
			err := p.barrier(ctx)
			if err == nil {
				err = hook(ctx)
			}
			if err == nil || ctx.Err() != nil {
				return nil
			}
			if time.Since(said) > hookSay {
				said = time.Now()
				slog.Warn("API server start-up step waits", "step", name, "error", err)
			}
			select {
			case <-ctx.Done():
				return nil
			case <-time.After(hookRetry):
			}
		}
	}, nil
}

// whileLeading runs task whenever leading says so, one at a time, until ctx
// ends. A task ends when its channel closes.
func whileLeading(ctx context.Context, leading func() bool, task func(stop chan struct{})) {
	check := time.NewTicker(hookRetry)
	defer check.Stop()
	var stop, stopped chan struct{}
	end := func() {
		if stop != nil {
			close(stop)
			<-stopped
			stop = nil
		}
	}
	defer end()
	for {
		switch lead := leading(); {
		case lead && stop == nil:
			stop, stopped = make(chan struct{}), make(chan struct{})
			go func(stop, stopped chan struct{}) {
				defer close(stopped)
				task(stop)
			}(stop, stopped)
		case !lead:
			end()
		}
		select {
		case <-ctx.Done():
			return
		case <-check.C:
		}
	}
}
