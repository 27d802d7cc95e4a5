package volume

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/component-helpers/storage/volume"

	"timonel/agent/hostile"
)

// What the controllers write on volumes that are folders of a node's; see package
// timonel/reconcile/storage.
const (
	localProvisioner = "timonel.io/local"
	localFinalizer   = "timonel.io/local-volume"
	nodeAnnotation   = "timonel.io/node"
)

// maxDeleted bounds how many volumes are said to be deleted at a time: it is an
// annotation. The others are said when these have gone.
const maxDeleted = 1000

// deleteTurn is for how long one volume is being deleted before the next one is: one of
// millions of files does not keep the others.
const deleteTurn = 10 * time.Second

// isMadeHere says whether a volume is a folder that some node of this cluster made.
func isMadeHere(pv *corev1.PersistentVolume) bool {
	return pv.Annotations[volume.AnnDynamicallyProvisioned] == localProvisioner && pv.Annotations[nodeAnnotation] != ""
}

// isOwn says whether it is this node that makes it.
func (m *Manager) isOwn(pv *corev1.PersistentVolume) bool {
	return isMadeHere(pv) && pv.Annotations[nodeAnnotation] == m.cfg.Node
}

// localPath is the folder of one of the node's own volumes. What the volume says of
// its path is not asked.
func (m *Manager) localPath(name string) (string, error) {
	if m.cfg.LocalDir == "" || !filepath.IsLocal(name) || strings.ContainsRune(name, '/') || strings.HasPrefix(name, ".") {
		return "", fmt.Errorf("PersistentVolume %q has no folder on this node", name)
	}
	return filepath.Join(m.cfg.LocalDir, name), nil
}

// makeLocal makes the folder of one of the node's own volumes, once. Everybody may
// write in it, as in an emptyDir.
func (m *Manager) makeLocal(ctx context.Context, name string) error {
	parent, err := hostile.MakeRoot(m.cfg.LocalDir, 0o711)
	if err != nil {
		return err
	}
	defer parent.Close()
	if there, err := parent.Exists(name); there || err != nil {
		return err
	}
	making := "." + name + ".new"
	if err := parent.RemoveAll(ctx, making); err != nil {
		return err
	}
	dir, err := parent.Mkdir(making, 0o777, -1, -1)
	if err != nil {
		return err
	}
	dir.Close()
	return parent.RenameNew(making, name)
}

// DeleteLocal deletes what is behind those of the node's own volumes that are being
// deleted and that no pod here uses. It returns the UIDs of those of which nothing is
// left, sorted, and what went wrong with the others; to those that take long it is to be
// called again.
func (m *Manager) DeleteLocal(ctx context.Context, volumes []*corev1.PersistentVolume) (gone []types.UID, err error) {
	var errs []error
	for _, pv := range volumes {
		if !m.isOwn(pv) || pv.DeletionTimestamp == nil || !slices.Contains(pv.Finalizers, localFinalizer) ||
			pv.Spec.PersistentVolumeReclaimPolicy != corev1.PersistentVolumeReclaimDelete || pv.Status.Phase == corev1.VolumeBound ||
			len(gone) >= maxDeleted {
			continue
		}
		if m.isUsed(pv.Name) {
			errs = append(errs, fmt.Errorf("PersistentVolume %q is still used by a pod of this node", pv.Name))
			continue
		}
		turn, cancel := context.WithTimeout(ctx, m.deleteTurn)
		err := m.deleteLocal(turn, pv.Name)
		cancel()
		if errors.Is(err, context.DeadlineExceeded) && ctx.Err() == nil {
			err = errors.New("it has more files than can be deleted at once; the others have their turn first")
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("delete PersistentVolume %q: %w", pv.Name, err))
			continue
		}
		gone = append(gone, pv.UID)
	}
	slices.Sort(gone)
	return gone, errors.Join(errs...)
}

func (m *Manager) isUsed(name string) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return len(m.users[name]) > 0
}

func (m *Manager) deleteLocal(ctx context.Context, name string) error {
	if _, err := m.localPath(name); err != nil {
		return err
	}
	parent, err := hostile.OpenRoot(m.cfg.LocalDir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer parent.Close()
	return errors.Join(parent.RemoveAll(ctx, "."+name+".new"), parent.RemoveAll(ctx, name))
}
