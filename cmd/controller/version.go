package main

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"sync/atomic"
	"time"

	"timonel/consensus"
	"timonel/state"
)

// newestVersion, if set by the linker, is the newest cluster version that this
// program runs under, below what it knows: a stand-in for an older program in the
// tests of upgrades.
var newestVersion = ""

// newestClusterVersion is the newest cluster version that this program runs under.
func newestClusterVersion() (int, error) {
	if newestVersion == "" {
		return state.NewestVersion, nil
	}
	n, err := strconv.Atoi(newestVersion)
	if err != nil || n < 1 || n > state.NewestVersion {
		return 0, fmt.Errorf("this program was built with main.newestVersion=%q: a number from 1 to %d", newestVersion, state.NewestVersion)
	}
	return n, nil
}

// versionCheck is how often the leader asks whether all members' programs are new
// enough, while the cluster's version is below its own.
const versionCheck = 2 * time.Second

// clusterVersion is the leader's care for the cluster version.
type clusterVersion struct {
	held atomic.Pointer[string] // why it is below what this program knows
}

// problem is a sentence for the operator, or empty.
func (v *clusterVersion) problem(store *state.Store) string {
	if held := v.held.Load(); held != nil && *held != "" {
		return fmt.Sprintf("the cluster writes the formats of version %d until all members' programs know %d: %s", store.View().ClusterVersion(), state.NewestVersion, *held)
	}
	return ""
}

// raiseVersion raises the cluster version to what all members' programs know, while
// this replica leads, and ends when it is this program's own.
func (k *controller) raiseVersion(ctx context.Context) error {
	defer k.clusterVersion.held.Store(nil)
	for k.store.View().ClusterVersion() < k.newest {
		_, held, err := k.replica.AgreeVersion(ctx, func(ctx context.Context, version int) error {
			kv, _ := k.store.View().Get(state.VersionKey)
			result, err := k.backend.Commit(ctx, &state.Txn{
				Conditions: []state.Condition{{Key: state.VersionKey, ModRevision: kv.ModRevision}},
				Changes:    []state.Change{{Key: state.VersionKey, Value: []byte(strconv.Itoa(version))}},
			})
			if err == nil && result.Succeeded {
				k.log.Info("all members' programs know a newer cluster version: its formats are written from now on", "version", version)
			}
			return err
		})
		switch {
		case err == nil:
			k.clusterVersion.held.Store(&held)
		case !errors.Is(err, consensus.ErrNotLeader) && ctx.Err() == nil:
			k.log.Warn("the cluster version could not be raised, trying again", "error", err)
		}
		if k.store.View().ClusterVersion() < k.newest && !pause(ctx, versionCheck) {
			return ctx.Err()
		}
	}
	return nil
}
