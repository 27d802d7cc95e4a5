package reconcile

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"time"

	"k8s.io/client-go/rest"
	"k8s.io/utils/clock"

	"timonel/state/objects"
)

// Config says what a Runner works with.
type Config struct {
	// Cache is the view of the state that decisions are made on. Required.
	Cache *objects.Cache
	// Revision returns the revision of this replica's state. The Runner waits for
	// the Cache to reach it after its own changes. Required.
	Revision func() int64
	// Client leads to the API, in process. Required unless Writer and Kinds are set.
	Client *rest.Config
	// Direct makes those requests that it can without Client's HTTP. It may be nil.
	Direct Direct
	// Writer makes the changes. Default: through Client, and Direct.
	Writer Writer
	// Kinds returns the resources the API serves. It is asked at the start of a term,
	// and after CustomResourceDefinitions and APIServices change. Default: discovery
	// through Client.
	Kinds func(ctx context.Context) (Kinds, error)
	// Reconcilers are what to run; see timonel/reconcile/standard. Their names must differ.
	Reconcilers []Reconciler

	// Health returns what is known of the nodes now. Required when a reconciler
	// depends on it.
	Health func() Health
	// HealthChanged delivers a value when Health would return something new. It may be nil.
	HealthChanged <-chan struct{}
	// ResetHealth is called when this process was stopped or stalled for longer than
	// Stall, so that what it has missed is not held against the nodes. It may be nil:
	// the Runner also moves Health.Since forward by itself.
	ResetHealth func()

	// Expire deletes objects whose time has come, and returns when the next one's
	// has, zero for none. It is called at the start of a term and then at the time
	// it returned, or ExpirePoll later at the latest. It may be nil.
	Expire func(ctx context.Context, now time.Time) (next time.Time, err error)
	// ExpirePoll is the longest time between two calls of Expire. It costs no write.
	// Default 30 s.
	ExpirePoll time.Duration

	// Workers is how many requests to the API run at a time. Reconcilers that depend on
	// the nodes' health have a fourth as many besides. Default 64.
	Workers int
	// Keys is how many keys are worked on at a time, a fourth of them of one reconciler
	// at most. Each of those that depend on the nodes' health has as many of its own.
	// Default 256.
	Keys int
	// Stall is how long this process may make no progress before it counts as paused. Default 2 s.
	Stall time.Duration
	// RequestTimeout bounds one request to the API. Default 15 s.
	RequestTimeout time.Duration
	// Host is this controller's name, for events. Default: the host's name.
	Host string
	// Log is where the Runner reports. Default slog.Default().
	Log *slog.Logger
	// Clock is for tests. Default: the real one.
	Clock clock.WithTicker
	// Seed makes a run repeatable. Default: from the clock.
	Seed uint64
}

// withDefaults returns the config with what was left out.
func (c Config) withDefaults() Config {
	if c.Workers == 0 {
		c.Workers = 64
	}
	if c.Keys == 0 {
		c.Keys = 256
	}
	if c.Stall == 0 {
		c.Stall = 2 * time.Second
	}
	if c.RequestTimeout == 0 {
		c.RequestTimeout = 15 * time.Second
	}
	if c.ExpirePoll == 0 {
		c.ExpirePoll = 30 * time.Second
	}
	if c.Host == "" {
		c.Host, _ = os.Hostname() // an event without a host is still an event
	}
	if c.Log == nil {
		c.Log = slog.Default()
	}
	if c.Clock == nil {
		c.Clock = clock.RealClock{}
	}
	if c.Seed == 0 {
		c.Seed = uint64(c.Clock.Now().UnixNano())
	}
	return c
}

// Validate returns an error that names the field that is wrong.
func (c Config) Validate() error {
	switch {
	case c.Cache == nil:
		return errors.New("reconcile.Config.Cache is not set")
	case c.Revision == nil:
		return errors.New("reconcile.Config.Revision is not set")
	case c.Client == nil && (c.Writer == nil || c.Kinds == nil):
		return errors.New("reconcile.Config.Client is not set, and Writer and Kinds are not both given instead")
	case c.Workers < 0:
		return fmt.Errorf("reconcile.Config.Workers is %d: give a number of requests", c.Workers)
	case c.Keys < 0:
		return fmt.Errorf("reconcile.Config.Keys is %d: give a number of keys", c.Keys)
	case c.Stall < 0:
		return fmt.Errorf("reconcile.Config.Stall is %s: give a time", c.Stall)
	case c.RequestTimeout < 0:
		return fmt.Errorf("reconcile.Config.RequestTimeout is %s: give a time", c.RequestTimeout)
	}
	names := map[string]bool{}
	for _, r := range c.Reconcilers {
		if names[r.Name()] {
			return fmt.Errorf("reconcile.Config.Reconcilers has two of the name %q", r.Name())
		}
		names[r.Name()] = true
		if v, ok := r.(interface{ Validate() error }); ok {
			if err := v.Validate(); err != nil {
				return fmt.Errorf("reconcile.Config.Reconcilers: %s: %w", r.Name(), err)
			}
		}
		if _, ok := r.(HealthReconciler); ok && c.Health == nil {
			return fmt.Errorf("reconcile.Config.Health is not set, but %s depends on it", r.Name())
		}
	}
	return nil
}
