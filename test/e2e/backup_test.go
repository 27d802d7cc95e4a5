//go:build e2e

package e2e

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"

	"timonel/test/harness"
)

// TestBackupPage follows docs/backup.md to the letter: its code blocks run on
// three machines that are set up as deploy/systemd says, with a few lines of
// shell for systemctl. Two things are replaced: the first three numbers of the
// addresses, and the S3 store.
func TestBackupPage(t *testing.T) {
	t.Parallel()
	site := newSite(t, 3)
	sections := readPage(t, filepath.Join("..", "..", "docs", "backup.md"))
	for _, name := range site.names() {
		site.run(t, name, "systemctl start timonel-controller")
	}
	client := site.client(t, "c1")
	site.waitReady(t)
	ctx := t.Context()
	configMaps := client.CoreV1().ConfigMaps("default")
	create := func(name, value string) *corev1.ConfigMap {
		t.Helper()
		var made *corev1.ConfigMap
		harness.Eventually(t, 30*time.Second, "create "+name, func() (err error) {
			made, err = configMaps.Create(ctx, &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: name}, Data: map[string]string{"v": value}}, metav1.CreateOptions{})
			return err
		})
		return made
	}
	kept, changed, deleted := create("kept", "1"), create("changed", "before"), create("deleted", "1")

	site.section(t, sections, "Save a snapshot by hand")
	t.Run("a file that is cut short or altered is refused", func(t *testing.T) { site.requireDamageRefused(t) })

	// What comes after the snapshot will be lost.
	lost := create("lost", "1")
	changed.Data["v"] = "after"
	changed, err := configMaps.Update(ctx, changed, metav1.UpdateOptions{})
	require.NoError(t, err)
	require.NoError(t, configMaps.Delete(ctx, "deleted", metav1.DeleteOptions{}))
	list, err := configMaps.List(ctx, metav1.ListOptions{})
	require.NoError(t, err)
	require.Greater(t, revision(t, list.ResourceVersion), revision(t, lost.ResourceVersion))

	page, err := configMaps.List(ctx, metav1.ListOptions{Limit: 1})
	require.NoError(t, err)
	require.NotEmpty(t, page.Continue)

	informer := informers.NewSharedInformerFactoryWithOptions(client, 0, informers.WithNamespace("default")).Core().V1().ConfigMaps()
	go informer.Informer().Run(ctx.Done())
	harness.Eventually(t, time.Minute, "the informer knows what will be lost", func() error {
		_, err := informer.Lister().ConfigMaps("default").Get("lost")
		return err
	})

	site.section(t, sections, "Save snapshots on a schedule")
	require.NotEmpty(t, site.store.Keys())
	require.Regexp(t, `^backups/prod/timonel-.*\.snapshot$`, site.store.Keys()[0])

	site.section(t, sections, "Restore")
	site.waitReady(t)
	t.Run("the state is the snapshot's, with greater revisions", func(t *testing.T) {
		for _, want := range []*corev1.ConfigMap{kept, deleted} {
			got, err := configMaps.Get(ctx, want.Name, metav1.GetOptions{})
			require.NoError(t, err)
			require.Equal(t, want.UID, got.UID)
			require.Greater(t, revision(t, got.ResourceVersion), revision(t, list.ResourceVersion))
		}
		got, err := configMaps.Get(ctx, "changed", metav1.GetOptions{})
		require.NoError(t, err)
		require.Equal(t, "before", got.Data["v"])
		_, err = configMaps.Get(ctx, "lost", metav1.GetOptions{})
		require.True(t, apierrors.IsNotFound(err), "%v", err)
	})
	t.Run("an old watch gets 410, an old condition a conflict", func(t *testing.T) {
		for _, name := range site.names() {
			requireExpired(t, site.client(t, name), list.ResourceVersion)
		}
		_, err := configMaps.List(ctx, metav1.ListOptions{Limit: 1, Continue: page.Continue})
		require.True(t, apierrors.IsResourceExpired(err), "the next page of an old list: %v", err)
		_, err = configMaps.List(ctx, metav1.ListOptions{ResourceVersion: list.ResourceVersion, ResourceVersionMatch: metav1.ResourceVersionMatchExact})
		require.True(t, apierrors.IsResourceExpired(err), "a list at an old revision: %v", err)
		_, err = configMaps.Update(ctx, changed, metav1.UpdateOptions{})
		require.True(t, apierrors.IsConflict(err), "%v", err)
	})
	t.Run("an informer from before lists again", func(t *testing.T) {
		harness.Eventually(t, 2*time.Minute, "the informer has the restored state", func() error {
			var names []string
			cached, err := informer.Lister().ConfigMaps("default").List(labels.Everything())
			for _, c := range cached {
				if c.Name == "changed" && c.Data["v"] != "before" {
					return errors.New("it has an object from the lost cluster")
				}
				names = append(names, c.Name)
			}
			if slices.Contains(names, "lost") || !slices.Contains(names, "deleted") {
				return fmt.Errorf("it has %v", names)
			}
			return err
		})
		create("after", "1")
		harness.Eventually(t, time.Minute, "and goes on watching", func() error {
			_, err := informer.Lister().ConfigMaps("default").Get("after")
			return err
		})
	})
	t.Run("a folder with data is refused", func(t *testing.T) {
		out, err := site.try(t, "c1", "timonel snapshot restore /var/backups/timonel/today.snapshot --data-dir /var/lib/timonel --bundle /etc/timonel/bundle --name c1")
		require.Error(t, err)
		require.Regexp(t, `^timonel: .*/var/lib/timonel/raft holds data already[^\n]*\n$`, out)
	})
}

// requireExpired watches after an old revision: the answer is 410, at once or as
// the first event.
func requireExpired(t *testing.T, client *kubernetes.Clientset, old string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	w, err := client.CoreV1().ConfigMaps("default").Watch(ctx, metav1.ListOptions{ResourceVersion: old})
	if err == nil {
		defer w.Stop()
		event, ok := <-w.ResultChan()
		require.True(t, ok, "the watch ends without a word")
		require.Equal(t, watch.Error, event.Type)
		err = apierrors.FromObject(event.Object)
	}
	require.True(t, apierrors.IsResourceExpired(err) || apierrors.IsGone(err), "%v", err)
}

func revision(t *testing.T, resourceVersion string) int64 {
	t.Helper()
	n, err := strconv.ParseInt(resourceVersion, 10, 64)
	require.NoError(t, err)
	return n
}

func (s *site) requireDamageRefused(t *testing.T) {
	t.Helper()
	folder := filepath.Join(s.machines["c1"].Dir, "backups")
	whole, err := os.ReadFile(filepath.Join(folder, "today.snapshot"))
	require.NoError(t, err)
	altered := bytes.Clone(whole)
	altered[len(altered)/3] ^= 1
	for _, bad := range [][]byte{whole[:len(whole)-1], altered} {
		require.NoError(t, os.WriteFile(filepath.Join(folder, "bad.snapshot"), bad, 0o600))
		for _, command := range []string{"inspect", "restore --data-dir /var/backups/timonel/nowhere --bundle /etc/timonel/bundle --name c1"} {
			out, err := s.try(t, "c1", "timonel snapshot "+command+" /var/backups/timonel/bad.snapshot")
			require.Error(t, err)
			require.Regexp(t, `^timonel: [^\n]*/var/backups/timonel/bad.snapshot: the snapshot file is damaged[^\n]*\n$`, out)
		}
		left, err := filepath.Glob(filepath.Join(folder, "nowhere", "*"))
		require.NoError(t, err)
		require.Empty(t, left)
	}
}
