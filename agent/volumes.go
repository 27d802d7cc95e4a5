package agent

import (
	"context"
	"slices"
	"time"
)

// deleteAgain is when to try again what could not be deleted.
const deleteAgain = 5 * time.Second

func (a *Agent) volumesChanged() {
	select {
	case a.volumes <- struct{}{}:
	default:
	}
}

// deleteVolumes deletes what is behind this node's own volumes once they are being
// deleted, and says so on the Node for as long as they are there. Nothing is
// remembered: of what is being deleted, that of which nothing is here is deleted.
func (a *Agent) deleteVolumes(ctx context.Context) error {
	a.volumesChanged() // those of before the start
	var again <-chan time.Time
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-a.volumes:
		case <-again:
		}
		again = nil
		gone, err := a.pods.DeleteVolumes(ctx, a.store.PersistentVolumes())
		if err != nil && ctx.Err() == nil {
			a.log.Warn("delete volumes", "error", err)
			again = time.After(deleteAgain)
		}
		a.mu.Lock()
		changed := !slices.Equal(gone, a.deleted)
		a.deleted = gone
		a.mu.Unlock()
		if changed {
			a.kick()
		}
	}
}
