package backup

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"sync"
	"time"

	"timonel/state"
)

// Schedule says what a Scheduler does.
type Schedule struct {
	Store Store
	// Interval is the time from one snapshot to the next, whoever leads.
	Interval time.Duration
	// Retain is how many snapshots of this cluster are kept, at least 1.
	Retain int
	// ClusterID and Version go into the files.
	ClusterID, Version string
	// View returns the state to save, after a read barrier.
	View   func(context.Context) (state.View, error)
	Logger *slog.Logger
}

// Scheduler takes snapshots while it runs, and forgets old ones.
type Scheduler struct {
	Schedule

	mu      sync.Mutex
	problem string // of the last attempt
}

// NewScheduler returns a scheduler; call Run where it is to take snapshots.
func NewScheduler(s Schedule) *Scheduler { return &Scheduler{Schedule: s} }

// List is what a Scheduler keeps.
type List struct {
	// Controller is the one that says so; a store that is a folder is its own.
	Controller string `json:"controller"`
	Store      string `json:"store"`
	ClusterID  string `json:"clusterID"`
	Interval   string `json:"interval"`
	Retain     int    `json:"retain"`
	// Items are the snapshots of this cluster, newest first.
	Items []Item `json:"items"`
	// Problem is why the last attempt of this controller failed.
	Problem string `json:"problem,omitempty"`
}

// retryAfter is how soon a failed snapshot is tried again, at most.
const retryAfter = 30 * time.Second

// Run takes a snapshot whenever one is due, until ctx ends. Run it on the leader
// alone.
func (s *Scheduler) Run(ctx context.Context) error {
	defer s.note(nil)
	for {
		wait, err := s.due(ctx)
		if err == nil && wait <= 0 {
			wait = s.Interval
			var item Item
			if item, err = s.Take(ctx); err == nil {
				s.Logger.Info("took a snapshot", "store", s.Store, "name", item.Name, "size", item.Size, "revision", item.Revision)
			}
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
		s.note(err)
		if err != nil {
			wait = min(s.Interval, retryAfter)
			s.Logger.Error("the scheduled snapshot failed", "store", s.Store, "error", err, "again in", wait)
		}
		t := time.NewTimer(wait)
		select {
		case <-t.C:
		case <-ctx.Done():
			t.Stop()
			return ctx.Err()
		}
	}
}

func (s *Scheduler) note(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.problem = ""
	if err != nil {
		s.problem = fmt.Sprintf("scheduled snapshots to %s fail: %v", s.Store, err)
	}
}

// Problems are sentences for the operator.
func (s *Scheduler) Problems() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.problem == "" {
		return nil
	}
	return []string{s.problem}
}

// due is how long until the next snapshot.
func (s *Scheduler) due(ctx context.Context) (time.Duration, error) {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	items, err := s.items(ctx)
	if err != nil || len(items) == 0 {
		return 0, err
	}
	age := time.Since(items[0].Time)
	if age < -time.Minute { // the clock went back: do not wait for the old time
		return 0, nil
	}
	return s.Interval - age, nil
}

// items are this cluster's, newest first.
func (s *Scheduler) items(ctx context.Context) ([]Item, error) {
	all, err := s.Store.List(ctx)
	if err != nil {
		return nil, fmt.Errorf("list: %w", err)
	}
	ours := []Item{}
	for _, item := range all {
		if item.ClusterID == s.ClusterID {
			ours = append(ours, item)
		}
	}
	newestFirst(ours)
	return ours, nil
}

// List returns what is kept.
func (s *Scheduler) List(ctx context.Context) (List, error) {
	items, err := s.items(ctx)
	if err != nil {
		return List{}, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return List{Store: s.Store.String(), ClusterID: s.ClusterID, Interval: s.Interval.String(), Retain: s.Retain, Items: items, Problem: s.problem}, nil
}

// Take takes a snapshot now, reads it back from the store, and only then deletes
// what is more than to be kept.
func (s *Scheduler) Take(ctx context.Context) (Item, error) {
	ctx, cancel := context.WithTimeout(ctx, max(s.Interval, 10*time.Minute))
	defer cancel()
	view, err := s.View(ctx)
	if err != nil {
		return Item{}, fmt.Errorf("read the state: %w", err)
	}
	now := time.Now()
	item, ok := parseName(Name(s.ClusterID, now, view.Revision()))
	if !ok {
		return Item{}, fmt.Errorf("cluster id %q does not fit into a file's name", s.ClusterID)
	}
	err = s.Store.Put(ctx, item.Name, func(w io.Writer) (err error) {
		item.Size, err = Save(w, view, Header{ClusterID: s.ClusterID, Version: s.Version, Time: now})
		return err
	})
	if err != nil {
		return Item{}, fmt.Errorf("write: %w", err)
	}
	if err := s.verify(ctx, item); err != nil {
		return Item{}, errors.Join(fmt.Errorf("read back: %w", err), s.Store.Delete(context.WithoutCancel(ctx), item.Name))
	}
	if err := s.prune(ctx, item); err != nil {
		return item, fmt.Errorf("delete old snapshots: %w", err)
	}
	return item, nil
}

func (s *Scheduler) verify(ctx context.Context, item Item) error {
	file, err := s.Store.Open(ctx, item.Name)
	if err != nil {
		return err
	}
	defer file.Close()
	r, err := NewReader(file, item.Name)
	if err != nil {
		return err
	}
	info, err := Inspect(r)
	if err == nil && (info.Size != item.Size || info.Revision != item.Revision) {
		err = fmt.Errorf("%s: %d bytes of revision %d were written, and %d of revision %d are there", item.Name, item.Size, item.Revision, info.Size, info.Revision)
	}
	return err
}

// prune deletes all but the newest of this cluster's snapshots, and never the
// one that was just verified.
func (s *Scheduler) prune(ctx context.Context, good Item) error {
	items, err := s.items(ctx)
	if err != nil {
		return err
	}
	var errs []error
	if f, ok := s.Store.(Folder); ok {
		errs = append(errs, f.sweep(time.Now().Add(-time.Hour)))
	}
	for i, item := range items {
		if i >= s.Retain && item.Name != good.Name {
			errs = append(errs, s.Store.Delete(ctx, item.Name))
		}
	}
	return errors.Join(errs...)
}
