package main

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"time"

	"github.com/spf13/pflag"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"timonel/backup"
	"timonel/state"
)

// backupConfig is what the flags say of scheduled snapshots.
type backupConfig struct {
	interval time.Duration
	retain   int
	dir      string
	url      string
	s3       backup.S3Config
}

func (c *backupConfig) flags(f *pflag.FlagSet) {
	f.DurationVar(&c.interval, "snapshot-interval", c.interval, "how often the leader saves a snapshot of the cluster to --snapshot-dir or --snapshot-s3 (0: never)")
	f.IntVar(&c.retain, "snapshot-retain", 24, "how many of these snapshots are kept")
	f.StringVar(&c.dir, "snapshot-dir", c.dir, "folder for them, on storage that all controllers share, or else each keeps those that it saved as the leader")
	f.StringVar(&c.url, "snapshot-s3", c.url, "S3-compatible store for them, as s3://bucket/prefix")
	c.s3.Flags(f, "snapshot-s3-")
}

// validate calls bad with the flag that is wrong and what it takes.
func (c *backupConfig) validate(bad func(flag, format string, args ...any)) {
	if c.interval == 0 {
		if c.dir != "" || c.url != "" {
			bad("snapshot-interval", "required with --snapshot-dir or --snapshot-s3: how often, such as 1h")
		}
		return
	}
	if c.interval < time.Second {
		bad("snapshot-interval", "%s is under a second", c.interval)
	}
	if c.retain < 1 {
		bad("snapshot-retain", "%d: at least one snapshot has to be kept", c.retain)
	}
	switch {
	case c.dir == "" && c.url == "":
		bad("snapshot-dir", "required with --snapshot-interval, or --snapshot-s3: where to")
	case c.dir != "" && c.url != "":
		bad("snapshot-dir", "and --snapshot-s3 are given: choose one")
	case c.url != "":
		if _, _, err := backup.ParseS3URL(c.url); err != nil {
			bad("snapshot-s3", "%v", err)
		}
	}
}

// newScheduler returns what takes scheduled snapshots, nil if none are wanted.
func (k *controller) newScheduler() (*backup.Scheduler, error) {
	c := k.backups
	if c.interval == 0 {
		return nil, nil
	}
	var store backup.Store = backup.Folder(c.dir)
	if c.url != "" {
		var err error
		if store, err = backup.NewS3(c.url, c.s3); err != nil {
			return nil, fmt.Errorf("--snapshot-s3: %w", err)
		}
	} else if err := os.MkdirAll(c.dir, 0o700); err != nil {
		return nil, fmt.Errorf("--snapshot-dir: %w", err)
	}
	return backup.NewScheduler(backup.Schedule{
		Store: store, Interval: c.interval, Retain: c.retain,
		ClusterID: k.bundle.ClusterID(), Version: version, View: k.barrierView, Logger: k.log,
	}), nil
}

// barrierView is the state after all that was acknowledged before the call.
func (k *controller) barrierView(ctx context.Context) (state.View, error) {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	if err := k.replica.ReadBarrier(ctx); err != nil {
		return state.View{}, err
	}
	return k.store.View(), nil
}

// paths are the operator's paths on the API port.
func (k *controller) paths() map[string]http.Handler {
	paths := map[string]http.Handler{
		"/timonel/v1/snapshot":  http.HandlerFunc(k.serveSnapshot),
		"/timonel/v1/snapshots": http.HandlerFunc(k.serveSnapshots),
		membersPath:             http.HandlerFunc(k.serveMembers),
	}
	paths[tokensPath] = http.HandlerFunc(k.serveTokens)
	paths[tokensPath+"/"] = http.HandlerFunc(k.serveToken)
	paths[nodesPath] = http.HandlerFunc(k.serveNodes)
	paths[nodesPath+"/"] = http.HandlerFunc(k.serveNodeChange)
	paths[gossipKeysPath] = http.HandlerFunc(k.serveGossipKeys)
	for name, kind := range memberChanges {
		paths[membersPath+"/"+name] = k.serveMemberChange(kind)
	}
	return paths
}

// serveSnapshot streams a snapshot file of this replica's state.
func (k *controller) serveSnapshot(w http.ResponseWriter, r *http.Request) {
	if r.Method != http.MethodGet {
		writeStatus(w, apierrors.NewMethodNotSupported(snapshotResource, r.Method))
		return
	}
	view, err := k.barrierView(r.Context())
	if err != nil {
		writeStatus(w, apierrors.NewServiceUnavailable("snapshot: "+err.Error()))
		return
	}
	now := time.Now()
	w.Header().Set("Content-Type", "application/octet-stream")
	w.Header().Set("Content-Disposition", fmt.Sprintf("attachment; filename=%q", backup.Name(k.bundle.ClusterID(), now, view.Revision())))
	if _, err := backup.Save(w, view, backup.Header{ClusterID: k.bundle.ClusterID(), Version: version, Time: now}); err != nil {
		k.log.Warn("a snapshot that was asked for could not be sent", "error", err)
		panic(http.ErrAbortHandler) // so that the client does not take it for whole
	}
}

var snapshotResource = metav1.SchemeGroupVersion.WithResource("snapshots").GroupResource()

// serveSnapshots lists what the schedule keeps.
func (k *controller) serveSnapshots(w http.ResponseWriter, r *http.Request) {
	if r.Method != http.MethodGet {
		writeStatus(w, apierrors.NewMethodNotSupported(snapshotResource, r.Method))
		return
	}
	if k.scheduler == nil {
		err := apierrors.NewNotFound(snapshotResource, "")
		err.ErrStatus.Message = "no snapshots are scheduled: start the controllers with --snapshot-interval and --snapshot-dir or --snapshot-s3"
		writeStatus(w, err)
		return
	}
	ctx, cancel := context.WithTimeout(r.Context(), 30*time.Second)
	defer cancel()
	list, err := k.scheduler.List(ctx)
	if err != nil {
		writeStatus(w, apierrors.NewServiceUnavailable(fmt.Sprintf("%s: %v", k.scheduler.Store, err)))
		return
	}
	list.Controller = k.name
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(list) // the client went away
}

// writeStatus answers with an error as the API's own look.
func writeStatus(w http.ResponseWriter, err *apierrors.StatusError) {
	err.ErrStatus.TypeMeta = metav1.TypeMeta{Kind: "Status", APIVersion: "v1"}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(int(err.ErrStatus.Code))
	_ = json.NewEncoder(w).Encode(err.ErrStatus)
}
